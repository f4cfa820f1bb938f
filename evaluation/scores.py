"""Scores of samples: means, paired changes, and the table that eval.py and training print."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from reward import Box

ROWS = {  # row of the printed table: list of samples
    "cue search (IoU)": "cue",
    "find by text (IoU)": "find",
    "find by text (right object)": "find_right",
    "questions": "questions",
    "  about attributes": "questions_attribute",
    "  about places": "questions_place",
    "questions, rest blacked out": "suppressed",
}


def mean(values: Iterable[float | None]) -> float:
    """The mean of the values that are not None; 0 if there are none.

    >>> mean([1.0, None, 0.0])
    0.5
    """
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else 0.0


def paired(before: list[float | None], after: list[float | None], groups: list | None = None) -> dict:
    """The mean change of the samples that have both values, its standard error, and their number.

    groups: a key per sample; samples of one group (a question asked in four orders) are not independent.

    >>> paired([0, 0, 1, None], [1, 0, 1, 1], ["a", "b", "c", "d"])
    {'change': 0.3333333333333333, 'standard_error': 0.3333333333333333, 'n': 3}
    """
    samples = zip(before, after, groups or range(len(before)), strict=True)
    changes = [(b - a, group) for a, b, group in samples if a is not None and b is not None]
    mean_change, deviations = mean(change for change, _ in changes), defaultdict(float)
    # Deviations add up within a group, so equal samples of one group count as a single sample.
    for change, group in changes:
        deviations[group] += change - mean_change
    variance = sum(v**2 for v in deviations.values()) * len(deviations) / max(1, len(deviations) - 1)
    error = math.sqrt(variance) / max(1, len(changes))
    return {"change": mean_change, "standard_error": error, "n": len(changes)}


@dataclass
class Scores:
    """A model's scores on one set of samples. None in a list: that sample has no reply."""

    summary: dict  # as in results.json
    samples: dict[str, list[float | None]]  # name of a list: a value per sample
    boxes: list[Box | None]  # the predicted box of each cue, in pixels of the full image
    groups: dict[str, list] = field(default_factory=dict)  # for `paired`, where samples are not independent


def compare(before: Scores, after: Scores) -> dict[str, dict[str, float]]:
    """The paired change of every list of samples."""
    lists, groups = before.samples, before.groups
    return {name: paired(lists[name], after.samples[name], groups.get(name)) for name in lists}


def table(before: Scores, after: Scores | None = None, rows: dict[str, str] = ROWS) -> str:
    """The scores of one model, or of two with the change and its paired standard error, in points of 100."""
    models, changes = [before, after] if after else [before], compare(before, after) if after else {}
    lines = [f"{'held-out':28}{'n':>6}{'before':>9}" + f"{'after':>9}{'change':>16}" * bool(after)]
    for title, name in rows.items():
        samples = zip(*(scores.samples.get(name, []) for scores in models), strict=True)
        if samples := [values for values in samples if None not in values]:
            numbers = "".join(f"{100 * mean(column):9.1f}" for column in zip(*samples))
            change = "{change:+10.1f} ± {standard_error:.1f}" if after else ""
            points = {key: 100 * value for key, value in changes.get(name, {}).items()}
            lines.append(f"{title:28}{len(samples):6}{numbers}{change.format(**points)}")
    searched = [scores.summary["cue"] for scores in models if "cue" in scores.summary]
    for key in ("right_object", "parse_rate", "format") if searched else ():
        if key != "right_object" or "find" in before.summary:  # photos have no other objects to compare with
            numbers = "".join(f"{100 * cue[key]:9.1f}" for cue in searched)
            lines.append(f"{'cue search, ' + key.replace('_', ' '):28}{searched[0]['n']:6}{numbers}")
    return "\n".join(lines)
