"""Values of many kinds, and what may be said to have them."""

from mlx_dsa.tasks import facts as F
from mlx_dsa.tasks import problems as P
from mlx_dsa.tasks import wordlists as w

HELD = {item.lower() for items in w.PARTS["heldout"].values() for item in items} | {
    word.lower() for word in P.held_out_words()
}
TRAIN = w.PARTS["train"]
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
MONTHS = """January February March April May June July August September October November December""".split()
COLOURS = """ochre teal mauve beige maroon navy lime magenta cyan cream charcoal khaki burgundy lemon rust
sage plum slate peach mint sand brick wine coral sky-blue pea-green off-white""".split()
UNITS = """km m cm mm miles feet inches yards kg grams tons pounds ounces litres gallons pints acres hectares
degrees volts watts amps bars hours minutes seconds days weeks knots lux MB GB kHz rpm""".split()
COINS = "dollars francs crowns pounds shillings guilders marks roubles pesos yen pence thalers".split()
STATES = """yes no enabled disabled open closed paid unpaid pending approved refused overdue locked unlocked
active retired lost found ready broken married single vacant occupied sold reserved true false""".split()
ENDINGS = "txt csv log md dat pdf png json xml zip bak".split()
FOLDERS = "srv home data var backup archive users docs projects mnt opt shared tmp work old".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ONES = "one two three four five six seven eight nine".split()
WHERE = "behind under beside above near beyond between inside outside below across".split()
PLANTS = "oak ash elm beech birch larch yew hawthorn poplar alder spruce".split()


class Pools:
    """More words and names than the lists have, from the training books.

    Args:
        words, names (list of str): Without any that evaluation holds out.
    """

    def __init__(self, words=(), names=()):
        self.words = [x for x in words if x.lower() not in HELD] or TRAIN["words"]
        self.names = [x for x in names if x.lower() not in HELD] or TRAIN["first"]


def _word(rng, pools):
    chance = rng.random()
    if chance < 0.2:
        return F.made_up(rng)
    return rng.choice(pools.words if chance < 0.7 else TRAIN["words"])


def _name(rng, pools):
    chance = rng.random()
    if chance < 0.2:
        return F.made_up(rng).capitalize()
    return rng.choice(pools.names if chance < 0.7 else TRAIN["first"] + TRAIN["last"])


def _digits(rng, low=2, high=9):
    n = rng.randint(low, high)
    return str(rng.randint(10 ** (n - 1), 10**n - 1))


def _grouped(rng):
    return f"{rng.randint(1100, 9_900_000):,}"


def _price(rng):
    whole, cents = rng.randint(1, 4000), f"{rng.randint(0, 99):02d}"
    return rng.choice((f"${whole}.{cents}", f"{whole}.{cents} {rng.choice(COINS)}", f"€{whole}",
                       f"£{whole}.{cents}", f"{whole} {rng.choice(COINS)}", f"${whole:,}"))  # fmt: skip


def _date(rng):
    d, m, y = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1700, 2099)
    name = MONTHS[m - 1]
    return rng.choice((f"{d} {name} {y}", f"{name} {d}, {y}", f"{y}-{m:02d}-{d:02d}", f"{d:02d}/{m:02d}/{y}",
                       f"{name} {y}", f"{d} {name}", f"{d}.{m}.{y}", f"{name} {d}"))  # fmt: skip


def _time(rng):
    h, m = rng.randint(0, 23), rng.randint(0, 59)
    words = f"{rng.choice(('half', 'quarter', 'ten', 'twenty'))} past {rng.choice(ONES)}"
    return rng.choice((f"{h}:{m:02d}", f"{h:02d}:{m:02d}:{rng.randint(0, 59):02d}", words,
                       f"{h % 12 + 1}:{m:02d} {rng.choice(('a.m.', 'p.m.'))}"))  # fmt: skip


def _phone(rng):
    a, b, c = rng.randint(200, 999), rng.randint(100, 999), rng.randint(1000, 9999)
    return rng.choice((f"{a}-{b}-{c}", f"({a}) {b}-{c}", f"+{rng.randint(20, 99)} {a} {b} {c}", f"0{a}/{b}{c}",
                       f"555-{c}", f"{a} {c}"))  # fmt: skip


def _version(rng):
    a, b, c = rng.randint(0, 14), rng.randint(0, 40), rng.randint(0, 99)
    return rng.choice((f"{a}.{b}.{c}", f"v{a}.{b}", f"v{a}.{b}.{c}", f"{a}.{b}-rc{c % 9}", f"{a}.{b}b{c}"))


def _hex(rng):
    n = rng.choice((4, 6, 8, 12))
    text = "".join(rng.choice("0123456789abcdef") for _ in range(n))
    return rng.choice((text, f"0x{text}", f"#{text[:6].ljust(6, '0')}", text.upper()))


