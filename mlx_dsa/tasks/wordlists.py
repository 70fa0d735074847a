"""Names, words and phrasings from which facts are made, split into train and held-out parts.

Every fifth entry of each list is held out; of the phrasings, whole families are ("The secret code
is 7392." / "What is the secret code?" among them). Nobody changes these lists: whoever adds to one
adds to a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

SPLITS = ("train", "heldout")
FIRST = """Ada Alan Albert Alice Amos Anna Arthur Beatrice Bernard Bertha Boris Bridget Carla Cedric
Clara Clement Cora Cyril Daisy Daniel Dora Dorothy Edgar Edith Edmund Elena Ellen Elsa Emil Emma Ernest
Esther Eva Felix Flora Frances Frank Gerald Gilbert Gloria Grace Greta Gustav Hannah Harold Harriet Hector
Helen Henry Herbert Hilda Hugo Ida Igor Irene Isaac Ivan Ivy Jacob Jane Jasper Joan Julia Julian Karl Kate
Keith Laura Leonard Lily Linda Louis Lucy Luke Mabel Marcus Maria Martha Martin Max Mildred Miles Miriam
Monica Muriel Myra Nadia Nathan Nellie Nina Nora Norman Olga Oliver Oscar Owen Pamela Paula Percy Peter
Philip Phoebe Rachel Ralph Rita Robert Rosa Rupert Ruth Samuel Sarah Silas Simon Sofia Stella Susan Sylvia
Teresa Theodore Thomas Tobias Ursula Vera Victor Viola Walter Wanda Wilfred Winifred Yvonne Zelda""".split()
LAST = """Abbot Alder Archer Ashby Atwood Baker Barlow Beck Bishop Blackwood Bolton Bowen Brandt Bright
Brook Burton Calder Carver Chase Clay Cole Corbin Crane Crosby Dalton Dawes Dexter Dixon Draper Drake Dunn
Easton Elwood Emerson Everett Fairfax Farrow Fenwick Finch Fisher Fleming Foster Frost Gale Garrick Gibson
Glover Graves Grant Hadley Hale Hammond Harding Harlow Hawkins Hayward Holt Hooper Howell Hudson Hunt Ingram
Irving Jarvis Jennings Keller Kemp Kendall Knight Lambert Lang Larkin Lawson Leighton Lester Lloyd Lowell
Marlow Marsh Mason Mercer Merritt Monroe Moody Moss Nash Newell Norris Norwood Oakley Osborne Page Palmer
Parrish Pemberton Perkins Pike Porter Potter Quinn Radley Ramsey Reed Rhodes Ridley Rowan Russell Sawyer
Sexton Shaw Sheldon Skinner Slater Spencer Stanton Stone Sutton Talbot Thorne Tilden Turner Underhill Vance
Vaughn Wade Walden Waller Warren Watts Webster Weston Whitaker Wilder Winslow Wolfe Yates York""".split()
PLACE = """Aldermoor Arden Ashford Avonlea Bayport Belmont Birchwood Blackpool Bramley Bristow Cambria
Carlow Cedarville Clifton Corby Coventry Dalby Deepdale Denholm Dover Dunmore Eastbrook Elmhurst Fairview
Fallbrook Farnham Foxhill Glenwood Granville Greenfield Halford Harwick Hazelton Highgate Holloway Ironbridge
Kelso Kenwood Kingsport Lakewood Lancing Linden Longford Lynton Maplewood Marston Melrose Millbrook Mossley
Newhaven Northam Oakdale Oxley Penrith Pinewood Portland Ravenna Redcliff Riverton Rockford Rosewood Salem
Sandwick Selby Shelton Silverton Southgate Stafford Summerfield Tamworth Thornbury Trenton Upton Verona
Wakefield Walton Westbury Whitby Willowdale Windham Woodstock Yarmouth""".split()
BUILDING = """library station museum hospital hotel factory warehouse school church theatre bakery harbour
bank mill observatory garage prison laboratory post-office brewery orchard chapel stable tavern lighthouse
market embassy archive gymnasium foundry""".split()
ADJ = """old new red blue green black white grey golden silver wooden iron small large northern southern
eastern western upper lower broken round narrow tall heavy painted locked rusty hidden little crimson purple
yellow brown ancient modern empty marble leather copper""".split()
OBJECT = """locker box trunk cabinet drawer suitcase chest vault safe door gate boat wagon bicycle piano clock
lantern violin engine printer telescope camera crate barrel wardrobe desk tent carriage tractor ladder mirror
statue painting radio compass globe kettle stove bell cupboard furnace microscope bridge tower well elevator
aquarium ledger notebook parcel""".split()
CODE = """Falcon Aurora Cobalt Tempest Orion Juniper Granite Phoenix Saturn Maple Neptune Comet Lotus Titan
Zephyr Ember Cascade Horizon Meteor Willow Thunder Nebula Raven Saffron Glacier Pegasus Quartz Sparrow Atlas
Dolphin Mercury Onyx Panther Cedar Eclipse Harvest Monsoon Scorpion Topaz Voyager""".split()
WORDS = """apple anchor badger balloon banana barley basket beacon beaver biscuit blanket blossom bottle
bramble bucket butter button cactus candle canyon carpet carrot castle cherry chimney cinnamon circus clover
coffee copper coral cotton cricket crystal curtain dagger daisy desert diamond donkey dragon eagle elephant
emerald feather fiddle flannel forest fountain garden garlic ginger glacier hammer harbor harvest helmet
hickory honey island ivory jacket jasmine jungle kitten ladder lantern lemon leopard lettuce lilac lizard
lobster magnet mango marble meadow melon mirror monkey mustard needle nutmeg oasis olive onion orange orchid
otter oyster paddle panther paper parrot peach peanut pebble pepper pigeon pillow planet plum pocket potato
pumpkin puzzle quarry rabbit radish raven ribbon river rocket saddle salmon sandal scarlet shadow silver
spider spinach sponge squirrel stable sugar summer sunset tangerine temple thimble thunder tiger timber tomato
trumpet tulip tunnel turnip turtle umbrella valley vanilla velvet village violet walnut walrus whistle willow
window winter wizard yellow zebra zipper almond amber antler autumn bamboo barrel bishop bonnet breeze bronze
cabbage camel canary cedar celery chestnut cobbler comet compass cookie cottage cradle crimson dolphin echo
falcon fern flamingo fossil gazelle goblet granite grape hazel heron hornet hurricane indigo jewel juniper
kettle lagoon lavender locust maple marigold mermaid mosaic muffin nectar nickel oatmeal octopus opal paprika
pelican pepper pirate poppy porcupine prairie quartz raisin rosemary ruby saffron sapphire satin seagull
sesame slipper sparrow stallion swallow tapestry teapot thistle topaz trout tundra turquoise vulture waffle
waterfall weasel""".split()
DIGIT_ATTRS = """access code|locker number|ticket number|account number|serial number|registration number|
telephone extension|membership number|safe combination|invoice number|order number|catalogue number|
license number|pin code|reference number|case number|batch number|parcel number|passport number|badge number|
postal code|customer number|policy number|gate code|alarm code|vault code|tracking number|magic number|
lucky number|entry code|unlock code|file number|signal code|student number|inventory number|model number|
special magic number|permit number|identification number|booking number""".replace("\n", "").split("|")
WORD_ATTRS = """password|code word|keyword|watchword|nickname|secret word|favourite word|passphrase|call sign|
magic word|code name|motto|brand|favourite food|favourite thing|symbol|emblem|security word|label|signature dish|
pet's name|middle name|safe word|alias|team name|login word|mascot|battle cry|trademark|
special magic word""".replace("\n", "").split("|")
GENERIC = {
    "digits": "number code key index id combination reading figure".split(),
    "word": "word name password label phrase title sign term".split(),
}
BARE_ADJ = "secret hidden final special private confidential forgotten correct".split()
BARE_NOUN = {
    "digits": "code number combination pin key".split(),
    "word": "word password phrase name codeword".split(),
}

# {np} is "the access code of Ada Thorne" or "Ada Thorne's access code"; {NP} starts a sentence.
SENTENCES = {
    "train": """{NP} is {v}.|{NP} is {v}.|{NP} was {v}.|{NP} is now {v}.|{NP} was set to {v}.|{NP}: {v}.|
{NP} has been changed to {v}.|{NP} turned out to be {v}.|{NP} happens to be {v}.|{NP} will be {v} from now on.|
{NP} was recorded as {v}.|{NP} remains {v}.|{NP}, as far as anyone knows, is {v}.|{NP} is "{v}".|
{NP} is {v}, and that will not change.|{NP} is {v}, according to the clerk.|{NP} is none other than {v}.|
{E} has the {a} {v}.|{E} was given the {a} {v}.|{E} received {v} as the {a}.|{E} uses {v} as the {a}.|
{E} was assigned the {a} {v}.|{E} is listed with the {a} {v}.|For {e}, the {a} is {v}.|For {e} the {a} was {v}.|
{E} is registered under the {a} {v}.|{V} is {np}.|They chose {v} as {np}.|The clerk entered {v} as {np}.|
Someone wrote down {v} as {np}.|We use {v} for {np}.|One must enter {v} as {np}.|It is {v} that serves as {np}.|
In the register, {e} stands with the {a} {v}.|Everybody agreed on {v} as {np}.|{NP} had always been {v}.|{NP} must be {v}.|{NP} reads {v}.|
{NP} was fixed at {v}.|{NP} was said to be {v}.|{NP} became {v}.|{NP} is simply {v}.|{NP} stays {v} until spring.|
{NP} is still {v}, in spite of everything.|{NP}, I believe, is {v}.|{NP} (now {v}) is easy to keep in mind.|
{NP} equals {v}.|{NP} is the following: {v}.|{NP} has not changed since then; it is {v}.|{NP} was given as {v}.|
{E} always used the {a} {v}.|{E} chose {v} as the {a}.|{E} kept {v} as the {a} for years.|{E} goes by the {a} {v}.|
{E} carries the {a} {v}.|{E} wrote {v} in the field for the {a}.|{E} signed with the {a} {v}.|
{E} asked for the {a} and got {v}.|With {e} goes the {a} {v}.|To {e} belongs the {a} {v}.|
As the {a} of {e}, {v} was accepted.|As for {np}, it is {v}.|Concerning {np}, the book says {v}.|
The paper gave {v} for {np}.|Whoever looks for {np} will find {v}.|{V} has become {np}.|{V} was made {np}.|
On the label one could read {v} as {np}.|The value of {np} is {v}.|The list shows {v} for {np}.|
The old man repeated that {np} is {v}.|A note on the wall said that {np} is {v}.|We know {np}: {v}.|
The answer to the riddle of {np} is {v}.|Ask for {np} and you will hear {v}.|
Nobody doubted that {np} was {v}.|{V}: that is {np}.|With {v}, {e} had found a good {a}.|Only {v} would do as {np}.|
{E} told everyone that the {a} was {v}.|The telegram gave {np} as {v}.|{NP} was not a secret: {v}.|
He typed {v} when they wanted {np}.|{E} could be recognised by the {a} {v}.|When in doubt about {np}, use {v}.|
A stranger had asked for {np}, which is {v}.|{NP} comes to {v}.|{NP} was announced: {v}.|{E}, whose {a} is {v}, arrived.|
They found {e} under the {a} {v}.|In the file of {e} we read the {a} {v}.|{NP}, namely {v}, was on every list.|
The guard would accept nothing but {v} as {np}.|{V}, as you know, is {np}.|{E} ({a} {v}) is on the list.""".replace(
        "\n", ""
    ).split("|"),
    "heldout": """If anyone asks about {np}, say {v}.|When {e} was asked for the {a}, the reply was {v}.|
