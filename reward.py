"""The reward of LOCUS: 0.9 · IoU of the answered box + 0.1 · format. Needs nothing but Python.

    reward("<think>top left</think><answer>[10, 20, 50, 80]</answer>", (10, 20, 50, 60)).total  ->  0.7

Boxes are (x1, y1, x2, y2) in the model's own frame, whatever its units: scaling an axis of both boxes does
not change their IoU, so no image size is needed here.
"""

import re
from dataclasses import dataclass

Box = tuple[float, float, float, float]

# At most nine digits a side of the point: no number overflows, and the match stays linear in the text.
NUMBER = r"\s*([+-]?[0-9]{1,9}(?:\.[0-9]{0,9})?)\s*"
BOX = re.compile(rf"\s*\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]\s*")


@dataclass(frozen=True)
class Reward:
    """One completion's reward; `iou` is 0 where no valid box was answered."""

    total: float
    iou: float
    format: float


def answer_of(text: str) -> str | None:
    """What stands inside the answer tags; None unless there is exactly one answer block."""
    before, opening, rest = text.partition("<answer>")
    answer, closing, after = rest.partition("</answer>")
    if (
        not (opening and closing)
        or "</answer>" in before
        or "<answer>" in answer + after
        or "</answer>" in after
    ):
        return None
    return answer


def parse_box(text: str) -> Box | None:
    """b̂ = Parse(ŷ): the box (x1, y1, x2, y2) inside the one answer block, in the model's frame.

    Spaces, line ends and decimals are allowed; anything beside the four numbers, and a box that is inverted
    or empty, is None. Never raises, whatever the text.
    """
    match = BOX.fullmatch(answer_of(text) or "")
    if match is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in match.groups())
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes in one frame, 0 to 1; empty, inverted and NaN boxes have 0."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    if not (width > 0 and height > 0 and union > 0):  # written so that a NaN is caught too
        return 0.0
    return min(1.0, intersection / union)


def format_reward(text: str) -> float:
    """r_format: 1 if the text is `<think>…</think><answer>…</answer>`, each tag once, nothing else; or 0."""
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0
    before, _, rest = text.partition("<think>")
    _, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    _, closing, after = rest.partition("</answer>")
    return float(bool(closing) and not (before + between + after).strip())


def reward(text: str, box: Box, alpha: float = 0.1) -> Reward:
    """r = (1 − α) · r_loc + α · r_format, with r_loc = IoU(b̂, b*) or 0 (PAPER §2).

    text: the completion, with the opening that its prompt may have given ("<think>" of a Thinking template);
    box: the true box b* in the model's frame.
    """
    answered = parse_box(text)
    overlap = iou(answered, box) if answered is not None else 0.0
    structure = format_reward(text)
    return Reward((1 - alpha) * overlap + alpha * structure, overlap, structure)
