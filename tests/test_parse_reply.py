import contextlib
import dataclasses
import time
from pathlib import Path

import pytest
import yaml
from conftest import teacher_reply
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.parse_replies import ParseError, parse_answer, parse_reply, read_better
from data_prep.teacher.judge import pair_requests, points
from prompts.task import load_task

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


def test_emphasis_in_an_answer_stays_and_that_around_its_label_goes():
    for label in ("**Summary 1:** {}", "* Summary 1: {}", "__Summary 1__: {}", "[Summary 1]: {}"):
        for text in ("*Nature* says **so**.", "So says *Nature*", "_So_ it is"):
            first = label.format(text) + "\nTotal score: 16\n"
            second = label.format(text).replace("1", "2") + "\nTotal score: 12\nBest summary: 1"
            assert parse_reply(first + second, TASK).answers == (text, text)


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


PAIR = "Summary 1: Lakes.\n{}\nSummary 2: Ice.\n{}\n{}"


@pytest.mark.parametrize(
    ("first", "second", "verdict", "best", "scores"),
    [
        ("Total score: 16", "Total score: 12", "Best summary: 1", 0, (16, 12)),
        ("Total score: 14", "Total score: 14", "Best summary: 2", 1, (14, 14)),
        ("Total score: 14", "Total score: 14", "", None, (14, 14)),
        ("Total score: 12", "Total score: 14", "", 1, (12, 14)),
        ("Total score: 12", "Total score: 14", "Best summary: 1", None, (12, 14)),
        ("", "", "Best summary: 2", 1, (None, None)),
        ("", "Explanation: short.", "", None, (None, None)),
        ("Total score: 99", "Total score: 14 to 16", "", None, (None, None)),
    ],
)
def test_two_answers_are_read_though_nothing_tells_them_apart(first, second, verdict, best, scores):
    parsed = parse_reply(PAIR.format(first, second, verdict), TASK, rated=False)
    assert (parsed.answers, parsed.best, parsed.scores) == (("Lakes.", "Ice."), best, scores)


TITLE = load_task("title")


@pytest.mark.parametrize(
    "reply",
    [
        "Ice on lakes",
        "Title: Ice on lakes",
        "**Title:** Ice on lakes",
        "**Title: Ice on lakes**",
        "# Title\n\nIce on lakes",
        '"Ice on lakes"',
        '**"Ice on lakes"**',
        "```\nIce on lakes\n```",
        "<think>A title: short.</think>\n\nIce on lakes\n",
        "Here is the title:\n\nIce on lakes",
        "Sure! Here's a fitting title for this text:\n\n**Title:** *Ice on lakes*",
    ],
)
def test_one_answer_without_what_stands_around_it(reply):
    assert parse_answer(reply, TITLE) == "Ice on lakes"


@pytest.mark.parametrize(
    "reply",
    ["Title insurance: a history", "Lakes: the title", "Here is the sea: a title\nof two lines"],
)
def test_an_answer_that_speaks_of_titles_is_left_whole(reply):
    assert parse_answer(reply, TITLE) == reply


@pytest.mark.parametrize(
    "reply", ["", " \n", "**Title:**", "```\n```", "<think>Title: x", "[title]"]
)
def test_no_answer_is_said(reply):
    with pytest.raises(ParseError, match=r"an empty title|cut off while thinking"):
        parse_answer(reply, TITLE)


def test_pairs_are_judged_in_both_orders_and_points_are_of_the_first_answer():
    rows = [{"id": str(i), "text": f"text {i}"} for i in range(4)]
    ones = {str(i): f"one {i}" for i in range(4)}
    twos = {"0": "two 0", "1": "two 1", "2": "two 2", "3": "one 3 "}  # the last are alike
    requests = pair_requests(rows, ones, twos, TASK)
    assert [r["id"] for r in requests] == [f"{i} | {o}" for i in "012" for o in ("first", "second")]
    shown = [request["messages"][0]["content"] for request in requests]
    assert shown[0].index("one 0") < shown[0].index("two 0")
    assert shown[1].index("one 0") > shown[1].index("two 0")
    assert len({request["settings"]["prompt"] for request in requests}) == 6
    verdicts = ["Better: 1", "Better: 2", "Better: 2", "Better: 0", "Better: ?"]
    replies = {r["id"]: {"text": v} for r, v in zip(requests, verdicts, strict=False)}
    won = points(requests, replies, TASK)
    assert won.loc["0"].tolist() == [1, 1] and won.loc["1"].tolist() == [0, 0.5]
    assert won.loc["2"].isna().all() and list(won.columns) == ["first", "second"]
    assert list(points([], {}, TASK).columns) == ["first", "second"]


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


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
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