Beside the name of {e} stood the {a}, {v}.|Somebody had scribbled {v} next to {np}.|
The letter confirmed that {e} would keep {v} for the {a}.|
There was only one {a} that {e} ever trusted, namely {v}.""".replace("\n", "").split("|"),
}
LEADS = """|||||||Remember that |Note that |For the record, |It was noted that |It is known that |By the way, |
Everyone knows that |As it happens, |The report says that |According to the register, |Let it be known that |
Keep in mind that |He added that |She said that |The letter states that |Important: |Note: |Do not forget that |
Incidentally, |It should be mentioned that |In those days, |At that time, |They told us that """.replace(
    "\n", ""
).split("|")
QUESTIONS = {
    "train": """What is {np}?|What is {np}?|What is {np}?|What was {np}?|Tell me {np}.|Can you tell me {np}?|
Please give me {np}.|Do you know {np}?|I need {np}.|{NP}?|Could you find {np} in the text?|Find {np}.|
What does the text say about {np}?|What does the text give as {np}?|What {a} does {e} have?|State {np}.|
Which {a} was given to {e}?|Which {a} belongs to {e}?|What {a} is given for {e}?|Look up {np}.|
What is the {a} mentioned for {e}?|I would like to know {np}.|Which {a} does {e} use?|Name {np}.|
Do you remember {np}?|What is recorded as {np}?|What is {np} that the text mentions?|Say what {np} is.|
What exactly is {np}?|What is {np} according to the passage?|Report {np}.|What was said about {np}?|What is written about {np}?|Give me {np}.|Show me {np}.|Repeat {np}.|
May I have {np}?|Could you tell me {np}, please?|I want to know {np}.|I am looking for {np}.|Answer this: what is {np}?|
Which value does {np} have?|Where the text mentions {np}, what does it say?|Have you seen {np}?|Recall {np}.|
What was noted as {np}?|Write {np}.|Who knows {np}?|In the text, what is {np}?|Let me know {np}.|
What did the text say {np} was?|Under which {a} is {e} listed?|What is the {a} that {e} has?|
{E} has which {a}?|For {e}, what is the {a}?|What {a} goes with {e}?|Tell me which {a} {e} has.|I cannot recall {np}.|Do you happen to know what {np} is?|
Someone asked me what {np} is.|It says somewhere what {np} is. What does it say?|{E}: {a}?|Of {e} I need the {a}.|
Speaking of {e}, which {a} is mentioned?|As to {e}, tell me the {a}.|{NP}, please.|And {np}?|What about {np}?|
How is {np} given?|I never learned {np}. What is it?|We have to find {np}. Any idea?|Is there a word on {np}?|
My sister is asking for {np}.|They will ask me for {np}.|Let us talk about {e}. What {a} was mentioned?|
I wonder what {np} is.|Surely you know {np}.|{NP} is what?|Complete this: {np} is""".replace("\n", "").split("|")
    + [
        frame.replace("VERB! ", verb.capitalize() + " ").replace("VERB", verb).replace("_", " ")
        for verb in """mention provide supply identify specify quote reveal disclose print read|out send|me fetch retrieve
        spell|out bring|up announce confirm list indicate extract share produce point|out write|down search|for
        hand|me help|me|find remember come|back|to|me|with check return locate pick|out explain""".replace(
            "|", "_"
        ).split()
        for frame in (
            "VERB! {np}.",
            "Could you VERB {np}?",
            "I want you to VERB {np}.",
            "You should VERB {np}.",
            "Please VERB {np}.",
            "Will you VERB {np} for me?",
        )
    ],
    "heldout": """Remind me of {np}.|I forgot {np}; what was it?|What should I write down as {np}?|
