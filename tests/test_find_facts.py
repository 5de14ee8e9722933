"""Names and numbers that an answer made up, by hand-written cases."""

import pytest

from data_prep.find_facts import find_facts, invented_facts

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
        "1. Forests matter.\n2. Trees do.\n- Weber led it.",  # a list
        "Everything changed. Nobody knew. \u201cNever,\u201d they said: \u201cGo.\u201d",
        "and O'Neill followed",
        "the United Nations' mission at Lake Bai",  # cut at the limit
        "",
    ],
)
def test_what_the_text_holds_in_another_form_is_not_made_up(answer):
    text = TEXT + " 1. First point. 2. Second point."
    assert [fact.text for fact in invented_facts(answer, text)] == []


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
