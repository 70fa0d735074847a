"""Rows of Python files: planted constants, definitions to look up, functions to write out."""

import ast
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kinds as K
import values as V

LONGEST = 120  # tokens of a function that is written out
READ = ["Here is some code.", "Read these files.", "I will ask about this code.", "These are the sources.",
        "This is my module.", "Have a look at this Python code."]  # fmt: skip
TYPES = {"digits": "int", "decimal": "float"}
CODE_VALUES = ["digits", "digits", "digits", "decimal", "version", "hex", "code", "word", "path", "email", "date",
               "time", "address", "made up", "colour", "phone", "words", "percent"]  # fmt: skip
# Where it may stand ("top", "class" or "line"), how it reads, what it is called when asked for.
FORMS = [
    ("top", "{N} = {q}", "{N}"),
    ("top", "{N} = {q}", "{N}"),
    ("top", "{N}: {t} = {q}", "{N}"),
    ("top", "_{n} = {q}", "_{n}"),
    ("top", "{N} = {q}  # set by hand", "{N}"),
    ("top", "{N}, {O} = {q}, None", "{N}"),
    ("top", "{N} = os.environ.get(\"{O}\", {q})", "the default of the environment variable {O}"),
    ("top", "{N} = getattr(settings, \"{O}\", {q})", "the default of the setting {O}"),
    ("top", "# {n}: {v}", "{n} in the comment"),
    ("top", "# {w} of {x}: {v} (do not change)", "the {w} of {x} in the comment"),
    ("top", "# NOTE: the {w} for {x} is {v}.", "the {w} for {x} in the note"),
    ("top", "{C} = {{\n    \"{n}\": {q},\n    \"{o}\": None,\n}}", "\"{n}\" in {C}"),
    ("top", "{C}[\"{n}\"] = {q}", "{C}[\"{n}\"]"),
    ("top", "{C}.setdefault(\"{n}\", {q})", "\"{n}\" in {C}"),
    ("top", "{C} = dict({n}={q}, {o}=True)", "{n} in {C}"),
    ("top", "def {n}({o}={q}):\n    return {o}", "the default of {o} in {n}"),
    ("top", "def {n}(*, {o}: {t} = {q}) -> None:\n    \"\"\"Set the {o}.\"\"\"", "the default of {o} in {n}"),
    ("top", "def {n}():\n    return {q}", "the return value of {n}()"),
    ("top", "{n} = lambda {o}={q}: {o}", "the default of {o} in {n}"),
    ("top", "class {D}:\n    {n} = {q}", "{D}.{n}"),
    ("top", "@dataclass\nclass {D}:\n    {n}: {t} = {q}\n    {o}: bool = False", "the default of {n} in {D}"),
    ("top", "class {D}(NamedTuple):\n    {n}: {t} = {q}", "the default of {n} in {D}"),
    ("top", "class {D}(Enum):\n    {O} = None\n    {N} = {q}", "{D}.{N}"),
    ("top", "parser.add_argument(\"--{n}\", default={q})", "the default of --{n}"),
    ("top", "assert {n} == {q}", "{n} in the assertion"),
    ("top", "if {n} == {q}:\n    {o} = True", "the value that {n} is compared with"),
    ("top", "register({q}, name=\"{n}\")", "what is registered as \"{n}\""),
    ("class", "{n} = {q}", "the class attribute {n}"),
    ("class", "{N}: {t} = {q}", "{N}"),
    ("class", "# {n} is {v}", "{n} in the comment"),
    ("line", "# {n}: {v}", "{n} in the comment"),
    ("line", "# see {x}, {w} {v}", "the {w} of {x} in the comment"),
    ("line", "{n} = {q}", "{n}"),
    ("line", "# {w} for {x} is {v}", "the {w} for {x} in the comment"),
]  # fmt: skip
ASK = ["What is the value of {k}?", "What is {k}?", "What is {k} set to?", "{k}?", "Which value does {k} have?",
       "Find {k} in the code.", "To what is {k} set?", "I need {k}.", "Look up {k}.",
       "What does the code have for {k}?",
       "Tell me {k}.", "State {k}.", "What value was chosen for {k}?", "And {k}?", "How is {k} defined?"]  # fmt: skip
PARAMETERS = ["What are the parameters of {f}?", "Which parameters does {f} take?", "List the arguments of {f}.",
              "What is the signature of {f}?", "How is {f} called? Give its parameters."]  # fmt: skip
DEFAULT = ["What is the default value of {p} in {f}?", "Which default has the parameter {p} of {f}?",
           "If {p} is not given, what does {f} use?"]  # fmt: skip
DOC = ["What does the docstring of {f} say first?", "Give the first line of {f}'s docstring.",
       "What is {f} for, as its docstring says?", "How is {f} documented? The first line, please."]  # fmt: skip
