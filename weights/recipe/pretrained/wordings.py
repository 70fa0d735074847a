"""Wordings of facts for training alone, in many registers.

A line is one template, filled as in mlx_dsa/tasks/facts.py: {np} is "the gate code of Ada Thorne",
{a} and {e} its parts, {v} the value; capitals begin a sentence. "\\n" is a line's end. What the
evaluators hold out, in word or in wording, stands nowhere here.
"""


def _lines(text):
    return [line.replace("\\n", "\n") for line in text.strip().split("\n")]


# One or two sentences that may stand in running text.
STATED = _lines("""
{NP} comes out as {v}.
{NP}, for what it is worth, is {v}.
I looked it up once more: {np} is {v}.
It took three people to find out that {np} was {v}.
It is on account of a mistake that {np} is {v} and nothing else.
Though many doubted it, {np} was {v} all along.
Since {np} is {v}, nobody had to ask twice.
Because {e} had lost the papers, {v} was put down as the {a}.
While the others slept, {e} changed the {a} to {v}.
If you should meet {e}, use the {a} {v}.
It was {e} whose {a} was {v}.
Only {e} has the {a} {v}.
{V}, and no other, is {np}.
{V} is how {np} reads today.
"{v}" was all they could make out of {np}.
With {v} as the {a}, {e} was hard to confuse with anybody.
What {e} has for the {a} is {v}.
What they call {np} is in truth {v}.
The {a}? For {e} it is {v}.
And {np}? That was {v}.
{E}: the {a} is {v}, as it was last year.
{E} - {a}: {v} - was among the first.
{E} has a new {a}. It is {v}.
{E} was asked to choose a {a}. After some thought the choice fell on {v}.
There has been some talk of {np}. To end it: {v}.
People often get {np} wrong. The right one is {v}.
A {a} had to be found for {e}. They settled for {v}.
Nobody could say how {e} came by the {a}. All that was known was {v}.
First came {e}. The {a} followed an hour later, and it was {v}.
They argued about {e} for an hour; in the end the {a} stayed at {v}.
They say (but who can be sure?) that {np} is {v}.
I heard it from the baker, who had it from the postman: {np} is {v}.
Rumour has it that {np} is {v}.
Word went round that {v} was now {np}.
It is whispered in the kitchen that {e} has {v} for the {a}.
"{NP} is {v}," said the old man, and shut the door.
"And {np}?" - "{V}," she answered without looking up.
"Take this down," he said. "{NP}: {v}."
"Is it true that {np} is {v}?" "Quite true."
He asked what {np} was. "{V}," came the reply from the next room.
"You will know {e} by the {a}," she told us, "for it is {v}."
I cried, "But {np} is {v}!" and they all laughed.
She read aloud from the sheet: "{E}, {a}, {v}."
(For those who keep lists: {np} is {v}.)
(The {a} in the case of {e} being {v}.)
({E} has {v} as the {a}; see also the last page.)
[Note of the editor: {np} is given here as {v}.]
[{np}: {v}]
* {NP} is {v}. The first printing had it wrong.
By the rules of the house {np} shall be {v}.
It is hereby ordered that {np} be {v}.
The undersigned declares that {np} is {v}.
The parties agree that {np} shall be {v} until further notice.
No person other than {e} shall bear the {a} {v}.
Under section nine, {np} is deemed to be {v}.
Be sure to set {np} to {v} before you go on.
Never forget to enter {v} where they want {np}.
Write {v} on the form in the box for {np}.
Replace {np} with {v}.
Set the {a} to {v} for {e}, then close the lid.
To open it you need {np}, that is, {v}.
Dial, press or say {v}: this is {np}.
On Tuesday {np} was found to be {v}.
In the spring of that year {e} took {v} for the {a}.
After the fire {np} became {v}, and so it stayed.
Until the war {np} was kept at {v}.
As early as Monday {e} had {v} as the {a}.
From this day on, {v} counts as {np}.
The newspaper printed {np} on its last page: {v}.
The radio gave {v} as {np} that same evening.
My grandmother never tired of telling us that {np} was {v}.
The inspector measured twice and put {np} at {v}.
The experts put {np} at {v}.
Three witnesses gave {np} as {v}.
A brass plate gives {np} as {v}.
The stone over the door bears {v}, which is {np}.
The stamp on the lid showed {v}, that is, {np}.
Somewhere among the papers it says {v} for {np}.
On page forty you find {np}, which is {v}.
The table at the back has {v} in the row for {e} under "{a}".
Our records have {e} down with the {a} {v}.
Our man at the harbour reports {v} as {np}.
The system shows {v} when it is asked for {np}.
The machine stopped, and the display read {v}: {np}.
All checks passed once {np} was {v}.
Version two ships with {v} as {np}.
Without {v}, {np}, nothing can be done.
With the help of {np}, {v}, they got in.
Thanks to {np} ({v}) the parcel arrived.
In spite of {np}, which was {v}, they let the matter rest.
Of {e} we know little more than the {a}: {v}.
About {e} there is one thing to keep: the {a} is {v}.
Strange as it sounds, {e} has {v} as the {a}.
Would you believe that {np} is {v}?
Who would have thought that {e} had {v} for the {a}?
How odd that {np} should be {v}!
Yes, {np} is {v}.
No, {np} is not what you think. It is {v}.
Well, then: {v} for {np}.
Oh, and {np} is {v}.
Dear me, I nearly left it out: {np} is {v}.
I ought to have mentioned {np} earlier; it is {v}.
You asked me about {np} in your last letter. It is {v}.
I am glad to be able to write that {np} is {v}.
I have it in black and white that {np} is {v}.
I would bet my hat that {np} is {v}.
We may take it as settled that {np} is {v}.
It follows that {np} is {v}.
Let {np} be {v}.
Suppose, as we must, that {np} is {v}.
Of the many things said that night, one was true: {np} was {v}.
The best thing about {e} is the {a}, {v}.
The {a} {v} stands for {e}.
The {a} {v} is {e}'s own.
It says {v} under {a} on the card of {e}.
He had the {a} of {e} by heart: {v}.
She repeated it like a prayer: {v}, {v}, {np}.
The boys made a song of {np}, with {v} at the end of each verse.
Between two yawns he let slip that {np} was {v}.
They had {v} engraved, since that was {np}.
What made {e} famous was the {a}: {v}.
Not even {e} could explain why the {a} had to be {v}.
Most of us call it {v}; properly speaking, that is {np}.
Read from right to left or from left to right, {np} stays {v}.
""")
# What stands as a paragraph of its own.
BLOCKS = _lines("""
{NP}: {v}
{a}: {v} ({e})
{E} | {a} | {v}
| {e} | {a} | {v} |
Name: {e}\\n{a}: {v}
- {np}: {v}
* {e} - {a} - {v}
1. {NP} is {v}.
{E}\\n    {a}: {v}
{E}, {a}: {v}
{E}\\t{a}\\t{v}
{e};{a};{v}
"{e}","{a}","{v}"
{{"name": "{e}", "{a}": "{v}"}}
<entry name="{e}" field="{a}">{v}</entry>
[{e}]\\n{a} = {v}
{a} ({e}) = {v}
{a}[{e}] -> {v}
SET "{a}" OF "{e}" TO "{v}"
08:14:02 INFO {np} set to {v}
2019-11-04 09:27 [notice] {e}: {a} changed to {v}
WARN: {np} is {v}, please keep
[14:05] {e}: my {a} is {v}
[{e}] {a}={v} status=done
MEMO\\nTo all staff: {np} is {v} from Monday on.
MEMO\\nSubject: {e}\\nThe {a} is {v}. Please tell your people.
To: the office\\nRe: {np}\\n\\nIt is {v}.
Dear Sir,\\n\\nyou inquired after {np}. It is {v}.\\n\\nYours faithfully
Dear all,\\n\\na short word on {e}. The {a} will be {v}.\\n\\nKind regards
TELEGRAM\\n{np} STOP {v} STOP GREETINGS
ARRIVING FRIDAY STOP {a} FOR {e} IS {v} STOP
NEWS: {e} gets {v} as new {a}
{E}: {v} is the new {a}\\nBy our own correspondent
NOTICE. {NP} is {v}. By order.
Item 4. {E}. The chairman stated that the {a} is {v}. Agreed.
Minutes, point 7: {np} will be {v}. No objections.
Resolved: that {np} be {v}.
Art. 12. {NP} is {v}.
Section 3 (b): {np} means {v}.
Lot 31. {E}. {a}: {v}. Some wear.
No. 208 - {e} ({a}: {v}), in good state.
Monday. Rain again. Went to see about {e}. The {a} is {v}. Early to bed.
4 May. Cold. Learned at last what {np} is: {v}.
Tip for the cook: {np} is {v}. Stir well.
Take two eggs and some flour. Mind {np}: {v}. Bake until brown.
Step 3: enter {v} as {np}.
Q: What about {np}?\\nA: {v}.
CLERK: And {np}?\\nWITNESS: {v}.
WANTED: news of {e}. Known {a}: {v}.
P.S. {NP} is {v}.
N.B. {np} = {v}
NOTE TO SELF: {np}, {v}!
TODO: tell the others that {np} is {v}
Footnote 2: {np}, {v}.
(1) {NP}: {v}. Source: the register.
Fig. 5. {E}. The {a} is {v}.
See also: {e}. {A}: {v}.
{E} (n.): that which has the {a} {v}.
{A} ........ {v} ({e})
{A} of the day: {v}. It is that of {e}.
> {np} is {v}
# {e}\\n\\n{a}: {v}
## {np}\\n\\n{v}
**{np}**: {v}
{V} ({np})
{V} <- {np}
{v}: {a} of {e}
Answer to last week's riddle about {np}: {v}.
""")
# What goes before the full stop that ends a sentence.
CLAUSES = _lines("""
; {np} was {v}
, and {np} was {v}
, while {np} was {v}
, for {np} is {v}
, though {np} is {v}
, where {np} is {v}
 - {np} is {v}
 ({np} is {v})
 (compare {np}: {v})
, because {e} had the {a} {v}
, and so {e} got {v} as the {a}
, just as {e} has {v} for the {a}
, until they learned that {np} was {v}
; {v} is {np}
, not knowing that {np} was {v}
, or so they said who knew that {np} was {v}
""")
# Around a whole sentence; {s} is it, {t} the same with a small letter.
WRAPPED = _lines("""
({s})
[{s}]
* {s}
- {s}
> {s}
"{s}"
Footnote: {s}
Notice: {s}
He wrote: "{s}"
She shouted: "{s}"
It said on the wall: "{s}"
{s} So much for that.
{s} But this is by the way.
{s} Everyone nodded.
Listen. {s}
One more thing. {s}
To be exact: {s}
In other words: {s}
From the diary: {s}
Message received at noon: {s}
10:32 {s}
#17 {s}
As the song goes, {t}
They found, to their surprise, that {t}
I am told that {t}
It cannot be denied that {t}
""")
NEWER = _lines("""
{NP} is no longer {o} but {v}.
{NP} has changed from {o} to {v}.
Correction: {np} is {v}, not {o}.
They gave up {o}; {np} is {v} now.
What was said of {np} is out of date: it is {v} now.
{V} has replaced {o} as {np}.
Forget {o}. {NP} is {v} from today on.
{E} has a different {a} now: {v} instead of {o}.
UPDATE: {np} is now {v}
Since yesterday {np} is {v}; before, it was {o}.
I was wrong about {np}. It is {v}, and {o} was a mistake.
{E} exchanged the {a} {o} for {v}.
As of today, {v} takes the place of {o} as {np}.
ERRATUM. For {np} read {v}, not {o}.
"Not {o} any more," he said. "{NP} is {v} these days."
""")