@pytest.mark.parametrize(
    "reply",
    [
        "The paper's title statistics are:\nmean 5",
        "Here is what the title of it says:\nIce floats",
        "Yes, lakes freeze for two reasons:\nice floats",
        "The tag <think> opens a thought and </think> closes it.",
        "Ice.\n\n```python\nprint(1)\n```\n\nLakes.",
        "```python\na\n```\nand\n```\nb\n```",
        "Close it so:\n```\n</think>\n```\nand go on.",
        "Part one\n\n---\n\nPart two",
        "Deep:\n" + " " * 40 + "in.",
    ],
)
def test_what_an_answer_holds_itself_stays(reply):
    assert parse_answer(reply, TITLE) == reply


@pytest.mark.parametrize(
    "reply",
    [
        "Sure:\nIce on lakes",
        "A fitting title would be:\n\nIce on lakes",
        "Certainly! Below is a title of the text:\nIce on lakes",
        "I suggest the following title:\nIce on lakes",
        "The user wants a title. So: ice.\n</think>\n\nIce on lakes",
        "<think>a</think><think>b</think>\n```\nIce on lakes\n```",
        "Here is the title:\n```text\nIce on lakes\n```",
        "```\nIce on lakes",
        "\ufeffIce on lakes\r",
    ],
)
def test_more_that_stands_around_an_answer(reply):
    assert parse_answer(reply, TITLE) == "Ice on lakes"


def test_a_code_block_that_ends_an_answer_stays_and_fences_of_the_parts_go():
    reply = PAIR.replace("Lakes.", "Run:\n```\nls\n```").replace("Ice.", "```\nIce.\n```")
    reply = reply.format("Total score: 16", "Total score: 12", "Best summary: 1")
    assert parse_reply(reply, TASK).answers == ("Run:\n```\nls\n```", "Ice.")
    apart = "```\nSummary 1: Lakes.\n```\n```\nSummary 2: Ice.\n```\nBest summary: 1"
    assert parse_reply(apart, TASK, rated=False).answers == ("Lakes.", "Ice.")


def test_labels_and_criteria_with_markup_in_them_are_found():
    task = dataclasses.replace(
        TASK, label="*Plain_text*", criteria={"is_true": 5, "[short]": 5, "\u017f": 5}
    )
    reply = (
        "**Plain_text 1:** One.\nis_true: 5\n- **[short]**: 4\nS: 3\nTotal score: 12\n"
        "*Plain_text* 2: Two.\nIs true: 2\nTotal score: 5\nBest plain_text: 1"
    )
    parsed = parse_reply(reply, task)
    assert parsed.answers == ("One.", "Two.") and parsed.scores == (12, 5)
    assert parsed.criteria == ({"is_true": 5, "[short]": 4, "\u017f": 3}, {"is_true": 2})


@pytest.mark.parametrize(
    "reply",
    [
        None,
        ["a"],
        b"x",
        "x" * 400_000,
        "\ud83d" * 9_000,
        "\0" * 90_000,
        "<think>" * 20_000,
        "<think>a</think>\n```\n" * 5_000,
        "```\n" * 20_000,
        "Summary" + " \t" * 50_000 + "x",
        "Total score of" + " \t" * 50_000 + "!",
        "best is" + " :" * 50_000 + "x",
        "title " * 20_000 + ":\nx",
        "---\n" * 20_000,
        "Summary\n \n" * 10_000,
        "\u017fecond \u017fummary: x\nbe\u017ft: 1",
        "Summary 1: x\nTotal: " + "9" * 400 + "\nSummary 2: y\nTotal: \u0665\nBest: f\u0131rst",
    ],
)
def test_odd_replies_are_read_or_refused_at_once(reply):
    started = time.monotonic()
    for read in (parse_reply, parse_answer, read_better):
        with contextlib.suppress(ParseError):
            read(reply, TASK)
    assert time.monotonic() - started < 3


def test_half_an_emoji_can_be_written():
    assert parse_answer("Ice \ud83d\ude00 on \ud83d", TITLE) == "Ice \U0001f600 on \ufffd"
