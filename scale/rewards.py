"""The reward of LOCUS as EasyR1 and TRL call it. EasyR1 loads this one file by its path."""

import sys
from pathlib import Path
from typing import Any

if (root := str(Path(__file__).resolve().parents[1])) not in sys.path:
    sys.path.insert(0, root)  # EasyR1 imports from a folder of its own

from reward import Box, parse_box, reward

REWARD_NAME, REWARD_TYPE = "locus", "batch"  # EasyR1 reads them, and calls compute_score (scale/README.md)


def true_box(given: Any) -> Box:
    """b* as an engine hands it over, "[x1, y1, x2, y2]" or a list of numbers; ValueError names another."""
    if (box := parse_box(f"<answer>{given}</answer>")) is None:
        raise ValueError(f"The ground truth {given!r} is no box: give it as [x1, y1, x2, y2].")
    return box


def text_of(completion: Any) -> str:
    """The words of a completion: a text, or messages with a text or text parts as content."""
    if isinstance(completion, dict):
        completion = completion.get("content", completion.get("text"))
    if isinstance(completion, list):
        return "".join(map(text_of, completion))
    return completion if isinstance(completion, str) else ""


def compute_score(reward_inputs: list[dict], opening: str = "", alpha: float = 0.1, **_: Any) -> list[dict]:
    """EasyR1's: `response` and `ground_truth` to `overall`, `format` and `accuracy` (the IoU) of each."""
    pairs = [(opening + text_of(x["response"]), true_box(x["ground_truth"])) for x in reward_inputs]
    scored = [reward(text, box, alpha) for text, box in pairs]
    return [{"overall": r.total, "format": r.format, "accuracy": r.iou} for r in scored]


def box_reward(completions: list, box: list, opening: list[str] | None = None, **_: Any) -> list[float]:
    """TRL's: the reward of each completion; `box` and `opening` are columns of the data (scale/export.py)."""
    rows = zip(completions, box, opening or [""] * len(completions), strict=True)
    return [reward(begun + text_of(answer), true_box(b)).total for answer, b, begun in rows]
