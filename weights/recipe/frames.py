"""Phrasings for training alone, composed of parts, beside the lists in mlx_dsa/tasks/wordlists.py.

A list of phrasings, however long, is learnt as a list. What is composed of many verbs, places and
openings teaches to look for the entity and the value, whatever stands around them. The words that
mark the held-out phrasings ("scribbled", "next to", "confirmed", "regarding", "remind", "my friend",
"if someone asked") are used nowhere here.
"""

import random

WHO = """Somebody|Someone|The clerk|A child|My uncle|The owner|A stranger|The porter|We|He|She|The secretary|Her father|
The captain|An old woman|The printer|His sister|The guard|One of them|The teacher|A friend of the family""".replace(
    "\n", ""
).split("|")
PUT = """written noted painted carved pencilled stamped printed typed marked chalked engraved entered copied set placed put
inked drawn burnt sewn penned left added traced recorded""".split()
NEAR = """beside|under|above|below|opposite|after|before|against|close to|right under|in front of|over|along with|near|
on the page with|at|for|directly after|just before""".replace("\n", "").split("|")
DOCUMENT = """letter note book paper record message telegram page sign list diary contract card notice map
catalogue journal report ledger inscription""".split()
SAID = "said stated showed explained mentioned claimed proved declared added revealed admitted repeated told".split()
HELD = """had|took|got|would have|would take|used|would use|received|had chosen|was to have|wanted|was content with|
was given|had picked|meant to use|stood by|went back to|asked for|paid for|had been promised""".replace("\n", "").split(
    "|"
)
BE = """is|was|would be|had become|should be|has long been|will remain|must have been|used to be|may be given as|
was no other than|could only be|had to be""".replace("\n", "").split("|")
ASKED = (
    """wanted|asked for|asked about|inquired about|called for|looked for|had to give|needed|demanded|came for""".split(
        "|"
    )
)
OPEN = """Whoever needs|Anyone who wants|Those who look for|Should you need|In case you need|Should anybody want|
Before you look for|When you need|To get|If you ever lose|If they demand|For those who want""".replace("\n", "").split(
    "|"
)
TELL = "take|try|type|write|use|give them|answer|call out|read out|enter|it is|there is|put|show".split("|")
BY_KEY = """{N} {np} one could see {v}.|{N} {np} stood {v}.|{v} stood {n} {np}.|{W} had {p} {v} {n} {np}.|{W} had {p} {v} {n} {np}.|
{v} had been {p} {n} {np}.|{N} {np} there was {v}, {p} in red.|{N} {np} {w} had {p} {v}.|{W} found {v} {p} {n} {np}.|
In the {d} {v} was {p} {n} {np}.|The {d} {s} that {np} {b} {v}.|A {d} {s}: {np} {b} {v}.|{W} {s} that {np} {b} {v}.|
{NP} {b} {v}, the {d} {s}.|{NP} {b} {v}.|{o} {np}, {t} {v}.|{W} {k} {np} and got {v}.|When {w} {k} {np}, they were told {v}.|
{W} {k} {np}; it {b} {v}.|{v}, {w} {s}, {b} {np}.|For {np}, {t} {v}.|As {np}, {w} {h} {v}.|{v} was what {w} {h} for {np}.|
No other than {v} {b} {np}.|{NP} {b}, so the {d} {s}, {v}.|{v} is what you find {n} {np}.|The {d} with {np} in it {s} {v}.|
About {np} the {d} {s} only this: {v}.|They changed {np} to {v}.|{W} {s} {v} whenever they {k} {np}.""".replace(
    "\n", ""
).split("|")
BY_ENTITY = """{N} the name of {e} you read the {a} {v}.|{N} {e} in the {d} stood {v}, the {a}.|{E} {h} {v} for the {a}.|
The {d} {s} that {e} {h} {v} as the {a}.|{W} {s} that {e} {h} the {a} {v}.|{E} {h} only one {a}: {v}.|
There is a {a} that {e} {h}: {v}.|{E} {h}, as the {d} {s}, the {a} {v}.|The {a} that {e} {h} {b} {v}.|
Of all that {e} {h}, the {a} was {v}.|{W} {k} {e}, and the {a} {b} {v}.|When {w} {k} {e}, the {a} {b} {v}.|
{v} was the only {a} that {e} {h}.|{E}, so the {d} {s}, {h} the {a} {v}.|In the {d} of {e}, {v} was {p} as the {a}.|
{W} had {p} {v} as the {a} when {e} came.|The {a} {v} was {p} in the {d} for {e}.|{E} would not part with {v}, the {a}.|
{W} gave {e} {v} for a {a}.|{E} came with the {d}, and on it the {a} {v}.""".replace("\n", "").split("|")
TOPIC = """About {e}|Concerning {e}|As regards {e}|On {e}|With respect to {e}|Touching {e}|As for {e}|Back to {e}|
To return to {e}|Turning to {e}|Take {e}|Now for {e}|On the subject of {e}|Consider {e}|Another word on {e}|
Let us come to {e}|You read of {e}|There is {e} in the text|The text speaks of {e}|{E} occurs in the text""".replace(
    "\n", ""
).split("|")
MARK = [": ", ": ", ", ", " - ", "; ", ". ", "... "]
ABOUT = """what was the {a}?|what is the {a}?|what was the {a} again?|which {a} did it say?|tell me the {a}.|the {a}, please.|
do you have the {a}?|name the {a}.|is there a {a}?|what {a} do you find?|which is the {a}?|give the {a}.|what would the {a} be?|
I need the {a}.|can you see the {a}?|how does the {a} read?|I am asking for the {a}.""".replace("\n", "").split("|")
PERSON = """My wife|My boss|Our neighbour|The doctor|A visitor|My cousin|The office|Her lawyer|The police|Everyone here|
A customer|My teacher|The caller|This gentleman|Somebody|Our guest""".replace("\n", "").split("|")
WANTS = """wants|needs|would like|asks for|has to know|must have|is waiting for|would like to hear|insists on|cannot find|
has lost|keeps asking for|would pay for|wonders about|wishes to learn|is curious about""".replace("\n", "").split("|")
TAIL = """What is it?|Do you have it?|Could you say it?|What shall I say?|What do I answer?|Can you see it?|Is it there?|
What was it again?|Please say it.|Where is it? What is it?|Which is it?||| Tell them.|Could you look?""".replace(
    "\n", ""
).split("|")
LOST = """I lost|I never caught|I did not catch|I overlooked|I missed|I must have missed|We mislaid|I cannot think of|
I no longer have|Nobody told me|I have to fill in|I did not write down|It escapes me,""".replace("\n", "").split("|")
NEED = """What must I {x} for {np}?|What do I {x} for {np}?|What shall we {x} under {np}?|What should one {x} as {np}?|
What would you {x} for {np}?|What have I to {x} where it asks for {np}?|Which answer do I {x} for {np}?|
Help me {x} {np}.|What can I {x} if they want {np}?|For {np}, what do I {x}?|Suppose they want {np}: what do you {x}?|
Were I to ask for {np}, what would you {x}?|A person needs {np}; what will you {x}?|You are asked for {np}. What do you {x}?|
They want {np} and you {x} what?|Now {x} {np}.|Kindly {x} {np}.|Would you {x} {np}?|Try to {x} {np}.""".replace(
    "\n", ""
).split("|")
DO = """type in|put|enter|tell them|say|answer|note|use|fill in|read out|state|give|show them|call out|send them|
copy|print|key in|mark|set down""".replace("\n", "").split("|")


