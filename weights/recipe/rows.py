"""Training rows: tokens with a loss weight each, composed on the fly by worker processes.

Weights are counted in quarters: 4 is the weight of a token of prose, 0 leaves a token out.
"""

import chats as C
import numpy as np

PROSE, ASIDE, PROBLEM, TALK, ANSWER, VALUE = 4, 1, 12, 6, 16, 64

# (end of the phase as a share of the time, {row length: share of the batches})
PHASES = {
    "first": [
        (0.10, {256: 1.0}),
        (0.26, {512: 0.9, 256: 0.1}),
        (0.40, {1024: 0.85, 512: 0.15}),
        (0.56, {2048: 0.8, 1024: 0.1, 512: 0.1}),
        (0.75, {4096: 0.75, 2048: 0.15, 1024: 0.1}),
        (0.90, {9216: 0.65, 4096: 0.2, 2048: 0.1, 1024: 0.05}),
        (1.00, {9216: 0.55, 18432: 0.12, 4096: 0.18, 2048: 0.1, 1024: 0.05}),
    ],
    "second": [
        (0.35, {512: 0.4, 1024: 0.3, 2048: 0.3}),
        (0.60, {4096: 0.45, 2048: 0.3, 1024: 0.15, 512: 0.1}),
        (1.00, {9216: 0.5, 18432: 0.1, 4096: 0.2, 2048: 0.1, 1024: 0.06, 512: 0.04}),
    ],
    "third": [
        (0.40, {512: 0.4, 1024: 0.3, 2048: 0.3}),
        (0.62, {4096: 0.45, 2048: 0.3, 1024: 0.15, 512: 0.1}),
        (1.00, {9216: 0.5, 18432: 0.1, 4096: 0.2, 2048: 0.1, 1024: 0.06, 512: 0.04}),
    ],
    "fourth": [
        (0.30, {512: 0.35, 1024: 0.35, 2048: 0.3}),
        (0.55, {4096: 0.5, 2048: 0.3, 1024: 0.1, 512: 0.1}),
        (1.00, {9216: 0.55, 18432: 0.1, 4096: 0.2, 2048: 0.1, 512: 0.05}),
    ],
}
MIXTURE = {"needle": 0.56, "key_value": 0.07, "problems": 0.09, "repeat": 0.03, "talk": 0.02, "prose": 0.23}


