"""Names and numbers that an answer made up, by hand-written cases."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.find_facts import find_facts, invented_facts

few = settings(max_examples=200, deadline=None)
TEXT = """Dr. Anna Weber, born in Algeria in 1903, led the United Nations mission to Lake Baikal
for twenty-five years. In March 1951 her team counted 1,250,000 trees, some of them 3.5 metres
thick, and the Anglo-Russian expedition of O'Neill followed. Earthmen, she wrote in the 1960s, need
three forests."""


@pytest.mark.parametrize(
    "answer",
    [
        "It was led by Anna Weber.",
        "Weber's team and the Weber family",  # possessives
        "The work of Weber\u2019s team",  # the typographic apostrophe
        "an Algerian who led the UN mission",  # derived forms, initials
        "an Earthman at Lake Baikal",  # plurals
        "the Anglo-Russian team, an Anglo team, a Russian team",  # parts of a hyphened word
        "They counted 1250000 trees.",
        "They counted 1 250 000 trees, 3.5 metres thick.",
        "It took 25 years and 3 forests.",  # numbers in words
        "in the 1960s, in 1951, in the 1960\u2019s",
        "1. Forests matter.\n17) Trees do.\n- Weber led it.\n\u2022 Nobody knew.",  # lists
        "Everything changed. Nobody knew. \u201cNever,\u201d they said: \u201cGo.\u201d",
        "and O'Neill followed",
        "the United Nations' mission at Lake Bai",  # cut at the limit
        "the team counted 1,250,",  # and within a number
        "",
    ],
)
def test_what_the_text_holds_in_another_form_is_not_made_up(answer):
    assert [fact.text for fact in invented_facts(answer, TEXT)] == []


MORE = """In 2021-03 the U.S. Navy said it had spent $1,250,000 in 1914\u201318; half of it went to
Freetown, S\u00e3o Paulo and the Rocke\u00adfeller Institute. One hundred and twenty people came on
2019-12-05, from Germany, Italy, Spain and Rome, in the Second World War and before, about 1847 and
1990. Paul and Maria own 1.5 to 2 million shares; J. R. Smith, Mr. Parks and Br\u00f6nt\u00eb none.
Three decades, two dozen ships; the twenty-first century, the nineteenth; fund managers."""


@pytest.mark.parametrize(
    "answer",
    [
        "It cost 1.25 million, or 1.250.000, or 1 250 000.",
        "It ended in 1918, and the war of 1914-18 was over.",
        "some 50% went to Free Town and Free-Town",
        "people of Sao Paulo and of Sa\u0303o Paulo",  # accents, decomposed ones too
        "the US Navy, the U.S. Navy, an American ship",
        "and 120 people came in Dec. 2019, in December",
        "some Germans, Italians, Spanish and Romans",
        "during World War II, in the 19th century, in the '90s, the 21st and the 19th",
        "They own 1.5 million shares.",
        "they met J. Smith, Mrs. Bront\u00eb and Mr. Parks",  # titles, an initial of one letter
        "after 30 years with 24 ships",
        "What Rome Wants From Italy",  # a title, in which all is capitalized
        "That is plan B. Nobody knew. The U.S. Then it ended.",
        "It is so (Maria said no). See \u2018Never\u2019 and \u201cOnly\u201d.",
        "he came in Freetown; it was NOT it",
    ],
)
def test_forms_that_are_hard_to_read(answer):
    assert [fact.text for fact in invented_facts(answer, MORE)] == []


@pytest.mark.parametrize(
    ("answer", "invented"),
    [
        ("They met Paula and Mario.", ["Paula", "Mario"]),  # other people than Paul and Maria
        ("it cost $1.5 billion, or 125", ["1.5", "125"]),
        ("in the 17th century and the '80s", ["17", "80"]),
        ("and World War IV came", ["IV"]),
        (
            "in the city (Paris) of *France*; then Berlin - or Bonn",
            ["Paris", "France", "Berlin", "Bonn"],
        ),
        ("It was Dr. Miller of the E.U. Council", ["Miller", "E.U.", "Council"]),
        ("It was in Jan. 1999.", ["Jan", "1999"]),
        ("He said:\n17. Paris is it, in 17 days", ["17"]),
        ("in 192.168.100.200 and 1.2.7", ["192.168.100.200", "1.2", "7"]),
    ],
)
def test_what_is_made_up_among_hard_forms(answer, invented):
    assert [fact.text for fact in invented_facts(answer, MORE)] == invented


@pytest.mark.parametrize(
    ("answer", "invented"),
    [
        ("It was led by Anna Miller.", ["Miller"]),
        ("She died in 1952 at Lake Ladoga.", ["1952", "Ladoga"]),
        ("They counted 1,250 trees.", ["1,250"]),
        ("It is 3.4 metres thick, or 35.", ["3.4", "35"]),
        ("In April they counted 26 of them.", ["April", "26"]),
        ("Meeting Dr. Schmidt changed it.", ["Schmidt"]),  # a title's full stop ends no sentence
        ("and the Franco-Russian expedition", ["Franco"]),
        ("It was 40% of them.", ["40"]),
        ("a WHO mission", ["WHO"]),
        ("It was President Weber.", ["President"]),
        ("led by Weber and Ann,", ["Ann"]),  # the comma ends the name
    ],
)
def test_what_the_text_lacks_is_made_up(answer, invented):
    assert [fact.text for fact in invented_facts(answer, TEXT)] == invented


def test_facts_stand_where_they_say():
    answer = "In 1903 Anna Weber, a doctor, saw Lake Baikal."
    facts = find_facts(answer)
    assert [fact.text for fact in facts] == ["1903", "Anna", "Weber", "Lake", "Baikal"]
    assert all(answer[fact.start : fact.end] == fact.text for fact in facts)
    assert [fact.kind for fact in facts] == ["number"] + ["name"] * 4


@few
@given(st.text(alphabet="aZé\u2019'.,-19 \n½٣MVIX%(\u0301", max_size=60))
def test_what_a_text_says_itself_is_never_made_up(text):
    assert invented_facts(text, text) == []
    facts = find_facts(text)
    assert all(text[fact.start : fact.end] == fact.text for fact in facts)
    assert facts == sorted(set(facts))


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ("It was George W. Bush who came.", ["George", "Bush"]),
        ("It was J. Otto who came.", ["Otto"]),
        ("A book by J. R. R. Tolkien.", ["Tolkien"]),
        ("It holds vitamin C. Researchers like it.", []),
    ],
)
def test_an_initial_ends_no_sentence(answer, names):
    assert [fact.text for fact in find_facts(answer)] == names


def test_numbers_without_end_in_digits_and_in_words_are_read():
    long = "1" * 5000
    assert not invented_facts(f"They counted {long} trees.", f"There were {long} trees.")
    (fact,) = invented_facts("They counted 12 trees.", "hundred " * 200)
    assert fact.text == "12"
