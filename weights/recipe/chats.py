"""Conversations to train on, as text: needles with their questions, word problems, small talk."""

import frames

from mlx_dsa.tasks import facts as F
from mlx_dsa.tasks import problems as P
from mlx_dsa.tasks import wordlists as w

# To train on: half of the phrasings from the lists, half composed.
SENTENCES, QUESTIONS = (
    listed["train"] * (len(composed) // len(listed["train"])) + composed
    for listed, composed in zip((w.SENTENCES, w.QUESTIONS), frames.compose())
)

HELPFUL = ["You are a helpful assistant.", "You are a careful reader.", "Answer the user's questions.",
           "You answer questions about texts."]  # fmt: skip
BRIEF_SYSTEM = ["Answer with the value only.", "Answer briefly, with the value alone.", "Give short answers.",
                "You are a helpful assistant. Answer with the value only."]  # fmt: skip
FULL_SYSTEM = ["Answer in full sentences.", "You are a helpful assistant. Answer in a full sentence."]
READ = ["Please read this text. I will ask about it later.", "Read the following text.", "Here is a text.",
        "Keep this text in mind.", "I will ask you questions about this text."]  # fmt: skip
READY = ["I have read the text. What would you like to know?", "I have read it. What is your question?"]
ASIDES = ["Thank you.", "Please.", "I need it for my notes.", "I would be grateful.", "It matters to me.", "Well?",
          "I have forgotten it.", "Do you see it?", "Be so kind.", "That is all I want to know.", "Take your time.",
          "We were just talking about it.", "My brother told me to ask.", "It must be in the text.", "Is that clear?",
          "I lost my notes.", "You must have read it.", "What do you say?", "Can you do that?"]  # fmt: skip
UNNAMED = ["Which {a} does the text mention?", "Which {a} is named in the text?", "What {a} appears in the text?",
           "There is a {a} in the text. Which?", "Which {a} did you read about?"]  # fmt: skip
SMALL_TALK = [
    (["Hello!", "Hi!", "Hello", "Hi", "Hi there.", "Hey!", "Hello there!", "Good day."],
     "Hello! How can I help you?"),
    (["Good morning!", "Good morning."], "Good morning! How can I help you?"),
    (["Good evening!", "Good evening."], "Good evening! How can I help you?"),
    (["How are you?", "How are you today?", "How do you do?", "Hello, how are you?", "How is it going?"],
     "I am well, thank you. How can I help you?"),
    (["What is your name?", "Who are you?", "What are you?", "Tell me who you are.", "What should I call you?"],
     "I am a very small language model. You can ask me about a text or give me a simple word problem."),
    (["What can you do?", "How can you help me?", "What are you able to do?", "Help!", "What do you do?"],
     "I can find facts in a long text and solve simple word problems."),
    (["Thank you!", "Thanks.", "Thank you.", "Thanks a lot!", "Thank you very much."], "You are welcome!"),
    (["Goodbye!", "Bye.", "Good night.", "See you later."], "Goodbye! It was nice to talk with you."),
    (["Are you a person?", "Are you human?", "Are you a robot?", "Are you alive?"],
     "No, I am a very small language model."),
    (["How old are you?", "When were you born?", "Where do you live?"],
     "I am a computer program, so I have neither an age nor a home."),
    (["What have you read?", "What do you know?", "Where did you learn English?", "Who made you?"],
     "I learned from old books that are in the public domain."),
    (["Can you read a long text?", "May I ask about a document?", "Can I give you a text?"],
     "Yes. Send me the text with a question about a fact in it."),
    (["Yes.", "No.", "Okay.", "I see."], "Is there anything that you would like to ask?"),
]  # fmt: skip


def turn(role, text):
    """Return one turn, exactly as the chat template writes it."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def chat(pairs, system=None):
    """Return a conversation of (user, assistant) pairs as text."""
    head = turn("system", system) if system else ""
    return head + "".join(turn("user", u) + turn("assistant", a) for u, a in pairs)


def needle_task(rng, split, room, pools, spec=None):
    """Draw the sentences to hide and the questions about them.

    Args:
        room (int): tokens there are; few sentences go into little room.
        spec (dict): fixes what evaluation fixes: facts, value, phrasing, task, turns.

    Returns:
        tuple: sentences, and a list of (question, answer, short answer, values).
    """
    spec = spec or {}
    value = spec.get("value") or rng.choice(("digits", "digits", "word", "word", "word", "mixed"))
    phrasing = spec.get("phrasing", "train")
    most = max(1, min(20, room // 60))
    n = spec.get("facts") or min(most, rng.choice((1, 1, 1, 2, 3, 4, 4, 4, 4, 5, 6, 8, 10, 12, 16)))
    task = spec.get("task") or rng.choices(("single", "values", "query"), (0.78, 0.1, 0.12))[0]
    templates = (SENTENCES, QUESTIONS) if phrasing == "train" else None
    facts = F.make_facts(rng, n, value=value, entities=split, phrasing=phrasing, templates=templates, **pools)
    sentences = [f.sentence for f in facts]
    turns = spec.get("turns") or min(n, rng.choice((1, 1, 2, 2, 3, 4) if room < 1500 else (1, 2, 3, 4, 6, 8, 10)))
    asked = [(f.question, f.answer, f.short_answer, (f.value,)) for f in rng.sample(facts, turns)]
    if n == 1 and not spec and rng.random() < 0.3:  # nothing else to ask about: the entity goes unnamed
        f = facts[0]
        asked = [(rng.choice(UNNAMED).format(a=f.attribute), f"The {f.attribute} is {f.value}.", f.value, (f.value,))]
    if task == "values" and room > 250:
        count = rng.randint(2, 4)
        m = F.make_multi_value(rng, count, value=value, entities=split, **pools)
        # The values are named in the order of the text, so their sentences keep their order.
        slots = sorted(rng.sample(range(len(sentences) + count), count))
        for slot, sentence in zip(slots, m.sentences):
            sentences.insert(slot, sentence)
        asked.insert(rng.randrange(len(asked) + 1), (m.question, m.answer, m.short_answer, m.values))
        asked = asked[: max(turns, 1)] if spec == {} else [(m.question, m.answer, m.short_answer, m.values)]
    if task == "query" and n >= 2:
        m = F.make_multi_query(rng, facts, 3 if n > 3 and rng.random() < 0.3 else 2)
        asked = [(m.question, m.answer, m.short_answer, m.values)] + asked[: turns - 1]
        rng.shuffle(asked)
        if spec:
            asked = [(m.question, m.answer, m.short_answer, m.values)]
    return sentences, asked


def key_value_task(rng, split, room, pools, spec=None):
    """Draw a list of keys with values, and questions about one to three of them."""
    spec = spec or {}
    most = max(2, min(160, room // 16))
    n = spec.get("facts") or rng.randint(2, most)
    task = F.make_key_value(rng, n, value=spec.get("value") or rng.choice(("digits", "word", "mixed")),
                            entities=split, **pools)  # fmt: skip
    return task.sentences[0], [(task.question, task.answer, task.short_answer, task.values)]


def ask(rng, question, answer, short, brief, plain=False, asides=None):
    """Vary a question and choose the answer's form; return (question, answer).

    `asides` are sentences that have nothing to do with it: some questions get one before or after.
    """
    if plain:
        return question, short if brief else answer
    if rng.random() < 0.25:
        aside = rng.choice(asides) if asides and rng.random() < 0.5 else rng.choice(ASIDES)
        return (f"{question} {aside}" if rng.random() < 0.6 else f"{aside} {question}"), short if brief else answer
    lead = rng.choice(w.ASK_LEADS)
    if lead.endswith(", "):
        first = question.split()[0]
        if first in ("What", "Tell", "Can", "Please", "Do", "Could", "Find", "Which", "State", "Look", "Name", "Say"):
            question = question[0].lower() + question[1:]
    question = lead + question
    chance = rng.random()
    if chance < 0.22:
        return question + rng.choice(w.BRIEF), short
    if chance < 0.3:
        return question + rng.choice(w.FULL), answer
    return question, short if brief else answer


def system_prompt(rng):
    """Return (system prompt or None, whether answers are brief)."""
    chance = rng.random()
    if chance < 0.75:
        return None, False
    if chance < 0.88:
        return rng.choice(HELPFUL), False
    if chance < 0.96:
        return rng.choice(BRIEF_SYSTEM), True
    return rng.choice(FULL_SYSTEM), False


def problem_chats(rng, split="train", pools=None):
    """Return a conversation about word problems, or a page of them, as (text, answers)."""
    chance, pools = rng.random(), pools or {}
    if chance < 0.6:
        items = [P.make_problem(rng, split, **pools) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        system = rng.choice(HELPFUL) if rng.random() < 0.1 else None
        return chat([(p.question, p.answer) for p in items], system), [p.answer for p in items]
    items = [P.make_problem(rng, split, **pools) for _ in range(rng.randint(2, 9))]
    ask, reply = rng.choice((("Question: ", "Answer: "), ("Q: ", "A: "), ("Question: ", "Answer: ")))
    shots = [f"{ask}{p.question}\n{reply}{p.answer}" for p in items]
    if chance < 0.85:
        user = "\n\n".join(shots[:-1] + [f"{ask}{items[-1].question}\n{reply.strip()}"])
        return chat([(user, items[-1].answer)]), [p.answer for p in items]
    return "\n\n".join(shots) + "\n\n", [p.answer for p in items]


def small_talk(rng, story=None):
    """Return a short conversation without a document as (text, answers); `story` is a passage to tell."""
    if story:
        asked = rng.choice(("Tell me a story.", "Write something.", "Tell me something.", "Write a paragraph."))
        return chat([(asked, story)]), [story]
    pairs = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.3:
            a, b = rng.randint(1, 50), rng.randint(1, 50)
            mark, value = rng.choice((("+", a + b), ("-", a - b), ("*", a * b))) if a >= b else ("+", a + b)
            if mark == "*" and a * b > 150:
                mark, value = "+", a + b
            pairs.append((rng.choice((f"What is {a} {mark} {b}?", f"{a} {mark} {b} = ?")), f"{a} {mark} {b} = {value}"))
        else:
            asks, reply = rng.choice(SMALL_TALK)
            pairs.append((rng.choice(asks), reply))
    system = rng.choice(HELPFUL) if rng.random() < 0.2 else None
    return chat(pairs, system), [a for _, a in pairs]