def _code(rng):
    letters = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 4)))
    number = _digits(rng, 2, 5)
    mixed = "".join(rng.choice(LETTERS + "23456789") for _ in range(rng.randint(5, 10)))
    return rng.choice((f"{letters}-{number}", f"{letters}{number}", mixed, f"{number}{letters}",
                       f"{letters}/{number}", f"{mixed[:3]}-{mixed[3:]}-{number}", mixed.lower()))  # fmt: skip


def _percent(rng):
    return rng.choice((f"{rng.randint(1, 99)}%", f"{rng.uniform(0, 99):.1f}%", f"{rng.randint(2, 98)} per cent"))


def _measure(rng):
    number = rng.choice((str(rng.randint(2, 900)), f"{rng.uniform(0.1, 90):.1f}", f"{rng.uniform(0.1, 9):.2f}"))
    return f"{number} {rng.choice(UNITS)}"


def _phrase(rng, pools):
    a, b, c = (_word(rng, pools) for _ in range(3))
    return rng.choice((f"{rng.choice(WHERE)} the {a} {b}", f"a {a} of {b}", f"the {a} and the {b}", f"no {a} before {b}",
                       f"{a}, {b} and {c}", f"never {a} twice", f"{a} for every {b}", f"half a {a} with {b}",
                       f"where the {a} meets the {b}", f"more {a} than {b}"))  # fmt: skip


def _email(rng, pools):
    who, where = _name(rng, pools).lower(), _word(rng, pools).replace(" ", "")
    return rng.choice((f"{who}@{where}.example", f"{who}.{_name(rng, pools).lower()}@{where}.example",
                       f"{who}{rng.randint(2, 99)}@{where}.test", f"@{who}_{where}"))  # fmt: skip


def _path(rng, pools):
    a, b = _word(rng, pools), _word(rng, pools)
    end = rng.choice(ENDINGS)
    return rng.choice((f"/{rng.choice(FOLDERS)}/{a}/{b}.{end}", f"{a}/{b}.{end}", f"~/{rng.choice(FOLDERS)}/{a}_{b}",
                       f"C:\\{rng.choice(FOLDERS)}\\{a}.{end}", f"{a}-{b}.{end}"))  # fmt: skip


def _number_word(rng):
    n = rng.choice((f"{rng.choice(TENS)}-{rng.choice(ONES)}", f"{rng.choice(ONES)} hundred",
                    f"{rng.choice(ONES)} thousand", f"{rng.choice(ONES)} dozen"))  # fmt: skip
    return n if rng.random() < 0.7 else f"{n} and {rng.choice(ONES)}"


def _place(rng, pools):
    name = _name(rng, pools) if rng.random() < 0.5 else rng.choice(TRAIN["place"])
    return rng.choice((name, name, f"{rng.randint(2, 240)} {name} Street", f"Port {name}", f"{name}-on-the-Hill",
                       f"Lake {name}", f"{name} Road"))  # fmt: skip


def _decimal(rng):
    return rng.choice((f"{rng.uniform(0, 100):.2f}", f"{rng.uniform(0, 10):.3f}", f"-{rng.uniform(0, 50):.1f}",
                       f"{rng.uniform(0, 1):.4f}", f"{rng.uniform(1, 9):.2f}e-{rng.randint(2, 9)}"))  # fmt: skip


def _room(rng):
    n = rng.randint(2, 480)
    return rng.choice((f"Room {n}", f"Gate {rng.choice(LETTERS)}{n % 60 + 1}", f"Platform {n % 24 + 1}",
                       f"Hall {n % 30 + 2}{rng.choice('abc')}", f"Row {n % 50 + 1}, Seat {n % 37 + 2}", f"Shelf {rng.choice(LETTERS)}-{n}", f"Box {n}"))  # fmt: skip


def _address(rng):
    parts = [rng.randint(2, 250) for _ in range(4)]
    return rng.choice((".".join(map(str, parts)), f"port {rng.randint(1024, 65000)}",
                       f"{parts[0]}.{parts[1] % 90} N, {parts[2] % 180} E", f"{parts[0] % 16 + 2}:{parts[1] % 9 + 1}"))  # fmt: skip


