"""Scores of samples: means, paired changes, and the table that eval.py and training print."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward import Box
from tiny.scenes import KINDS, SIDES


def kind_rows(title: str, task: str) -> dict[str, str]:
    """Rows of the printed table: a list of samples for every kind of question and size of its object."""
    return {title.format(kind, size): f"{task}_{kind}_{size}" for kind in KINDS for size in SIDES}


# Row of the printed table: list of samples.
ROWS = {"cue search (IoU)": "cue"} | {f"  {size} windows": f"cue_{size}" for size in SIDES}
ROWS |= {"cue search, right object": "cue_right", "cue search, parse rate": "cue_parsed"}
ROWS |= {"cue search, format": "cue_format", "cue search, detail in the thought": "named_detail"}
ROWS |= {"find by text (IoU)": "find", "find by text (right object)": "find_right"}
ROWS |= {"questions": "questions"} | kind_rows("  {} of {} objects", "questions")
ROWS |= {"questions, rest blacked out": "suppressed"}


def mean(values: Iterable[float | None]) -> float:
    """The mean of the values that are not None; 0 if there are none.

    >>> mean([1.0, None, 0.0])
    0.5
    """
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else 0.0


def split(values: Sequence, names: Iterable[Iterable[str]] = ()) -> dict[str, list]:
    """The values under each of their names; {} without names.

    >>> split([1, 0], [("place", "place_tiny"), ("place", "place_large")])
    {'place': [1, 0], 'place_tiny': [1], 'place_large': [0]}
    """
    parts: dict[str, list] = {}
    for value, names_of_value in zip(values, names or [()] * len(values), strict=True):
        for name in names_of_value:
            parts.setdefault(name, []).append(value)
    return parts


def with_parts(summarize: Callable, values: Sequence, names: Iterable[Iterable[str]] = ()) -> dict[str, Any]:
    """The summary of the values; where they have names also `by_kind`, the summary of each name's values.

    >>> with_parts(lambda values: {"n": len(values)}, [1, 0], [("place",), ("shape",)])
    {'n': 2, 'by_kind': {'place': {'n': 1}, 'shape': {'n': 1}}}
    """
    parts = {name: summarize(part) for name, part in split(values, names).items()}
    return summarize(values) | ({"by_kind": parts} if parts else {})


def paired(before: list[float | None], after: list[float | None], groups: list | None = None) -> dict:
    """The mean change of the samples that have both values, its standard error, and their number.

    groups: a key per sample; samples of one group (a question asked in four orders, the cues of a photo) are
    not independent. One group alone cannot tell how groups differ: its samples then count as they are.

    >>> paired([0, 0, 1, None], [1, 0, 1, 1], ["a", "b", "c", "d"])
    {'change': 0.3333333333333333, 'standard_error': 0.3333333333333333, 'n': 3}
    """
    both = [i for i, pair in enumerate(zip(before, after, strict=True)) if None not in pair]
    groups = groups if groups and len({groups[i] for i in both}) > 1 else range(len(before))
    changes = [(after[i] - before[i], groups[i]) for i in both]
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

    def add(self, task: str, values: Sequence, names: Iterable = (), groups: Sequence = ()) -> None:
        """Adds a list of samples, with their groups, and its part of each name as `task_name`."""
        for lists, column in ((self.samples, values), (self.groups, groups)):
            parts = split(column, names) if column else {}
            lists |= {task: list(column)} | {f"{task}_{name}": part for name, part in parts.items()}


def compare(before: Scores, after: Scores) -> dict[str, dict[str, float]]:
    """The paired change of every list of samples that both have."""
    lists, groups = before.samples, before.groups
    return {name: paired(lists[name], after.samples[name], groups.get(name)) for name in lists}


def summarize(before: Scores, after: Scores | None = None) -> dict[str, Any]:
    """The summary of one model, or of two with every change, as in results.json.

    With two models, the standard error of each kind of question is the paired one of its change.
    """
    if after is None:
        return {"before": before.summary}
    change = compare(before, after)
    for summary in (before.summary, after.summary):
        for task in {"questions", "suppressed"} & summary.keys():
            for name, part in summary[task]["by_kind"].items():
                part["standard_error"] = change[f"{task}_{name}"]["standard_error"]
    return {"before": before.summary, "after": after.summary, "change": change}


def table(before: Scores, after: Scores | None = None, rows: dict[str, str] = ROWS) -> str:
    """The scores of one model, or of two with the change and its paired standard error, in points of 100."""
    models, changes = [before, after] if after else [before], compare(before, after) if after else {}
    lines = [f"{'held-out':38}{'n':>6}{'before':>9}" + f"{'after':>9}{'change':>16}" * bool(after)]
    for title, name in rows.items():
        samples = zip(*(scores.samples.get(name, []) for scores in models), strict=True)
        if samples := [values for values in samples if None not in values]:
            numbers = "".join(f"{100 * mean(column):9.1f}" for column in zip(*samples))
            change = "{change:+10.1f} ± {standard_error:.1f}" if after else ""
            points = {key: 100 * value for key, value in changes.get(name, {}).items()}
            lines.append(f"{title:38}{len(samples):6}{numbers}{change.format(**points)}")
    return "\n".join(lines)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table as markdown has it.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    top, *lines = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([top, "|---" * len(header) + "|", *lines])