class Rows:
    """Compose rows from a Corpus.

    Args:
        corpus (Corpus): books and number-rich text.
        split (str): "train" or "heldout" entities.
        pools (dict): lists of "words" and "names" from the books (training only).
    """

    def __init__(self, corpus, split="train", pools=None):
        self.corpus, self.split, self.pools = corpus, split, pools or {}
        self.people, self.asides = {}, None
        if pools:
            self.asides = pools.pop("sentences")
            plurals = [word for word in pools["words"] if word.endswith("s") and len(word) > 4]
            self.people = {"names": pools["names"], "things": plurals}

    def weigh(self, segments):
        """Encode (text, weight) segments as one text; return tokens and the weight of each."""
        text = "".join(t for t, _ in segments)
        chars = np.repeat([x for _, x in segments], [len(t) for t, _ in segments])
        coded = self.corpus.tokenizer.encode(text)
        ends = np.array([e for _, e in coded.offsets]) - 1
        return np.array(coded.ids, dtype=np.uint16), chars[ends].astype(np.uint8)

    def answer(self, text, values):
        """Return the weighted segments of an assistant's turn, after its header."""
        segments, at = [], 0
        for value in values:
            start = text.index(value, at)
            segments += [(text[at:start], ANSWER), (value, VALUE)]
            at = start + len(value)
        return segments + [(text[at:], ANSWER), ("<|im_end|>", ANSWER), ("\n", ASIDE)]

    def needle(self, rng, room, spec=None, listed=False):
        """Return a document with facts in it and a conversation about them, of at most `room` tokens."""
        fixed = spec or {}
        if listed or fixed.get("task") == "key_value":
            listed, asked = C.key_value_task(rng, self.split, max(room - 120, 60), self.pools, spec)
            sentences = []
        else:
            listed = None
            sentences, asked = C.needle_task(rng, self.split, room, self.pools, spec)
        system, brief = (None, False) if spec else C.system_prompt(rng)
        if fixed.get("brief"):
            system = C.BRIEF_SYSTEM[0]
        style = (
            fixed.get("style")
            or rng.choices(("after", "labelled", "both", "before", "turn"), (0.6, 0.1, 0.06, 0.08, 0.16))[0]
        )
        pairs = []
        for i, (question, answer, short, values) in enumerate(asked):
            plain = bool(spec) or (i == 0 and rng.random() < 0.4)
            pairs.append(
                (*C.ask(rng, question, answer, short, brief or fixed.get("brief", False), plain, self.asides), values)
            )

        head = (C.turn("system", system) if system else "") + "<|im_start|>user\n"
        tail, first = [], pairs[0][0]
        if style in ("both", "before"):
            head += first + "\n\n"
        if style == "labelled":
            head += "Text:\n"
            first = "Question: " + first
        if style == "turn":
            head += rng.choice(C.READ) + "\n\n" if rng.random() < 0.7 else ""
            tail += [("<|im_end|>\n<|im_start|>assistant\n" + rng.choice(C.READY), ASIDE), ("<|im_end|>", ANSWER)]
            tail += [("\n<|im_start|>user\n" + first, ASIDE)]
        elif style != "before":
            tail += [(first, ASIDE)]
        for i, (question, reply, values) in enumerate(pairs):
            if i:
                tail += [("<|im_start|>user\n" + question, ASIDE)]
            tail += [("<|im_end|>\n<|im_start|>assistant\n", ASIDE), *self.answer(reply, values)]
        head_tokens = self.corpus.encode(head)
        tail_tokens, tail_weights = self.weigh(tail)

        left = room - len(head_tokens) - len(tail_tokens) - 4
        left -= sum(len(s) for s in sentences) // 3 + 6 * len(sentences)
        if left < 24 and listed is None:
            return None
        share = fixed.get("numbers")
        if share is None:
            share = rng.uniform(0.2, 0.8) if rng.random() < 0.35 else 0.0
        if listed is not None:
            document, weights = self.list_document(rng, listed, left, share)
        else:
            text = self.corpus.haystack(rng, left, share)
            depths = [rng.random() for _ in sentences]
            # In this order, because several values of one key are answered in the order of the text.
            document, marks = self.corpus.insert(rng, text, sentences, sorted(depths))
            weights = np.where(marks, 0, PROSE).astype(np.uint8)
        if style in ("before", "turn"):
            document = self.corpus.open_end(document)
            weights = weights[: len(document)]
        tokens = np.concatenate([head_tokens, document, tail_tokens])
        if len(tokens) > room:
            return None
        return tokens, np.concatenate([np.full(len(head_tokens), ASIDE, np.uint8), weights, tail_weights])

    def list_document(self, rng, listed, left, share):
        """Return a list of keys and values, alone or between two passages of text."""
        tokens = self.corpus.encode(listed + "\n\n")
        weights = np.zeros(len(tokens), np.uint8)
        left -= len(tokens)
        if left < 100 or rng.random() < 0.4:
            return tokens, weights
        parts = [(tokens, weights)]
        cut = rng.randint(0, left)
        for n, place in ((cut, 0), (left - cut, len(parts))):
            if n >= 60:
                text = self.corpus.haystack(rng, n, share)
                item = (text, np.full(len(text), PROSE, np.uint8))
                parts.insert(0, item) if place == 0 else parts.append(item)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def told(self, text, answers, weight):
        """Return a finished conversation with `weight` on its answers."""
        segments, at = [], 0
        for answer in answers:
            start = text.index(answer, at)
            segments += [(text[at:start], ASIDE), (answer, weight)]
            at = start + len(answer)
            if text.startswith("<|im_end|>", at):
                segments.append(("<|im_end|>", weight))
                at += len("<|im_end|>")
        return self.weigh(segments + [(text[at:], ASIDE)])

    def repeat(self, rng, room):
        """Return a passage and then the same passage again."""
        text = self.corpus.passage(rng, max(48, min(room, 6000) // 2 - 16))
        weights = np.full(len(text), PROSE, np.uint8)
        if rng.random() < 0.6:
            return np.concatenate([text, text]), np.concatenate([weights, weights])
        ask = rng.choice(("Repeat the text.", "Please repeat this text word by word.", "Copy this text.",
                          "Say the text again."))  # fmt: skip
        body = self.corpus.open_end(text)
        weights = np.full(len(body), PROSE, np.uint8)
        head, _ = self.weigh([(f"<|im_start|>user\n{ask}\n\n", ASIDE)])
        middle, _ = self.weigh([("<|im_end|>\n<|im_start|>assistant\n", ASIDE)])
        end, end_weights = self.weigh([("<|im_end|>", ANSWER), ("\n", ASIDE)])
        aside = [np.full(len(x), ASIDE, np.uint8) for x in (head, middle)]
        return (
            np.concatenate([head, body, middle, body, end]),
            np.concatenate([aside[0], weights, aside[1], weights, end_weights]),
        )

    def segment(self, rng, room, first):
        """Return (tokens, weights) of one text, cut to `room` where it may be."""
        kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        whole = first and rng.random() < 0.65
        size = room if whole else int(np.exp(rng.uniform(np.log(min(150, room)), np.log(room))))
        if kind == "needle" and size > 110:
            return self.needle(rng, size)
        if kind == "key_value" and size > 110:
            return self.needle(rng, size, None, listed=True)
        if kind == "repeat":
            tokens, weights = self.repeat(rng, size)
        elif kind in ("problems", "talk"):
            parts, total = [], 0
            make, weight = (C.problem_chats, PROBLEM) if kind == "problems" else (C.small_talk, TALK)
            size = size if kind == "problems" else 1
            while total < size:
                if kind == "problems":
                    item = self.told(*make(rng, pools=self.people), weight)
                else:
                    story = self.corpus.passage(rng, 120).tolist() if rng.random() < 0.15 and room > 200 else []
                    item = self.told(*make(rng, self.corpus.tokenizer.decode(story).strip()), weight)
                total += len(item[0])
                parts.append(item)
            tokens, weights = (np.concatenate(x) for x in zip(*parts))
        else:
            tokens = self.corpus.slice(rng, size)
            weights = np.full(size, PROSE, np.uint8)
        return tokens[:room], weights[:room]

    def row(self, rng, n):
        """Return exactly `n` tokens and weights: texts one after the other, <|endoftext|> between them."""
        tokens, weights, left = [], [], n
        while left > 0:
            if left < 60:
                part = self.corpus.slice(rng, left), np.full(left, PROSE, np.uint8)
            else:
                part = self.segment(rng, left - 1, left == n)
            if part is None:
                continue
            tokens.append(part[0])
            weights.append(part[1])
            left -= len(part[0])
            if left > 0:
                tokens.append(np.array([self.corpus.eot], np.uint16))
                weights.append(np.array([0], np.uint8))
                left -= 1
        return np.concatenate(tokens), np.concatenate(weights)

    def batch(self, rng, length, size):
        """Return uint16 tokens and uint8 weights of shape [size // length, length + 1]."""
        rows = [self.row(rng, length + 1) for _ in range(size // length)]
        return np.stack([t for t, _ in rows]), np.stack([x for _, x in rows])


def row_length(rng, phases, progress):
    """Draw the row length of a batch at a point of training (0 to 1)."""
    for end, lengths in PHASES[phases]:  # noqa: B007  (the last ones stay)
        if progress < end:
            break
    return rng.choices(list(lengths), list(lengths.values()))[0]
