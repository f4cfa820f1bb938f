"""The reward of LOCUS: 0.9 · IoU of the predicted box + 0.1 · format. Needs nothing but Python.

What differs from a typical verifiable reward:
- Boxes are compared in the model's own frame, whatever its units. Scaling an axis of both boxes does not
  change their IoU, so the reward needs neither the image nor its size.
- A completion with no box, two boxes or an inverted box scores IoU 0. Nothing raises, whatever the text.
"""

import re
from dataclasses import dataclass

Box = tuple[float, float, float, float]  # (x1, y1, x2, y2), right and bottom edge exclusive

# At most nine digits on each side of the point: no number overflows, and matching stays linear in the text.
NUMBER = r"\s*([+-]?[0-9]{1,9}(?:\.[0-9]{0,9})?)\s*"
# The box as a bare list, or as Qwen writes it: {"bbox_2d": [1, 2, 3, 4], "label": "cup"}, by itself or alone
# in a list, and either with or without a code fence. What is opened has to be closed: (?(name)…).
LABEL = r'\s*"label"\s*:\s*"[^"\\]*(?:\\.[^"\\]*)*"\s*'
BOX_PATTERN = re.compile(
    r"\s*(?P<fence>```(?:json)?\s*)?(?P<list>\[\s*(?={))?"
    rf'(?P<object>{{(?:{LABEL},)?\s*"bbox_2d"\s*:\s*)?'
    rf"\[(?P<numbers>{NUMBER},{NUMBER},{NUMBER},{NUMBER})\]\s*"
    rf"(?(object)(?:,{LABEL})?}}\s*)(?(list)\]\s*)(?(fence)```\s*)",
    re.DOTALL,
)
FORMAT_PATTERN = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class Reward:
    """The reward of one completion; `iou` is 0 where it has no valid box."""

    total: float
    iou: float
    format: float


def answer_of(text: str) -> str | None:
    """The text inside the answer tags; None unless there is exactly one answer block.

    >>> answer_of("<think>top left</think><answer>[1, 2, 3, 4]</answer>")
    '[1, 2, 3, 4]'
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    answer_text, closing_tag, _ = text.partition("<answer>")[2].partition("</answer>")
    return answer_text if closing_tag else None


def parse_box(text: str) -> Box | None:
    """b̂ = Parse(ŷ): the box (x1, y1, x2, y2) inside the one answer block, in the model's frame.

    Spaces, line breaks and decimals are allowed, and up to nine digits on each side of the point. Anything
    beside the one box gives None, and so does a box that is inverted or empty.

    >>> parse_box("<answer>[10, 20.5, 30, 40]</answer>")
    (10.0, 20.5, 30.0, 40.0)
    >>> parse_box('<answer>[{"bbox_2d": [10, 20, 30, 40], "label": "cup"}]</answer>')
    (10.0, 20.0, 30.0, 40.0)
    >>> parse_box("<answer>[30, 40, 10, 20]</answer>") is None
    True
    """
    match = BOX_PATTERN.fullmatch(answer_of(text) or "")
    if match is None:
        return None
    x1, y1, x2, y2 = (float(coordinate_text) for coordinate_text in match["numbers"].split(","))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def iou(box_a: Box, box_b: Box) -> float:
    """Intersection over union of two boxes in one frame, from 0 to 1.

    >>> iou((0, 0, 2, 2), (1, 0, 3, 2))  # 2 of the 6 units that either box covers
    0.3333333333333333
    """
    overlap_width = min(box_a[2], box_b[2]) - max(box_a[0], box_b[0])
    overlap_height = min(box_a[3], box_b[3]) - max(box_a[1], box_b[1])
    intersection_area = overlap_width * overlap_height
    area_a = (box_a[2] - box_a[0]) * (box_a[3] - box_a[1])
    area_b = (box_b[2] - box_b[0]) * (box_b[3] - box_b[1])
    union_area = area_a + area_b - intersection_area
    # Written with "not", because every comparison with a NaN is false.
    if not (overlap_width > 0 and overlap_height > 0 and union_area > 0):
        return 0.0
    return min(1.0, intersection_area / union_area)


def format_reward(text: str) -> float:
    """r_format: 1 if the text is `<think>…</think><answer>…</answer>`, each tag once; else 0."""
    tags_occur_once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return float(tags_occur_once and FORMAT_PATTERN.fullmatch(text) is not None)


def reward(text: str, target_box: Box, alpha: float = 0.1) -> Reward:
    """r = (1 − α) · r_loc + α · r_format (Section 3.3), where r_loc = IoU(b̂, b*), or 0 without a valid b̂.

    text: the completion, with the prefix that its chat template wrote ("<think>" for a Thinking model);
    target_box: the ground truth b* in the model's frame.

    >>> reward("<think>top left</think><answer>[10, 20, 50, 80]</answer>", (10, 20, 50, 60)).total
    0.7
    """
    predicted_box = parse_box(text)
    box_iou = iou(predicted_box, target_box) if predicted_box is not None else 0.0
    format_score = format_reward(text)
    return Reward((1 - alpha) * box_iou + alpha * format_score, box_iou, format_score)
