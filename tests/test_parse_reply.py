import dataclasses
from pathlib import Path

import pytest
import yaml
from conftest import teacher_reply
from hypothesis import given
from hypothesis import strategies as st

from data_prep.teacher.parsing import ParseError, parse_reply, read_better
from prompts import load_task

TASK = load_task()
CASES = yaml.safe_load((Path(__file__).parent / "fixtures/replies.yaml").read_text())


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_replies_written_by_hand(case):
    if "error" in case:
        with pytest.raises(ParseError, match=case["error"]):
            parse_reply(case["reply"], TASK)
        return
    parsed = parse_reply(case["reply"], TASK)
    assert list(parsed.answers) == case["summaries"]
    assert list(parsed.scores) == case["scores"]
    assert parsed.best == case["best"] - 1


def test_criteria_are_kept():
    parsed = parse_reply(teacher_reply(scores=(14, 14)), TASK)
    assert parsed.criteria[0] == {"coherence": 5, "consistency": 5, "fluency": 3, "relevance": 1}


TITLES = dataclasses.replace(load_task(), label="Title", criteria={"accuracy": 5, "Plain words": 3})


def test_the_label_and_the_criteria_are_the_tasks():
    reply = (
        "**Title 1:** Ice on lakes\nCoherence: of lakes\nAccuracy: 5\nPlain words: 2\nTotal: 7\n"
        "**Second title:** Lakes\nTotal score for title 2: 4/8\n\nBest title: Title 1"
    )
    parsed = parse_reply(reply, TITLES)
    assert parsed.answers == ("Ice on lakes\nCoherence: of lakes", "Lakes")
    assert parsed.scores == (7, 4) and parsed.best == 0
    assert parsed.criteria == ({"accuracy": 5, "Plain words": 2}, {})
    for wrong, why in ((reply.replace("7", "9"), "outside 2 to 8"), (teacher_reply(), "no two")):
        with pytest.raises(ParseError, match=why):
            parse_reply(wrong, TITLES)


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ("Better: 1", 1),
        ("Better: Summary 1", 1),
        ("Better summary: 2", 2),
        ("**Better:** 2", 2),
        ("Better - 1", 1),
        ("Better: 0", 0),
        ("Better: **0** (neither)", 0),
        ("Better: neither", 0),
        ("### Better\n2", 2),
        ("Better: the second summary.", 2),
        ("The better summary is Summary 1, for it is true.", 1),
        ("Reason: Better: 1 is told by the first.\nSummary 1: 4 5 3 4\nBetter: 2", 2),
        ("Better: 1\n\nOn second thought:\nBetter: 2", 2),
        ("<think>Better: 1</think>\nBetter: 2", 2),
        ("Better: (1, 2 or 0)", None),
        ("Better: 1 or 2", None),
        ("Better: 1/2", None),
        ("Better: 1 / 2", None),
        ("Better: 12", None),
        ("Better luck next time", None),
        ("<think>\nBetter: 1", None),
        ("", None),
    ],
)
def test_the_better_one_of_a_pair(text, better):
    assert read_better(text, TASK) == better
    of_titles = text.replace("Summary", "Title").replace("summary", "title")
    assert read_better(of_titles, TITLES) == better


words = st.sampled_from(
    [
        "lakes",
        "freeze",
        "Ice:",
        "score",
        "the best",
        "one",
        "2",
        "(see 3/4)",
        "summary 1",
        "Total",
        "5 + 5",
        "été",
        "a*b",
        "evaluation of it",
        "x_1",
    ]
)
sentences = st.lists(words, min_size=1, max_size=8).map(lambda w: f"The {' '.join(w)} end.")
# What looks like a field and is none, as no number stands in it or a sentence follows.
like_fields = st.sampled_from(
    ["Rating: R.", "Evaluation: mixed.", "Relevance: to fish.", "Score: 3 to 1\nThe end."]
)
bullets = st.lists(sentences, min_size=1, max_size=3).map(lambda s: "\n".join(f"- {x}" for x in s))
summaries = st.lists(st.one_of(sentences, bullets, like_fields), min_size=1, max_size=3).map(
    "\n\n".join
)


@st.composite
def rendered(draw):
    """A known pair, its scores, and a reply that carries them in a random mixture of shapes."""

    def pick(*options):
        return draw(st.sampled_from(options))

    texts = draw(st.tuples(summaries, summaries))
    criteria = [draw(st.tuples(*[st.integers(1, top) for top in (5, 5, 3, 5)])) for _ in range(2)]
    scores = [sum(four) for four in criteria]
    best = 2 if scores[1] > scores[0] else 1
    mark = pick("{}:", "**{}:**", "**{}**:", "### {}", "### {}:", "__{}__:", "- {}:", "[{}]:")
    case = pick(str, str.upper, str.lower)

    def label(text, same_line=True):
        end = pick(" ", "\n", " \n") if same_line and not mark.startswith("#") else "\n"
        return mark.format(case(text)) + end

    def number(four):
        value = sum(four)
        return pick(
            f"{value}",
            f"{value}/18",
            f"**{value}**",
            f"<{value}>",
            f"{value} out of 18",
            f"{' + '.join(map(str, four))} = {value}",
            f"{value} points.",
        )

    def field(text, value):
        return f"{pick('{}:', '**{}:**', '- **{}**:', '* {}:').format(case(text))} {value}"

    parts = [pick("", "Sure, here they are.\n\n", "<think>\nSummary 1: no\n</think>\n")]
    for n in (0, 1):
        head = pick("Summary {}", "Summary #{}", "Summary {} (note)").format(n + 1)
        names = ("Coherence", "Consistency", "Fluency", "Relevance")
        listed = [field(name, value) for name, value in zip(names, criteria[n], strict=True)]
        fields = [*pick(listed, []), field(pick("Total score", "Total"), number(criteria[n]))]
        explanation = field("Explanation", "It is what it is.")
        fields.insert(pick(0, len(fields)), explanation)
        gap = pick("\n", "\n\n", "\n\n---\n\n")
        parts += [label(head), texts[n], gap, "\n".join(fields), pick("\n", "\n\n", "\n---\n")]
    parts.append(
        f"{label('Best summary')}{pick('{}', 'Summary {}', '**{}**', 'Summary {}.').format(best)}"
    )
    reply = "".join(parts)
    if pick(True, False):
        reply = f"```\n{reply}\n```"
    return texts, scores, best, pick(reply, reply.replace("\n", "\r\n"))


@given(rendered())
def test_every_mixture_of_shapes_gives_the_exact_pair_back(known):
    texts, scores, best, reply = known
    parsed = parse_reply(reply, TASK)
    assert (parsed.answers, list(parsed.scores), parsed.best + 1) == (texts, scores, best)


@pytest.mark.parametrize("start", ["Summary", "Summary 1", "Better", "Total score for", ""])
def test_a_long_run_of_blanks_is_read_at_once(start):
    blank = start + " " * 50_000 + "x"
    with pytest.raises(ParseError):
        parse_reply(f"Summary 1\n{blank}\nSummary 2\n{blank}\nBest summary: 1", TASK)


@given(st.text())
def test_any_text_is_read_or_refused(text):
    try:
        read_better(text, TASK)
        parse_reply(text, TASK)
    except ParseError as error:
        assert str(error)