RETURN = [
    "What does {f} return? Quote the statement.",
    "Which line does `return` in {f} have?",
    "Quote the return statement of {f}.",
]
WRITE = ["Write the function {f} as it stands in the file.", "Show me {f}.", "Quote the code of {f}.",
         "Print the definition of {f}.",
         "Copy {f} from the file."]  # fmt: skip
GO_ON = [
    "The code has this line:\n{x}\nWhich line comes next?",
    "What comes after this line?\n{x}",
    "Continue after:\n{x}",
]
BASE = ["Which class does {f} inherit from?", "What are the bases of {f}?", "From what is {f} derived?"]


def names(rng, pools):
    """Return names for a template of FORMS: two variables, a table, a class, two plain words."""

    def word():
        while True:
            text = re.sub(r"[^a-z]", "", V.make_value(rng, rng.choice(("word", "made up", "colour")), pools).lower())
            if len(text) > 2 and not V.held_out(text):
                return text

    def joined():
        return "_".join(word() for _ in range(rng.choice((1, 2, 2, 3))))

    n, o = joined(), joined()
    if rng.random() < 0.15:
        n = word() + word().capitalize()
    table = f"{word()}_{word()}".upper() if rng.random() < 0.6 else word() + "s"
    return {"n": n, "o": o, "N": n.upper(), "O": o.upper(), "C": table,
            "D": word().capitalize() + word().capitalize(), "w": word(), "x": f"{word()} {word()}"}  # fmt: skip


def plant(rng, pools):
    """Return (place, code, name to ask for, value) of one constant."""
    place, form, asked = rng.choice(FORMS)
    kind = rng.choice(CODE_VALUES)
    value = V.make_value(rng, kind, pools)
    while "\\" in value or '"' in value:
        value = V.make_value(rng, kind, pools)
    if kind == "digits" or (kind == "decimal" and "e" not in value):
        quoted = value
    else:
        quoted = f'"{value}"' if rng.random() < 0.7 else f"'{value}'"
    fills = {**names(rng, pools), "v": value, "q": quoted, "t": TYPES.get(kind, "str")}
    return place, form.format(**fills), asked.format(**fills), value


def put(rng, sources, place, code):
    """Put code at a place of its kind into one of the sources; return whether there was one."""
    source = sources[min(int(rng.random() * len(sources)), len(sources) - 1)]
    if place == "top":
        at = rng.randint(min(1, len(source.segments)), len(source.segments))
        source.segments.insert(at, f"{code}\n" if rng.random() < 0.5 else f"\n{code}\n")
        return True
    order = [i for i, s in enumerate(source.segments) if s.lstrip().startswith(("class ", "def ", "@"))]
    for number in rng.sample(order, len(order)):
        lines = source.segments[number].split("\n")
        inside = r"    (def |@)" if place == "class" else r"\s{4,}(if |for |return |self\.\w+ = |while |raise |try:)"
        # Not within a string or an expression over several lines: what stands before must parse.
        spots = [i for i, line in enumerate(lines) if i and re.match(inside, line) and ends_statement(lines[:i])]
        if place == "class":
            spots = [i for i in spots if lines[0].startswith("class ") and not lines[i - 1].startswith("    @")]
        if spots:
            spot = rng.choice(spots)
            indent = re.match(r"\s*", lines[spot]).group()
            lines[spot:spot] = [indent + code]
            source.segments[number] = "\n".join(lines)
            return True
    return False


def ends_statement(lines):
    """Tell from the brackets and quotes of lines whether a statement may begin after them."""
    text = "\n".join(lines)
    even = all(text.count(q) % 2 == 0 for q in ('"""', "'''"))
    return even and all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}")) and not text.endswith("\\")


def constant_turns(rng, sources, n, pools):
    """Plant `n` constants and return a turn about each."""
    turns, asked = [], set()
    while len(turns) < n:
        place, code, name, value = plant(rng, pools)
        if name in asked or not put(rng, sources, place, code):
            continue
        asked.add(name)
        begun = name if name.replace("_", "").isalnum() else name[0].upper() + name[1:]
        answer = rng.choice((value, value, value, f"{begun} is {value}.", f"It is {value}.", f"`{value}`"))
        turns.append((rng.choice(ASK).format(k=name), answer, [value]))
    return turns


def definitions(sources):
    """Return (name, segment of source, node) of the functions and classes, those of one name left out."""
    found = {}
    for source in sources:
        for segment in source.segments:
            try:
                module = ast.parse(segment)
            except (SyntaxError, ValueError, RecursionError):
                continue  # cut
            for outer in module.body:
                for node in [outer, *(outer.body if isinstance(outer, ast.ClassDef) else [])]:
                    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                        found.setdefault(node.name, []).append((segment, node))
    return [(name, *items[0]) for name, items in found.items() if len(items) == 1 and not V.held_out(name)]