def lower(text):
    return text if text.split()[0] in ("I",) else text[:1].lower() + text[1:]


def sentence(rng):
    """Return a template for a sentence that tells a fact, in the manner of wordlists.SENTENCES."""
    near, who = rng.choice(NEAR), rng.choice(WHO)
    text = rng.choice(BY_KEY if rng.random() < 0.6 else BY_ENTITY)
    fills = {
        "N": near[:1].upper() + near[1:], "n": near, "W": who, "w": lower(who), "p": rng.choice(PUT),
        "d": rng.choice(DOCUMENT), "s": rng.choice(SAID), "b": rng.choice(BE), "o": rng.choice(OPEN),
        "t": rng.choice(TELL), "k": rng.choice(ASKED), "h": rng.choice(HELD),
    }  # fmt: skip
    for name, fill in fills.items():
        text = text.replace("{" + name + "}", fill)
    return text.replace("{v}", "{V}", 1) if text.startswith("{v}") else text


def question(rng):
    """Return a template for a question, in the manner of wordlists.QUESTIONS."""
    chance = rng.random()
    if chance < 0.4:
        mark, about = rng.choice(MARK), rng.choice(ABOUT)
        if mark in (". ", "... "):
            about = about[:1].upper() + about[1:]
        return rng.choice(TOPIC) + mark + about
    if chance < 0.55:
        return f"{rng.choice(PERSON)} {rng.choice(WANTS)} {{np}}. {rng.choice(TAIL)}".strip()
    if chance < 0.65:
        return f"{rng.choice(LOST)} {{np}}{rng.choice(['; ', '. ', ': '])}{lower(rng.choice(TAIL[:8]))}"
    return rng.choice(NEED).replace("{x}", rng.choice(DO))


def compose(n_sentences=4000, n_questions=2000, seed=0):
    """Return lists of sentence and of question templates without repeats, the same for a seed."""
    rng = random.Random(seed)
    return (
        list(dict.fromkeys(sentence(rng) for _ in range(n_sentences))),
        list(dict.fromkeys(question(rng) for _ in range(n_questions))),
    )
