"""One fact of an answer exchanged for another of its kind."""

from data_prep.corrupt_answers import corrupt, find_entities
from data_prep.find_facts import invented_facts

TEXT = "Then Anna Weber met Karl Otto Braun in March 1951 and counted 300 trees at Lake Baikal."
OTHER = "In the end Maria Rossi left Rome in April 1888 with 12 books for the Bank of England."


def test_entities_are_whole_names_months_years_and_numbers():
    found = [(entity.text, entity.kind) for entity in find_entities(TEXT)]
    assert found == [
        ("Anna Weber", "name"),
        ("Karl Otto Braun", "name"),
        ("March", "month"),
        ("1951", "year"),
        ("300", "number"),
        ("Lake Baikal", "name"),
    ]
    assert "Bank of England" in [entity.text for entity in find_entities(OTHER)]


def test_one_fact_alone_differs_and_the_text_lacks_it():
    answer = "In 1951 she and Karl Otto Braun counted 300 trees."
    for number in range(20):
        corrupted = corrupt(answer, [OTHER], f"id {number}")
        assert corrupted != answer
        assert len(corrupted.split()) - len(answer.split()) in (-1, 0, 1)
        assert invented_facts(corrupted, TEXT)
    assert len({corrupt(answer, [OTHER], f"id {number}") for number in range(20)}) == 3


def test_the_draw_depends_on_the_seed_alone():
    answer = "In 1951 she and Anna Weber counted 300 trees."
    assert corrupt(answer, [OTHER], "a") == corrupt(answer, [OTHER], "a")


def test_a_kind_is_exchanged_for_its_own():
    assert corrupt("It was in March that they came.", [OTHER], "x") == (
        "It was in April that they came."
    )
    assert corrupt("They were 300.", [OTHER], "x") == "They were 12."
    assert corrupt("It was 1951.", [OTHER], "x") == "It was 1888."


def test_from_its_own_text_what_the_answer_has_not_named_is_taken():
    answer = "In 1951 Anna Weber was there, and Weber counted."
    assert corrupt("They saw Lake Baikal.", [TEXT], "x") == "They saw Anna Weber."
    assert corrupt(answer, [TEXT], "x") not in (None, answer)
    assert "Weber" not in corrupt("In it Anna Weber wins.", ["Then Weber saw Rome."], "x")


def test_an_initial_is_not_exchanged():
    assert corrupt("It is a U.S. state.", [OTHER], "x") is None
    assert corrupt("It was J. Otto who came.", ["Then B. Weber came."], "x") == (
        "It was J. Weber who came."
    )


def test_without_an_entity_there_is_nothing_to_exchange():
    assert corrupt("Nothing happened there.", [OTHER], "x") is None
    assert corrupt("They were 300.", ["Nobody came."], "x") is None


def test_a_number_of_more_digits_than_python_reads_is_a_number():
    long = "1" * 5000
    assert corrupt(f"They were {long}.", [OTHER], "x") == "They were 12."
    assert corrupt("They were 300.", [f"Then they were {long}."], "x") == f"They were {long}."
