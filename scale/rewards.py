"""The reward of LOCUS as EasyR1 and TRL call it. EasyR1 loads this file alone, by its path."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # EasyR1 runs in its own folder

from reward import Box, parse_box, reward

REWARD_NAME, REWARD_TYPE = "locus", "batch"  # EasyR1 reads both and calls compute_score (scale/README.md)


def true_box(given: Any) -> Box:
    """The ground truth from an engine, as "[x1, y1, x2, y2]" or a list of numbers; ValueError if invalid."""
    if (box := parse_box(f"<answer>{given}</answer>")) is None:
        raise ValueError(f"The ground truth {given!r} is not a box: give it as [x1, y1, x2, y2].")
    return box


def text_of(completion: Any) -> str:
    """The text of a completion, which is a string, or messages whose content is a string or text parts."""
    if isinstance(completion, dict):
        completion = completion.get("content", completion.get("text"))
    if isinstance(completion, list):
        return "".join(map(text_of, completion))
    return completion if isinstance(completion, str) else ""


def compute_score(reward_inputs: list[dict], opening: str = "", alpha: float = 0.1, **_: Any) -> list[dict]:
    """For EasyR1: `overall`, `format` and `accuracy` (the IoU) from each `response` and `ground_truth`."""
    pairs = [(opening + text_of(x["response"]), true_box(x["ground_truth"])) for x in reward_inputs]
    scored = [reward(text, box, alpha) for text, box in pairs]
    return [{"overall": r.total, "format": r.format, "accuracy": r.iou} for r in scored]


def box_reward(completions: list, box: list, opening: list[str] | None = None, **_: Any) -> list[float]:
    """For TRL: the reward of each completion; `box` and `opening` are columns of the export."""
    rows = zip(completions, box, opening or [""] * len(completions), strict=True)
    return [reward(start + text_of(completion), true_box(truth)).total for completion, truth, start in rows]
