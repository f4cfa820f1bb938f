"""Choices, yes/no and boxes, read from replies that templates make for an answer that is known."""

import pytest

from evaluation.replies import box_of, choice_of, yes_no
from tests.evaluation.reply_templates import CHOICE, box_replies, choice_replies, yes_no_replies

COLORS = {"A": "red", "B": "blue", "C": "green"}
DEGREES = {"A": "20°C", "B": "25°C", "C": "30°C"}
GATES = {"A": "Gate B", "B": "Gate C", "C": "Gate A"}


def agreement(pairs: list[tuple]) -> float:
    """The share of (read, meant) pairs that are equal."""
    return sum(read == meant for read, meant in pairs) / len(pairs)


def test_choices_are_read_as_they_are_meant():
    replies = list(choice_replies())
    assert len(CHOICE) >= 60 and len(replies) >= 5000
    assert agreement([(choice_of(reply, options), meant) for reply, options, meant, _ in replies]) >= 0.98


def test_yes_and_no_are_read_as_they_are_meant():
    assert agreement([(yes_no(reply), meant) for reply, meant, _ in yes_no_replies()]) >= 0.98


def test_boxes_are_read_as_they_are_meant():
    assert agreement([(box_of(reply), meant) for reply, meant, _ in box_replies()]) >= 0.97


@pytest.mark.parametrize(
    ("reply", "options", "letter"),
    [
        ("The answer is A not B", COLORS, "A"), ("Option A fits", COLORS, "A"), ("B-blue", COLORS, "B"),
        ("A. red / B. blue / So B.", COLORS, "B"), ("A. red\nB. blue\nC. green", COLORS, None),
        ("25°C", DEGREES, "B"), ("25 °C", DEGREES, "B"), ("It is 30°C there.", DEGREES, "C"),
        ("Gate B", GATES, "A"), ("It is Gate B.", GATES, "A"), ("\\boxed{Gate B}", GATES, "A"),
        ("<answer>Gate B</answer>", GATES, "A"), ("B", GATES, "B"), ("B. Gate C", GATES, "B"),
        ("The answer is B, A is wrong", COLORS, "B"), ("A is wrong, B is correct.", COLORS, "B"),
        ("Neither A nor C", COLORS, None), ("Not B.", COLORS, None),
        ("It can't be A, B, or C.", COLORS, None),
        ("Rather than A, B", COLORS, "B"), ("It is not red but green.", COLORS, "C"), ("选B", COLORS, "B"),
        ("不是A，是B", COLORS, "B"), ("Ｂ", COLORS, "B"), ("（Ｂ）", COLORS, "B"), ("_B_", COLORS, "B"),
        ("I exclude nothing: B and C", COLORS, None), ("We take option A or option B", COLORS, None),
        ("It is a blue car, so C", COLORS, "C"), ("Answer: A red car", COLORS, "A"), ("25", {"A": "25"}, "A"),
        ("The letter on the wall is \"B\"", {"A": "B", "B": "A"}, "B"), ("\ue000", COLORS, None),
    ],
)  # fmt: skip
def test_a_choice(reply, options, letter):
    assert choice_of(reply, options) == letter


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Yes/No", None), ("Yes. No.", None), ("_No_", "no"), ("No doubt, yes.", "yes"),
        ("No dog here.", "no"),
        ("yes, there is no doubt", "yes"), ("There are no dogs, so yes.", "yes"),
        ("It is there: no doubt.", None),
        ("The answer is no, not yes.", "no"), ("No, there are no dogs.", "no"), ("ＮＯ", "no"),
    ],
)  # fmt: skip
def test_yes_or_no(reply, answer):
    assert yes_no(reply) == answer


TWO = '[{"bbox_2d": [1, 2, 30, 40], "label": "a, b"}, {"bbox_2d": [3, 4, 50, 60], "label": "c"}]'


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        (TWO, (1, 2, 30, 40)), (f"```json\n{TWO}\n```", (1, 2, 30, 40)),
        ("[[1, 2, 30, 40], [3, 4, 50, 60]]", (1, 2, 30, 40)),
        (f"{TWO} But rather [5, 6, 7, 8].", (5, 6, 7, 8)),
        ("It is [1, 2, 30, 40], or [3, 4, 50, 60]", (3, 4, 50, 60)),
        ("(1,2),(30,40)", (1, 2, 30, 40)), ("from (1, 2) to (30, 40)", (1, 2, 30, 40)),
        ("1 2 30 40", (1, 2, 30, 40)),
        ("1, 2, 30, 40", (1, 2, 30, 40)), ("(1, 2, 30, 40)", (1, 2, 30, 40)),
        ("x1=1, y1=2, x2=30, y2=40", (1, 2, 30, 40)),
        ("[30, 40, 1, 2]", None), ("[1, 2, 30, 40, 5]", None), ("[0, 1, 2, 30, 40]", None), ("(1, 2)", None),
        ("[1, 2, 30, 9999999999]", None), ("<think>[1, 2, 30, 40]</think> nowhere", None),
    ],
)  # fmt: skip
def test_a_box(reply, box):
    assert box_of(reply) == box