Regarding {e}: what is the {a}?|My friend wants to know {np}. Can you help?|
If someone asked you for {np}, what would you reply?""".replace("\n", "").split("|"),
}
ASK_LEADS = """||||||||||Please answer: |Quick question: |Now, |Thanks. |Based on the text above, |
According to the text, |One more thing: |Next question: |Question: |Let me ask you this: |From the text: |
Here is my question. """.replace("\n", "").split("|")
BRIEF = [" Answer briefly.", " Answer with the value only.", " Give only the value.", " Just the answer, please."]
FULL = [" Answer in a full sentence.", " Reply in one sentence.", " Please use a complete sentence."]
MULTI_SENTENCES = """One of the {a}s for {e} is {v}.|One {a} for {e} is {v}.|{v} is one of the {a}s for {e}.|
A {a} for {e} is {v}.|Among the {a}s for {e} is {v}.|One of the {a}s for {e} is: {v}.""".replace("\n", "").split("|")
MULTI_QUESTIONS = """What are all the {a}s for {e}?|What are the {n} {a}s for {e}?|List all the {a}s for {e}.|
Which {a}s are mentioned for {e}?|Name every {a} for {e}.|What are all the {a}s for {e} in the text?""".replace(
    "\n", ""
).split("|")
QUERY_QUESTIONS = """What are {keys}?|Tell me {keys}.|What is each of these: {keys}?|Please give me {keys}.|
I need {keys}.|What does the text give as {keys}?""".replace("\n", "").split("|")
KEY_QUESTIONS = """What is the value of {k}?|What is the value for {k}?|Which value does {k} have?|{k}?|
What value belongs to {k}?|Give me the value of {k}.|Look up {k}.|What does the list say for {k}?""".replace(
    "\n", ""
).split("|")
SYLLABLES = """ba be bi bo bra cal cor da del dor el fa fen gar gil ha hol in jor ka kel lan lor ma mar mel mi
na nor o pa per pol qua ra ren ri ro sal sen sha sol ta tel tor tri u va ven vi wen yor za zen""".split()


def part(items: Sequence[str], split: str) -> list[str]:
    """Return the train or the held-out part of a list: every fifth entry is held out."""
    if split not in SPLITS:
        raise ValueError(f"[facts] 'split' must be 'train' or 'heldout' but got {split!r}.")
    return [x for i, x in enumerate(items) if (i % 5 == 4) == (split == "heldout")]


PARTS = {
    split: {
        name: part(items, split)
        for name, items in dict(
            first=FIRST, last=LAST, place=PLACE, building=BUILDING, adj=ADJ, object=OBJECT, code=CODE,
            words=list(dict.fromkeys(WORDS)), digits_attr=DIGIT_ATTRS, word_attr=WORD_ATTRS,
        ).items()
    }
    for split in SPLITS
}  # fmt: skip