# Of each kind: how often, how a value is made, whether a sentence may begin with it in a capital, of what.
_A = {
    "digits": "digits_attr|count|population|score|page|year of birth|height in feet|stock|mileage|quota|seed|edition",
    "grouped": "population|print run|sum insured|annual output|circulation|attendance|visitor count|land register number",
    "decimal": "ratio|coefficient|mean|density|rate|error|learning rate|index value|grade average|constant|offset",
    "price": "price|rent|fee|wage|debt|fine|deposit|monthly bill|reward|cost|bid|salary|insurance premium|toll",
    "date": "birthday|deadline|founding date|date of arrival|expiry date|wedding day|due date|launch date|date of issue",
    "time": "closing time|departure time|bedtime|opening hour|meeting time|alarm time|arrival time|curfew|start",
    "phone": "telephone number|fax number|hotline|emergency number|mobile number|direct line|contact number",
    "version": "version|release|firmware|driver version|schema version|build|required version|protocol version",
    "hex": "checksum|colour code|key fingerprint|hash|token|memory address|commit|device id|session key",
    "code": "registration|voucher|promotion code|shelf mark|part number|plate|product key|flight|seal|coupon|lot code",
    "percent": "share|discount|humidity|interest rate|turnout|alcohol content|success rate|tax rate|margin",
    "measure": "length|weight|range|depth|capacity|dose|width|speed|distance|height|power|size|duration|area",
    "room": "seat|room|platform|meeting room|storage place|exit|berth|desk|hiding place",
    "address": "network address|port|position|coordinates|scale|gear ratio|odds",
    "number": "age|number of guests|order|quantity|crew|number of steps|dozen price|supply|number of windows",
    "word": "word_attr|hobby|profession|first word|dish|drink|instrument|nationality|subject|weakness|pseudonym",
    "words": "word_attr|ship|title of the book|shop sign|band|house name|slogan|exhibit|favourite pair",
    "person": "heir|owner|teacher|doctor|contact person|successor|lawyer|wife|guardian|editor|rival|deputy|inventor",
    "place": "birthplace|destination|home town|next stop|address|place of work|registered office|venue|hideout",
    "made up": "username|dialect word|brand name|pet|spell|clan|wine|handle|project name|horse|cipher word",
    "colour": "colour|paint|uniform|eye colour|flag|cover|favourite colour|ribbon",
    "phrase": "motto|answer to the riddle|inscription|last words|advice|countersign|rule|toast|dream|hint",
    "email": "e-mail address|mail account|login|contact address|support address|user handle",
    "path": "file|log file|backup folder|storage path|configuration file|folder|source|attachment",
    "state": "status|state|availability|condition|permission|result of the vote|consent|payment status",
}  # fmt: skip
ATTRIBUTES = {}
for _kind, _text in _A.items():
    _names = [n for name in _text.split("|") for n in (TRAIN[name] if name.endswith("_attr") else [name])]
    ATTRIBUTES[_kind] = [name for name in _names if name.lower() not in HELD]
WEIGHTS = {"digits": 6, "word": 5, "words": 3, "code": 3, "person": 3, "place": 2, "date": 2, "phrase": 2,
           "made up": 2, "price": 2, "measure": 2}  # fmt: skip
KINDS = list(_A)
LOWER = {"word", "words", "made up", "colour", "phrase", "state", "number"}


def _make(rng, kind, pools):
    makers = {
        "digits": _digits, "grouped": _grouped, "decimal": _decimal, "price": _price, "date": _date,
        "time": _time, "phone": _phone, "version": _version, "hex": _hex, "code": _code, "percent": _percent,
        "measure": _measure, "room": _room, "address": _address, "number": _number_word,
    }  # fmt: skip
    if kind in makers:
        return makers[kind](rng)
    if kind == "person":
        return f"{_name(rng, pools)} {_name(rng, pools)}"
    if kind == "words":
        return f"{_word(rng, pools)} {_word(rng, pools)}"
    if kind == "made up":
        return F.made_up(rng, 2, 5)
    if kind in ("colour", "state"):
        return rng.choice(COLOURS if kind == "colour" else STATES)
    return {"word": _word, "place": _place, "phrase": _phrase, "email": _email, "path": _path}[kind](rng, pools)


def held_out(text):
    """Tell whether a text has a word, or is a name, that evaluation holds out."""
    return text.lower() in HELD or any(part.strip(",.;:/_@-~\\").lower() in HELD for part in text.split())


def make_kind(rng):
    """Return a kind of value, by how often it is to come."""
    return rng.choices(KINDS, [WEIGHTS.get(kind, 1) for kind in KINDS])[0]


def make_value(rng, kind, pools):
    """Return a value of a kind without held-out words.

    Args:
        rng (random.Random): The only source of chance.
        kind (str): One of KINDS.
        pools (Pools): More words and names.
    """
    while True:
        value = _make(rng, kind, pools)
        if not held_out(value):
            return value.title() if kind in ("word", "words") and rng.random() < 0.12 else value


def make_attribute(rng, kind, pools):
    """Return what is said of an entity, such as "gate code" or "walnut rent"."""
    while True:
        name = rng.choice(ATTRIBUTES[kind])
        if rng.random() < 0.2:
            name = f"{rng.choice(pools.words)} {name}"
        elif rng.random() < 0.15:
            name = f"{rng.choice(('old', 'new', 'second', 'usual', 'first', 'next', 'official'))} {name}"
        if not held_out(name):
            return name


def make_entity(rng, pools):
    """Return a person, place, object or code name, as it stands inside a sentence."""
    while True:
        entity = F.make_entity(rng, "train", pools.names, pools.words)
        if not held_out(entity):
            return entity
