"""Names and numbers of an answer that its text does not hold: what a model made up.

Entity-level factual consistency against the source (Nan et al. 2021, arXiv:2102.09130,
prec-source), with a short reader in the place of a tagger: a fact is a number, or a capitalized
word that does not open a sentence. Use: `invented_facts(answer, text)`, `find_facts(answer)`.

Limits: English. A name at the start of a sentence is not looked at, nor are numbers in words; what
is said of right names and numbers ("A beat B" for "B beat A") is not seen; a name in another form
than those of SUFFIXES and initials (Holland for the Netherlands) counts as made up.
"""

import re
from itertools import pairwise
from typing import NamedTuple

# 1,000.5 and 1 000 and 12 and 1990s' 1990; not the "2" of "CO2", which is a name's.
NUMBER = re.compile(r"(?<![^\W_])\d+(?:[,.\u2009\u00a0\u202f ]\d{3}(?!\d))*(?:\.\d+)?")
WORD = re.compile(r"[^\W\d_](?:[\w'\u2019]*\w)?")  # hyphens part words: each part is one
OPENS_SENTENCE = re.compile(
    r"(?:\A|[.!?:;]['\"\u2019\u201d)\]]*\s|\n|[\"\u201c\u2018(\[*_#\u2022]|(?<=\s)[-\u2013\u2014]\s)"
    r"[\s'\"\u201c\u2018(\[*_#>\u2022-]*\Z"
)
ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Gen|Sen|Rev|vs|No|Jr|Sr|e\.g|i\.e)\.\s\Z"
)
# Endings by which a name and what is derived from it differ: Algeria, Algerian, Algerians.
SUFFIXES = "'s s es man men woman women ians ian ans an ns n eans ean ese ish ic ia ies y i a e o"
SUFFIXES += " us ist ists ism"
NO_NAMES = {"i", "ii", "iii", "iv", "i'm", "i've", "i'd", "i'll", "ok"}
UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
UNITS += " fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
ORDINALS = (
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
)
LARGE = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9}
IN_WORDS = {word: value for words in (UNITS, ORDINALS) for value, word in enumerate(words.split())}
IN_WORDS |= {word: 10 * value for value, word in enumerate(TENS.split(), 2)}
IN_WORDS |= {"once": 1, "twice": 2, "half": 0.5, "dozen": 12, "decade": 10, "century": 100} | LARGE


class Fact(NamedTuple):
    """A name's word or a number: where it stands in the answer, and as it stands there."""

    start: int
    end: int
    text: str
    kind: str  # "name" or "number"


def value_of(number: str) -> float:
    """The value of digits with separators of thousands: 1,000.5 is 1000.5."""
    return float(re.sub(r"[^\d.]", "", number))


def plain_word(word: str) -> str:
    """A word in small letters, with plain apostrophes and without its possessive."""
    return re.sub(r"'s?\Z", "", word.replace("\u2019", "'").lower())


def stems(word: str) -> set[str]:
    """The word and what is left of it, four letters or more, without each of the SUFFIXES."""
    plain = plain_word(word)
    cut = {plain.removesuffix(suffix) for suffix in SUFFIXES.split() if plain.endswith(suffix)}
    return {plain} | {stem for stem in cut if len(stem) >= 4}


def find_facts(answer: str) -> list[Fact]:
    """The facts of an answer, in their order."""
    facts = []
    for match in NUMBER.finditer(answer):
        facts.append(Fact(match.start(), match.end(), match[0], "number"))
    for match in WORD.finditer(answer):
        word, before = match[0], answer[: match.start()]
        if not word[0].isupper() or plain_word(word) in NO_NAMES:
            continue
        if OPENS_SENTENCE.search(before[-40:]) and not ABBREVIATION.search(before[-8:]):
            continue
        facts.append(Fact(match.start(), match.end(), word, "name"))
    return sorted(facts)


def numbers_in(text: str) -> set[float]:
    """The values of all numbers in a text, in digits and in words, and of parts of dates."""
    values = {value_of(match[0]) for match in NUMBER.finditer(text)}
    values |= {float(digits) for digits in re.findall(r"\d+", text)}
    words = [plain_word(word) for word in WORD.findall(text)]
    values |= {IN_WORDS[word] for word in words if word in IN_WORDS}
    for tens, unit in pairwise(words):  # twenty-five; three hundred
        if tens in TENS.split() and IN_WORDS.get(unit, 10) < 10:
            values.add(IN_WORDS[tens] + IN_WORDS[unit])
        if unit in LARGE and tens in IN_WORDS:
            values.add(IN_WORDS[tens] * LARGE[unit])
    return values


def initials_in(text: str) -> set[str]:
    """The initials of each run of capitalized words in a text: "un" of United Nations."""
    found = set()
    name = r"[A-Z][\w'\u2019]*"
    runs = re.findall(rf"\b{name}(?:[\s-]+(?:(?:of|the|and|for)\s+)*{name})+", text)
    for run in runs:
        letters = "".join(re.findall(r"\b([A-Z])", run)).lower()
        found |= {letters[i:j] for i in range(len(letters)) for j in range(i + 2, len(letters) + 1)}
    return found


def invented_facts(answer: str, text: str) -> list[Fact]:
    """Those facts of `answer` that `text` does not hold, in their order."""
    facts = find_facts(answer)
    if not facts:
        return []
    words = {plain_word(word) for word in WORD.findall(text)}
    stems_of_text = {stem for word in words for stem in stems(word)}
    spaced = " " + " ".join(text.split())
    joined = re.sub(r"\W+", "", text).lower()
    values, initials = numbers_in(text), initials_in(text)
    invented = []
    for fact in facts:
        if fact.kind == "number":
            held = value_of(fact.text) in values
        else:
            word = plain_word(fact.text)
            held = word in words or not stems_of_text.isdisjoint(stems(word)) or word in initials
            held = held or (len(word) >= 6 and word in joined)  # Free-Town, or cut by a line
        # An answer cut at its limit may end within a word: "the Kab" of Kabyles.
        if not held and fact.end == len(answer.rstrip()):
            held = f" {fact.text}" in spaced
        if not held:
            invented.append(fact)
    return invented
