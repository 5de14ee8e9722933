"""Names and numbers of an answer that its text does not hold: what a model made up.

Entity-level factual consistency against the source (Nan et al. 2021, arXiv:2102.09130,
prec-source), with a short reader in the place of a tagger: a fact is a number in digits, or a
capitalized word that does not open a sentence. Use: `invented_facts(answer, text)` and
`find_facts(answer)`; `read_source(text)` is read once for all answers to it.

Held are also other forms of what the text has: 1,250,000 and 1.25 million, 1914-18, 1990s and
nineties' 90s, numbers in words, initials (UN), derived forms (Algerian, Earthmen), months and their
short forms, words joined or parted (Free-Town), accents and apostrophes of any kind.

Limits: English. A name at a sentence's start, after a quotation mark or a colon is not looked at,
nor are initials of one letter, numbers in words, and names in a title or a heading, where every
word is capitalized. What is said of right names and numbers ("A beat B" for "B beat A") is not
seen. A rounded number, a name that only knowledge ties to the text's (Holland, New Amsterdam), and
what initials stand for where the text has the initials alone count as made up.
"""

import re
import unicodedata
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

MARKS = "\u0300-\u036f"  # accents that stand for themselves, as in decomposed Unicode
APOSTROPHES = "'\u2019\u2018\u02bc`\u00b4"
# 1,250.5 and 1.250,5 and 1 250 and 12; 1990s' 1990; not the "2" of "CO2", which is a name's.
NUMBER = re.compile(
    r"(?<![^\W_])(?:\d{1,3}(?:[,.\u2009\u00a0\u202f ]\d{3}(?!\d))+|\d+)(?:\.\d+|,\d{1,2}(?!\d))?"
)
# U.S. and O'Neill and Weber, of Weber's; hyphens part words: each part is one.
WORD = re.compile(rf"(?:[A-Z]\.){{2,}}|[^\W\d_](?:[\w{MARKS}{APOSTROPHES}]*[\w{MARKS}])?")
OPENS_SENTENCE = re.compile(
    r"(?:\A|[.!?:\u2026]['\"\u2019\u201d)\]*_]*\s|\n|[\"\u201c\u2018])"
    r"[\s'\"\u201c\u2018(\[*_#>\u2022\u2013\u2014-]*\Z"
)
# "John F. Kennedy", "Meeting Dr. Schmidt": such a full stop ends no sentence.
ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Gen|Sen|Rev|Lt|Col|Capt|Sgt|Gov|Rep|Hon|Mt|Ft|vs|No|Jr|Sr"
    r"|e\.g|i\.e|cf|ca|approx)\.\s\Z"
)
INITIAL = re.compile(r"(?:\A|(\S+)\s)(?:[A-Z]\.\s?)*[A-Z]\.\s\Z")
ENUMERATOR = re.compile(r"(?m)^[ \t]*\(?(\d{1,2})[.):]\s")  # "1. Forests", "(2) Lakes"
MONTHS = "january february march april may june july august september october november december"
MONTH_OF = {form: month for month in MONTHS.split() for form in (month, month[:3], month[:4])}
ISO_DATE = re.compile(r"\b\d{4}-(0[1-9]|1[0-2])-\d\d\b")
SHORT_RANGE = re.compile(r"\b(\d\d)(\d\d)\s?[-\u2013/]\s?(\d\d)\b")  # 1914-18
# Endings by which a name and what is derived from it differ: Algeria, Algerian, Algerians. One of
# the two has an ending of DERIVED, for Maria and Mario are two people.
DERIVED = "s es man men woman women ans ian ians ean eans an n ns en ese uese ish ic ies y ey ist"
DERIVED += " i ists ism ite ites er ers istan vian vians"
ENDINGS = f"{DERIVED} a e i o ia us um al as"
# Those that no ending tells.
KIN = """spain spanish spaniard spaniards | france french frenchman frenchmen | greece greek greeks
greeks | denmark danish dane danes | poland polish pole poles | finland finnish finn finns
| scotland scottish scots scot scotsman | ireland irish | wales welsh | england english
| netherlands dutch holland | norway norwegian norwegians | rome roman romans | turkey turkish turk
turks | switzerland swiss | sweden swedish swede swedes | philippines filipino filipinos
| america american americans us usa united states | britain british uk | mister mr | doctor dr
| saint st | mount mt | professor prof | general gen | senator sen | governor gov | captain capt"""
KIN_OF = {word: set(group.split()) for group in KIN.split("|") for word in group.split()}
# What may be capitalized inside a sentence and is no name.
SMALL_WORDS = """i i'm i've i'd i'll ok mr mrs ms miss mister dr doctor prof professor sir madam
a after all also although am among an and any are as at be because been before being between both
but by can could despite did do does during each either every few for from had has have he her here
hers him his how however if in into is it its just many might more most much must my neither no none
nor not now of off on once only or other our out over own per she should since so some such than
that the their them then there these they this those though through to too under until up upon very
was we were what when where which while who whom whose why will with within without would yes yet
you your"""
NO_NAMES = set(SMALL_WORDS.split())
SMALL_IN_TITLES = "a an and as at but by for from in into nor of off on or over per the to up with"
ROMAN = {"ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6, "vii": 7, "viii": 8, "ix": 9, "x": 10}
UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
UNITS += " fifteen sixteen seventeen eighteen nineteen"
ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh"
ORDINALS += " twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
LARGE = {"dozen": 12, "hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9}
LARGE |= {"trillion": 10**12, "decade": 10, "century": 100, "centuries": 100}
LARGE |= {f"{word}s": value for word, value in LARGE.items() if word != "centuries"}
IN_WORDS = {word: value for words in (UNITS, ORDINALS) for value, word in enumerate(words.split())}
IN_WORDS |= {word: 10 * value for value, word in enumerate(TENS.split(), 2)}
IN_WORDS |= {f"{word[:-1]}ieth": value for word, value in IN_WORDS.items() if word in TENS.split()}
IN_WORDS |= {"once": 1, "twice": 2, "half": 0.5, "quarter": 0.25} | LARGE
SCALE = re.compile(r"[\s-]?(hundred|thousand|million|billion|trillion)\b")
CENTURY = re.compile(r"(?:st|nd|rd|th)[\s-]+centur")
NOT_DECOMPOSED = str.maketrans(
    {"\u00f8": "o", "\u0142": "l", "\u0111": "d", "\u00e6": "ae", "\u0153": "oe"}
    | dict.fromkeys(APOSTROPHES, "'")
)
SWAPPED = str.maketrans(",.", ".,")
ENGLISH = re.compile(r"\d+(?:\.\d+)?|\d{1,3}(?:[,\u2009\u00a0\u202f ]\d{3})+(?:\.\d+)?")


class Fact(NamedTuple):
    """A name's word or a number: where it stands in the answer, and as it stands there."""

    start: int
    end: int
    text: str
    kind: str  # "name" or "number"


def value_of(number: str) -> float:
    """The value of digits with separators of thousands as in English: 1,000.5 is 1000.5."""
    digits = re.sub(r"[^\d.]", "", number)
    return float(digits if digits.count(".") < 2 else digits.replace(".", ""))


def readings_of(number: str) -> set[float]:
    """What digits may mean: 1.250 is 1.25 in English and 1,250 elsewhere."""
    readings = {
        value_of(form) for form in (number, number.translate(SWAPPED)) if ENGLISH.fullmatch(form)
    }
    return readings or {value_of(number)}


def folded(text: str) -> str:
    """Small letters without accents, and plain apostrophes."""
    if text.isascii():
        return text.lower()
    letters = unicodedata.normalize("NFKD", text.casefold().translate(NOT_DECOMPOSED))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def plain_word(word: str) -> str:
    """A word `folded`, without its possessive and without the full stops of U.S."""
    return re.sub(r"'s?\Z", "", folded(word)).replace(".", "")


def stems(word: str, endings: str) -> set[str]:
    """What is left of a word, four letters or more, without each of the endings that it has."""
    found = {word.removesuffix(ending) for ending in endings.split() if word.endswith(ending)}
    return {stem for stem in found if len(stem) >= 4}


def is_title(line: str) -> bool:
    """Whether every word of a line that ends in no full stop is capitalized, but for the small
    ones: what is a name cannot be told in it."""
    words = WORD.findall(line)
    told = [word for word in words if word not in SMALL_IN_TITLES.split()]
    ends = line.rstrip(" *_\"'\u201d)").endswith((".", "!", "?", "\u2026"))
    return len(words) > 2 and not ends and all(word[0].isupper() for word in told)


def find_facts(answer: str) -> list[Fact]:
    """The facts of an answer, in their order."""
    facts = []
    enumerators = {match.start(1) for match in ENUMERATOR.finditer(answer)}
    for match in NUMBER.finditer(answer):
        if match.start() not in enumerators:
            facts.append(Fact(match.start(), match.end(), match[0], "number"))
    start = 0
    for line in answer.split("\n"):
        if not is_title(line):
            facts += names_in(answer, start, start + len(line))
        start += len(line) + 1
    return sorted(facts)


def ends_in_initial(before: str) -> bool:
    """Whether the full stop is that of a name's initial: George W., by J. R.; not vitamin C."""
    match = INITIAL.search(before)
    if not match:
        return False
    word = match[1]
    return not word or word[0].isupper() or word in NO_NAMES


def names_in(answer: str, start: int, end: int) -> list[Fact]:
    """The words of names between two places of an answer, which are the ends of a line."""
    names = []
    for match in WORD.finditer(answer, start, end):
        word, before = match[0], answer[max(0, match.start() - 40) : match.start()]
        if not word[0].isupper() or len(word) == 1:
            continue
        if plain_word(word) in NO_NAMES and word not in ("WHO", "IT"):
            continue
        is_short = ABBREVIATION.search(before[-10:]) or ends_in_initial(before)
        if OPENS_SENTENCE.search(before) and not is_short:
            continue
        names.append(Fact(match.start(), match.end(), word, "name"))
    return names


def spelled_numbers(words: list[str]) -> set[float]:
    """The values of number words, and of runs of them: one hundred and twenty-five."""
    values = {IN_WORDS[word] for word in words if word in IN_WORDS}
    values |= {100 * IN_WORDS[word] for word in ("half", "quarter") if word in words}  # per cent
    total = current = 0.0
    for word in [*words, ""]:
        if word == "and":
            continue
        value = IN_WORDS.get(word)
        if value is None:
            values.add(total + current)
            total = current = 0.0
        elif word in LARGE:
            values.add(current)  # the twenty-first century
            current = max(current, 1.0) * value  # a float, which has no end of hundreds
            values.add(total + current)
            if value >= 1_000:
                total, current = total + current, 0.0
            elif not word.startswith("hundred"):  # two dozen ends a number
                total = current = 0.0
        else:
            current += value
    return values - {0.0}


def numbers_in(text: str, words: list[str]) -> set[float]:
    """The values of all numbers in a text, in digits and in `words`, and of parts of dates."""
    values = {float(digits) for digits in re.findall(r"\d+", text)}
    for match in NUMBER.finditer(text):
        readings = readings_of(match[0])
        values |= readings
        # 1.5 to 2 million: the scale may stand a few words later.
        for scale in SCALE.finditer(text[match.end() : match.end() + 20].lower()):
            values |= {reading * LARGE[scale[1]] for reading in readings}
    # 2019-12 is a month.
    values |= {float(century + to) for century, at, to in SHORT_RANGE.findall(text) if to > at}
    return values | spelled_numbers(words)


def initials_in(text: str) -> set[str]:
    """The initials of each run of capitalized words in a text: "un" of United Nations."""
    found = set()
    name = r"[A-Z][\w'\u2019]*\.?"
    runs = re.findall(rf"\b{name}(?:[\s-]+(?:(?:of|the|and|for)\s+)*{name})+", text)
    for run in runs:
        letters = "".join(re.findall(r"\b([A-Z])", run)).lower()
        for start in range(len(letters)):
            ends = range(start + 2, min(start + 6, len(letters)) + 1)
            found |= {letters[start:end] for end in ends}
    return found


class Source:
    """What a text holds, to look an answer's facts up in."""

    def __init__(self, text: str):
        written = WORD.findall(unicodedata.normalize("NFC", text))
        words = [plain_word(word) for word in written]
        self.spaced = " " + " ".join(text.split())
        self.words = set(words)
        # Of names alone: Parker is not derived from a park.
        self.names = {plain_word(word) for word in written if word[0].isupper()}
        self.joined = {first + second for first, second in pairwise(words)}  # Free-Town
        self.derived = {stem for name in self.names for stem in stems(name, DERIVED)}
        self.stems = {stem for name in self.names for stem in stems(name, ENDINGS)} | self.names
        self.values = numbers_in(text, words)
        self.initials = initials_in(text)
        self.months = {MONTH_OF[word] for word in self.words if word in MONTH_OF}
        self.months |= {MONTHS.split()[int(month) - 1] for month in ISO_DATE.findall(text)}

    def holds_name(self, word: str) -> bool:
        """Whether the text has a name's word, in one of its forms."""
        plain = plain_word(word)
        if plain in self.words or plain in self.initials or plain in self.joined:
            return True
        if plain.removesuffix("s") in self.words:
            return True
        if MONTH_OF.get(plain) in self.months:
            return True
        if ROMAN.get(plain) in self.values or KIN_OF.get(plain, set()) & self.names:
            return True
        derived = stems(plain, DERIVED)
        every = stems(plain, ENDINGS) | {plain}
        return bool(derived & self.stems or every & self.derived)

    def holds_number(self, number: str, before: str, after: str) -> bool:
        """Whether the text has a number that stands between `before` and `after`."""
        readings = readings_of(number)
        if scale := SCALE.match(after):
            readings = {reading * LARGE[scale[1]] for reading in readings}
        elif short := SHORT_RANGE.fullmatch(before[-5:].lstrip() + number):
            readings.add(float(short[1] + short[3]))
        if readings & self.values:
            return True
        years = {value for value in self.values if 1000 <= value <= 2100}
        if CENTURY.match(after):  # of 1847, the 19th
            return any((year - 1) // 100 + 1 in readings for year in years)
        if re.match(r"['\u2019]?s\b", after):  # of the 1990s, the '90s
            return any(year % 100 in readings for year in years)
        parts = number.split(" ")  # "on May 12 300 people"
        return len(parts) > 1 and all(readings_of(part) & self.values for part in parts)


@lru_cache(maxsize=256)  # of long texts a megabyte each
def read_source(text: str) -> Source:
    return Source(text)


def invented_facts(answer: str, text: str) -> list[Fact]:
    """Those facts of `answer` that `text` does not hold, in their order."""
    facts = find_facts(answer)
    if not facts:
        return []
    source = read_source(text)
    end = len(answer.rstrip())
    end_of_number = len(answer.rstrip(" \n\t,"))
    invented = []
    for fact in facts:
        if fact.kind == "number":
            after, last = answer[fact.end : fact.end + 20], end_of_number
            held = source.holds_number(fact.text, answer[: fact.start], after)
        else:
            held, last = source.holds_name(fact.text), end
        # An answer cut at its limit may end within a word: "the Kab" of Kabyles, "9,999," of more.
        if not held and not (fact.end == last and f" {fact.text}" in source.spaced):
            invented.append(fact)
    # Free Town, where the text has Freetown.
    parted = set()
    for first, second in pairwise(facts):
        together = plain_word(first.text) + plain_word(second.text)
        if second.start == first.end + 1 and together in source.words:
            parted |= {first, second}
    return [fact for fact in invented if fact not in parted]