def definition_turn(rng, name, segment, node, measure):
    """Return one turn about a definition, or None if there is nothing to ask."""
    if isinstance(node, ast.ClassDef):
        bases = [ast.get_source_segment(segment, base) for base in node.bases]
        if not bases or rng.random() < 0.3:
            return doc_turn(rng, name, segment, node)
        return rng.choice(BASE).format(f=name), ", ".join(bases), bases
    kind = rng.choices(("write", "parameters", "default", "doc", "return"), (0.35, 0.2, 0.2, 0.13, 0.12))[0]
    if kind == "write":
        lines = segment.split("\n")[node.lineno - 1 : node.end_lineno]
        body = "\n".join(lines).strip()
        coded = measure.backend.encode(body, add_special_tokens=False)
        if len(coded) > LONGEST:
            body = body[: coded.offsets[LONGEST][0]].rsplit("\n", 1)[0].rstrip()
        return (rng.choice(WRITE).format(f=name), body, [body]) if "\n" in body else None
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    arguments = [a for a in arguments if a.arg not in ("self", "cls")]
    if kind == "parameters" and arguments:
        listed = [a.arg for a in arguments]
        return rng.choice(PARAMETERS).format(f=name), ", ".join(listed), listed
    if kind == "default":
        positional = node.args.posonlyargs + node.args.args
        pairs = list(zip(positional[len(positional) - len(node.args.defaults) :], node.args.defaults))
        pairs += [(a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults) if d is not None]
        if pairs:
            argument, default = rng.choice(pairs)
            value = ast.get_source_segment(segment, default)
            return rng.choice(DEFAULT).format(p=argument.arg, f=name), value, [value]
    if kind == "return":
        returns = [n for n in ast.walk(node) if isinstance(n, ast.Return) and n.value]
        if len(returns) == 1:
            text = ast.get_source_segment(segment, returns[0])
            return (rng.choice(RETURN).format(f=name), text, [text]) if len(text) < 300 else None
    return doc_turn(rng, name, segment, node)


def doc_turn(rng, name, segment, node):
    """Return a turn about the first line of a docstring, or None."""
    first = (ast.get_docstring(node) or "").strip().split("\n")[0]
    if 12 < len(first) < 200 and first in segment:
        return rng.choice(DOC).format(f=name), first, [first]
    return None


def line_turn(rng, sources):
    """Return a turn that asks which line follows another, or None if that line comes twice."""
    source = rng.choice(sources)
    lines = [line for line in "".join(source.segments).split("\n") if line.strip()]
    every = [line.strip() for s in sources for line in "".join(s.segments).split("\n")]
    at = rng.randrange(max(1, len(lines) - 1))
    if len(lines) < 3 or not 20 < len(lines[at]) < 160 or not 8 < len(lines[at + 1]) < 160:
        return None
    if every.count(lines[at].strip()) != 1:
        return None
    answer = lines[at + 1].strip()
    return rng.choice(GO_ON).format(x=lines[at].strip()), answer, [answer]


def code_row(rng, length, maker):
    """Python files with constants planted in them, asked for with definitions of the files."""
    system, _ = K.system_prompt(rng)
    n = rng.randint(4, 10)
    planted = rng.randint(1, n) if rng.random() < 0.85 else 0
    room = length - maker.template_size - 32 * planted - 100 * (n - planted) - 60
    sources, turns = maker.code.sources(rng, room), []
    if not sources:
        return None
    known = definitions(sources)
    for _ in range(4 * (n - planted)):
        if len(turns) == n - planted or not known:
            break
        name, segment, node = known[rng.randrange(len(known))]
        if rng.random() < 0.12:
            turn = line_turn(rng, sources)
        else:
            turn = definition_turn(rng, name, segment, node, maker.measure)
        if turn and turn[0] not in [t[0] for t in turns]:
            turns.append(turn)
    turns += constant_turns(rng, sources, planted, maker.pools)
    # What the answers left free is filled with another file.
    used = sum(sum(maker.measure.counts(s.segments)) + 12 for s in sources)
    more = maker.code.sources(rng, maker.room(length, turns, system or "") - used - 60)
    sources += [s for s in more if s.path not in [o.path for o in sources]]
    marked = rng.choice(("# {}\n{}", "# file: {}\n{}", "### {} ###\n{}", "```python\n# {}\n{}\n```",
                         "{}\n```\n{}\n```"))  # fmt: skip
    rng.shuffle(sources)
    document = "\n\n".join(marked.format(s.path, "".join(s.segments).strip("\n")) for s in sources)
    # A function that a planted line now stands in is no longer as it was.
    turns = [t for t in turns if all(v in document for v in t[2])]
    rng.shuffle(turns)
    return (K.converse(rng, document, turns, system, READ), turns) if turns else None
