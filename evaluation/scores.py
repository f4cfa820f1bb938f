"""Scores of samples: means, paired changes, and the before/after table."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from reward import Box

ROWS = {  # row of the table: list of samples
    "cue search (IoU)": "cue",
    "find by text (IoU)": "find",
    "find by text (right thing)": "find_right",
    "questions": "questions",
    "  about attributes": "questions_attribute",
    "  about places": "questions_place",
    "questions, suppressed": "suppressed",
}


def mean(values: Iterable[float | None]) -> float:
    """The mean of the values that are there; 0 of none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else 0.0


def paired(before: list[float | None], after: list[float | None], groups: list | None = None) -> dict:
    """Mean change of the same samples, where both are there, and its standard error.

    groups: a key for each sample; those of one group (a question asked in four orders) are not independent.
    """
    triples = zip(before, after, groups or range(len(before)), strict=True)
    there = [(b - a, group) for a, b, group in triples if a is not None and b is not None]
    middle, sums = mean(change for change, _ in there), defaultdict(float)
    for change, group in there:
        sums[group] += change - middle
    variance = sum(v**2 for v in sums.values()) * len(sums) / max(1, len(sums) - 1)
    return {"change": middle, "standard_error": math.sqrt(variance) / max(1, len(there)), "n": len(there)}


@dataclass
class Scores:
    """A model's scores: `summary` as in results.json, `samples` one by one, `boxes` of cues in pixels."""

    summary: dict
    samples: dict[str, list[float | None]]
    boxes: list[Box | None]
    groups: dict[str, list] = field(default_factory=dict)  # of samples that are no independent ones


def compare(before: Scores, after: Scores) -> dict[str, dict[str, float]]:
    """Change and paired standard error of every list of samples."""
    names, groups = before.samples, before.groups
    return {name: paired(names[name], after.samples[name], groups.get(name)) for name in names}


def table(before: Scores, after: Scores | None = None, rows: dict[str, str] = ROWS) -> str:
    """The before/after table, in points of 100 with the paired standard error."""
    lines = [f"{'held-out':28}{'n':>6}{'before':>9}" + f"{'after':>9}{'change':>16}" * bool(after)]
    changes = compare(before, after) if after else {}
    for title, name in rows.items():
        pairs = list(zip(before.samples.get(name, []), (after or before).samples.get(name, []), strict=True))
        pairs = [pair for pair in pairs if None not in pair]
        if pairs:
            one, other = (100 * mean(column) for column in zip(*pairs))
            lines.append(f"{title:28}{len(pairs):6}{one:9.1f}")
            if after:
                change, error = (100 * changes[name][key] for key in ("change", "standard_error"))
                lines[-1] += f"{other:9.1f}{change:+10.1f} ± {error:.1f}"
    searched = [scores.summary["cue"] for scores in (before, after) if scores and "cue" in scores.summary]
    for key in ("right_object", "parse_rate", "format") if searched else ():
        if key != "right_object" or "find" in before.summary:  # photos have no other objects to compare with
            numbers = "".join(f"{100 * cue[key]:9.1f}" for cue in searched)
            lines.append(f"{'cue search, ' + key.replace('_', ' '):28}{searched[0]['n']:6}{numbers}")
    return "\n".join(lines)
