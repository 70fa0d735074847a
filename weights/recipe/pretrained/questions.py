"""Wordings of questions and of answers for training alone; templates as in wordings.py."""

from wordings import _lines

ASK_NEWEST = _lines("""
What is {np} now?
What is {np} at present?
What is the latest {a} of {e}?
Which {a} does {e} have now?
What is {np} after the change?
What did {np} become in the end?
Give me {np} as it stands today.
What is the current {a} of {e}?
""")
QUESTIONS = _lines("""
What does it say {np} is?
What would {np} be?
What might {np} be?
So what is {np}?
Then what was {np}?
And what is {np}?
But what was {np}?
What, please, is {np}?
What is the {a} in the case of {e}?
What is the {a} when it comes to {e}?
What is known of {np}?
What have we got for {np}?
What have you got on {np}?
What value is given for {np}?
What value has {np}?
What was {np} set to?
What was {np} found to be?
What stands under {a} for {e}?
What goes in the field "{a}" for {e}?
What must I enter as {np}?
What is the right entry for {np}?
What number, word or name is {np}?
What did {e} have for a {a}?
What did {e} get as the {a}?
What does {e} use as the {a}?
What {a} is linked to {e}?
What {a} was {e} given?
What {a} did they note for {e}?
Which {a} do you see for {e}?
Which {a} stands for {e}?
Which {a} is {e}'s?
Which {a} is it that {e} has?
Which {a} have they put down for {e}?
Which was {np}?
Which is the {a} of {e}, please?
How does {np} read?
How does {np} go?
How is {np} written?
How would I fill in {np}?
Where it speaks of {np}, what is stated?
Have you got {np} there?
Have you noticed {np}?
Has {e} a {a}? If so, which?
Did you catch {np}?
Did the text give {np}?
Did it mention {np}? What was it?
Does the text tell us {np}?
Is {np} given? If yes, give it.
Is {np} known?
Can you quote {np}?
Can you dig up {np}?
Can you see what {np} is?
Could I have {np}?
Could you repeat {np}?
Could you read {np} to me?
Would you look up {np}?
Would you mind telling me {np}?
Will you let me have {np}?
May I ask what {np} is?
Might I learn {np}?
Please look for {np}.
Please state {np}.
Please fill in: {np} = ?
Please check {np} for me.
Kindly state {np}.
Tell us {np}.
Tell me once more what {np} is.
Tell me about {e}: which {a}?
Give {np}.
Give me the {a} that goes with {e}.
Get me {np}.
Read out {np}.
Return {np}.
Extract {np}.
Retrieve {np} from the text.
Search the text for {np}.
Go back to {e} and give me the {a}.
Look at what is said of {e}. What is the {a}?
Think of {e}. What was the {a}?
Fill the gap: {np} is ____.
Complete: "{NP} is ..."
{NP} = ?
{NP}: ?
{NP} is ...
{np}
{a} of {e}?
{a}, {e}?
{e}, {a}
{E} - {a}?
lookup: {e} / {a}
query: {a} for {e}
{E} and the {a}: which is it?
{E}'s file: what does it have under {a}?
I have to know {np}.
I am after {np}.
I should like to have {np}.
I am missing {np}.
I am filling in a form and they want {np}.
I am not sure about {np}. What is it?
I think {np} was mentioned. What was it?
I seem to have overlooked {np}.
I read about {e} but lost the {a}. Which was it?
It is about {e}. I need the {a}.
It is {np} that I want.
We are missing one thing: {np}.
We still lack {np}.
Nobody here knows {np}. Do you?
They are asking about {e}. What is the {a}?
The form asks for {np}. What goes there?
The next blank is {np}.
Next: {np}.
Now {np}, please.
Also {np}.
Only this: {np}?
Just {np}, please.
One question about {e}: the {a}?
Any idea what {np} is?
Let us have {np}.
""")
WHOSE = _lines("""
Who or what has the {a} {v}?
Whose {a} is {v}?
To whom or what does the {a} {v} belong?
{V} is the {a} of whom or what?
For whom or what is {v} given as the {a}?
Which name goes with the {a} {v}?
Of whom or what is {v} the {a}?
""")
JOINT = _lines("""
What do you find for {keys}?
Give me these, in this order: {keys}.
Please look up {keys}.
I need several things: {keys}.
What are the values of {keys}?
Say what these are: {keys}.
In one line: {keys}?
""")
ANSWERS = _lines("""
{NP} is {v}.
{NP} is {v}.
It is {v}.
The {a} is {v}.
{E} has the {a} {v}.
According to the text, {np} is {v}.
The text gives {v} as {np}.
The text says that {np} is {v}.
That is {v}.
{v} is {np}.
""")
