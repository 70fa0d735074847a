"""Passages of books and of Python files, measured in tokens."""

import ast
import gzip
import itertools
import json
import re
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import values as V

# A sentence with the white space before it.
_SENTENCE = re.compile(r"\s*\S.*?[.!?][\"')\]]*(?=\s)", re.S)
# Copies of other packages, this project's own files, and what is data more than code.
_COPIES = ("pip", "setuptools", "pkg_resources", "multiprocess", "mlx_dsa", "ensurepip", "site-packages",
           "dist-packages", "wheel", "lib2to3", "_distutils_hack", "idlelib", "pydoc_data", "encodings")  # fmt: skip
_SMALLEST, _LARGEST = 1500, 250_000


class Measure:
    """Token counts of a model's own tokenizer and chat template.

    Args:
        tokenizer: One of transformers, with a fast backend and a chat template.
    """

    def __init__(self, tokenizer):
        self.template = tokenizer.apply_chat_template
        self.backend = tokenizer.backend_tokenizer

    def counts(self, texts):
        """Return the tokens of each text, as a list of int."""
        return [len(e) for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def render(self, row):
        """Return a row as text."""
        return row["text"] if "text" in row else self.template(row["messages"], tokenize=False)

    def size(self, row):
        """Return the tokens of a row."""
        return self.counts([self.render(row)])[0]


class Books:
    """The books to train on.

    Args:
        path (str or PathLike): A .jsonl.gz file with a "text" in each line.
        measure (Measure): Counts tokens.
    """

    def __init__(self, path, measure):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            self.texts = [json.loads(line)["text"] for line in file]
        self.measure = measure

    def pools(self):
        """Return words and names from the books as a Pools."""
        words, names = {}, {}
        for text in self.texts:
            part = text[len(text) // 3 :][:40_000]
            for counts, pattern in ((words, r"(?<=[a-z,] )[a-z]{4,11}(?=[ ,.;])"),
                                    (names, r"(?<=[a-z,] )[A-Z][a-z]{2,10}(?=[ ,.;])")):  # fmt: skip
                for word in re.findall(pattern, part):
                    counts[word] = counts.get(word, 0) + 1
        common = set(sorted(words, key=lambda x: (-words[x], x))[:250])
        return V.Pools(sorted(x for x, n in words.items() if n > 2 and x not in common),
                       sorted(x for x, n in names.items() if n > 2 and x.lower() not in common))  # fmt: skip

    def passage(self, rng, room):
        """Return sentences of one book, each with the white space before it, of at most `room` tokens.

        A book that is too short is followed by another.
        """
        kept = []
        while room > 30:
            text = rng.choice(self.texts)
            start = rng.randrange(max(1, len(text) - 5 * room - 1500))
            pieces = _SENTENCE.findall(text[start : start + 5 * room + 1500])[1:-1]
            for piece, count in zip(pieces, self.measure.counts(pieces)):
                room -= count
                if room < 0:
                    return kept
                kept.append(piece if kept else piece.lstrip())
            kept.append("\n\n* * *\n\n")
            room -= 8
        return kept


class Source(NamedTuple):
    """A part of a Python file.

    Args:
        path (str): Relative to its folder, posix.
        segments (list of str): Whole statements of the module, one after the other.
    """

    path: str
    segments: list


def is_held_out(path):
    """Tell whether evaluation keeps a file for itself, by its posix path in its folder."""
    return zlib.crc32(path.encode()) % 4 == 0


def long_lines(text):
    """Return hashes of the lines that say something."""
    return {zlib.crc32(line.strip().encode()) for line in text.splitlines() if len(line.strip()) > 30}


class Code:
    """Python files that are installed here, without those that evaluation keeps for itself.

    Args:
        measure (Measure): Counts tokens.
        folders (list of Path, optional): Where to look. Default: the standard
          library and the packages of the Python that runs.
    """

    def __init__(self, measure, folders=None):
        self.measure = measure
        if folders is None:
            paths = sysconfig.get_paths()
            folders = [Path(paths["stdlib"]), Path(paths["purelib"])]
        self.files, self.held = {}, set()
        for number, folder in enumerate(folders):
            for path in sorted(folder.rglob("*.py")):
                name = path.relative_to(folder).as_posix()
                package = name.split("/")[0]
                if package in _COPIES or "_vendor/" in name or not _SMALLEST < path.stat().st_size < _LARGEST:
                    continue
                if is_held_out(name):
                    if number == 0:
                        self.held |= long_lines(path.read_text(encoding="utf-8", errors="replace"))
                else:  # the standard library's modules are one group as its tests are
                    group = package if number else ("tests" if "/test" in f"/{name}" else "stdlib")
                    self.files.setdefault(group, []).append((path, name))
        # A package counts by the square root of its files, else the largest two are most of it.
        self.groups = sorted(self.files)
        self.weights = [len(self.files[g]) ** 0.5 * (4 if g == "stdlib" else 1) for g in self.groups]

    def draw(self, rng):
        """Return (name, text, module) of a file that can be read and parsed, and is no copy of one held out."""
        while True:
            path, name = rng.choice(self.files[rng.choices(self.groups, self.weights)[0]])
            try:
                text = path.read_text(encoding="utf-8")
                module = ast.parse(text)
            except (ValueError, SyntaxError, RecursionError):
                continue
            lines = long_lines(text)
            if len(lines & self.held) <= 0.3 * len(lines) and "<|" not in text and len(module.body) > 2:
                return name, text, module

    def sources(self, rng, room):
        """Return a list of Source of together at most `room` tokens, and at least most of it."""
        found, taken = [], set()
        for _ in range(1000):
            if room <= 150:
                break
            name, text, module = self.draw(rng)
            if name in taken:
                continue
            taken.add(name)
            segments = split_module(text, module)
            # From the top, or from anywhere if the whole does not fit; no more is encoded than may be needed.
            begin = 0 if len(text) <= 3 * room or rng.random() < 0.4 else rng.randrange(len(segments))
            sizes = itertools.accumulate(map(len, segments[begin:]))
            segments = segments[begin : begin + 1 + sum(size <= 8 * room for size in sizes)]
            counts = self.measure.counts(segments)
            room -= 16
            kept = []
            for segment, count in zip(segments, counts):
                if count > room:
                    if not kept or room > 400:
                        segment = cut_lines(segment, room / count)
                        room -= self.measure.counts([segment])[0]
                        kept += [segment] if segment else []
                    break
                kept.append(segment)
                room -= count
            if kept:
                found.append(Source(name, kept))
        return found


def split_module(text, module):
    """Return the lines of a module, cut before each of its statements."""
    lines = text.splitlines(keepends=True)
    starts = [min([s.lineno] + [d.lineno for d in getattr(s, "decorator_list", [])]) - 1 for s in module.body]
    cuts = [0, *starts[1:], len(lines)]
    return [part for a, b in zip(cuts, cuts[1:]) if (part := "".join(lines[a:b]))]


def cut_lines(text, share):
    """Return the first lines of a text, a little fewer than a share of its characters."""
    end = text.rfind("\n", 0, int(len(text) * share * 0.95))
    return text[: end + 1]
