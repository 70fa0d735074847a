"""GSM8K answers: a table of awkward ones, and what lm-evaluation-harness makes of each."""

import pytest

from mlx_dsa.tasks.extraction import INVALID, flexible, matches, strict

# reply, strict, flexible
TABLE = [
    ("#### 18", "18", "18"),
    ("She has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7", "7", "7"),
    ("#### 1,234", "1,234", "1,234"),
    ("#### -5", "-5", "-5"),
    ("#### $18", INVALID, "$18"),
    ("#### 18.", "18.", "18."),
    ("#### 18.00", "18.00", "18.00"),
    ("#### 18 dollars", "18", "18"),
    ("#### about 18", INVALID, "18"),
    ("####18", INVALID, "18"),
    ("####  18", INVALID, "18"),
    ("### 18", INVALID, "18"),
    ("##### 18", "18", "18"),
    ("#### 5\n#### 6", "5", "6"),
    ("#### 18\n\nQuestion: How many of 20?", "18", "20"),
    ("The answer is 42", INVALID, "42"),
    ("The answer is 42.", INVALID, "42."),
    ("The answer is $1,000.50.", INVALID, "$1,000.50."),
    ("The answer is \\boxed{72}", INVALID, "72"),
    ("**72**", INVALID, "72"),
    ("It costs 50% of 8", INVALID, "8"),
    ("4/5", INVALID, "5"),
    ("3.14", INVALID, "3.14"),
    (".5", INVALID, ".5"),
    ("5.", INVALID, "5."),
    ("7", INVALID, "7"),
    ("-7", INVALID, "-7"),
    ("10-7", INVALID, "-7"),
    ("10 - 7 = 3", INVALID, "3"),
    ("1 000", INVALID, "000"),
    ("There are 12 apples, 5 of them red", INVALID, "5"),
    ("12 apples, and so on...", INVALID, "..."),
    ("12 apples, ok.", INVALID, "12"),
    ("", INVALID, INVALID),
    ("seven", INVALID, INVALID),
    ("...", INVALID, "..."),
    (".", INVALID, INVALID),
    ("$", INVALID, INVALID),
    ("$$", INVALID, "$$"),
    ("####", INVALID, INVALID),
    ("#### ", INVALID, INVALID),
    ("#### ,", ",", INVALID),
    ("18 ####", INVALID, "18"),
    ("#### 1e3", "1", "3"),
    ("#### 0", "0", "0"),
    ("#### 007", "007", "007"),
    ("x = 9\nTherefore x = 9 #### 9", "9", "9"),
    ("#### −5", INVALID, "5"),  # a minus sign that is not a hyphen
]

EQUAL = [
    ("18", "18", True),
    ("1,234", "1234", True),
    ("$18", "18", True),
    ("18.", "18", True),
    ("#### 18", "18", True),
    ("work #### 18", "18", True),
    ("18.00", "18", False),
    ("018", "18", False),
    ("-18", "18", False),
    ("18..", "18.", False),
    (INVALID, "18", False),
    ("$1,000.50.", "1000.50", True),
]


def test_the_table_is_long_enough():
    assert len(TABLE) >= 40


@pytest.mark.parametrize("reply, by_mark, by_number", TABLE)
def test_extraction(reply, by_mark, by_number):
    assert (strict(reply), flexible(reply)) == (by_mark, by_number)


@pytest.mark.parametrize("found, reference, same", EQUAL)
def test_comparison(found, reference, same):
    assert matches(found, reference) is same
