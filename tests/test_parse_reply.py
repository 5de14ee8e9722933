from pathlib import Path

import pytest
import yaml
from conftest import teacher_reply
from hypothesis import given
from hypothesis import strategies as st

from data_prep.teacher.parsing import ParseError, parse_reply

CASES = yaml.safe_load((Path(__file__).parent / "fixtures/replies.yaml").read_text())


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_replies_written_by_hand(case):
    if "error" in case:
        with pytest.raises(ParseError, match=case["error"]):
            parse_reply(case["reply"])
        return
    parsed = parse_reply(case["reply"])
    assert list(parsed.summaries) == case["summaries"]
    assert list(parsed.scores) == case["scores"]
    assert parsed.best == case["best"] - 1


def test_criteria_are_kept():
    parsed = parse_reply(teacher_reply(scores=(14, 14)))
    assert parsed.criteria[0] == {"coherence": 5, "consistency": 5, "fluency": 3, "relevance": 1}


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
bullets = st.lists(sentences, min_size=1, max_size=3).map(lambda s: "\n".join(f"- {x}" for x in s))
summaries = st.lists(st.one_of(sentences, bullets), min_size=1, max_size=3).map("\n\n".join)


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
    parsed = parse_reply(reply)
    assert (parsed.summaries, list(parsed.scores), parsed.best + 1) == (texts, scores, best)


@given(st.text())
def test_any_text_is_read_or_refused(text):
    try:
        parse_reply(text)
    except ParseError as error:
        assert str(error)
