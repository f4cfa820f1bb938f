"""What the rows of reproduce.py say: figures, a verdict on each claim, and what the world can tell."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import CueConfig, scene_cues
from evaluation.attention import BANDS
from evaluation.scores import mean
from reward import Box, iou
from tiny.scenes import SIDE
from training.run_folder import versions

POINTLESS = ("random rewards", "format reward only", "shuffled target", "more pretraining")
COLUMNS = {  # column of the tables: list of samples
    "questions": "questions",
    "places": "questions_place",
    "attributes": "questions_attribute",
    "find by text": "find",
    "cue search": "cue",
}


@dataclass(frozen=True)
class Claim:
    """`row` against `other`, on the samples `metric`; what the paper has for it. An entry of claims.json."""

    title: str
    row: str
    other: str  # empty: the pointless control that does best
    metric: str
    paper: str
    untestable: str = ""  # what this world lacks to tell
    reasons: dict[str, str] = field(default_factory=dict)  # of a verdict, and the experiment that would tell


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


CLAIMS = [Claim(**entry) for entry in read_json(Path(__file__).with_name("claims.json"))]

# ---------------------------------------------------------------- verdicts


def interval(change: float, error: float, n: int, seeds: list[float]) -> dict[str, Any]:
    """A change with its 95 % interval, over n samples, and by seed."""
    numbers = {"change": change, "low": change - 1.96 * error, "high": change + 1.96 * error}
    rounded = {name: round(value, 2) for name, value in numbers.items()}
    return rounded | {"n": n, "seeds": [round(seed, 2) for seed in seeds]}


def contrast(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Change of the same samples, lists by seed: mean, paired 95 % interval, and by seed; in points.

    A sample's change is its mean over the seeds, so the interval is about other scenes, and the signs by seed
    about other trainings.
    """
    seeds = [100 * (mean(a) - mean(b)) for a, b in zip(mine, theirs, strict=True)]
    samples = zip(zip(*mine, strict=True), zip(*theirs, strict=True), strict=True)
    changes = [100 * (mean(a) - mean(b)) for a, b in samples]
    error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.inf
    return interval(mean(changes), error, len(changes), seeds)


def bands_apart(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Accuracy where the box is found less accuracy where it is missed (Fig. 2); the two are not paired."""
    found, missed = samples[BANDS[2]], samples[BANDS[0]]
    change = 100 * (mean(found) - mean(missed))
    variance = sum(mean(hits) * (1 - mean(hits)) / len(hits) for hits in (found, missed))
    return interval(change, 100 * math.sqrt(variance), len(found) + len(missed), [change])


def verdict(change: dict[str, Any]) -> str:
    """The rule of reproduce.py."""
    if change["low"] > 0 and min(change["seeds"]) > 0:
        return "same direction"
    if change["high"] < 0 and max(change["seeds"]) < 0:
        return "opposite direction"
    return "no difference"


def best_control(metric: str, rows: dict[str, dict[int, dict]]) -> str:
    """The pointless control that does best at something."""
    return max(POINTLESS, key=lambda name: mean(mean(r["samples"][metric]) for r in rows[name].values()))


def judged(claim: Claim, rows: dict[str, dict[int, dict]]) -> dict[str, Any]:
    """A claim with its figures and verdict, as it stands in RESULTS.json; rows: by name and seed."""
    metric, other = claim.metric, claim.other or best_control(claim.metric, rows)
    mine, theirs = ([row["samples"] for row in rows[name].values()] for name in (claim.row, other))
    if metric == "bands":
        change = bands_apart(mine[0])
    elif metric == "suppressed":
        change = contrast([mine[0]["suppressed"]], [mine[0]["questions"]])
    else:
        theirs *= len(mine) // len(theirs)  # the base's one seed stands against each of LOCUS's
        change = contrast(*([samples[metric] for samples in seeds] for seeds in (mine, theirs)))
    entry = {"title": claim.title, "row": claim.row, "other": other, "metric": metric, "paper": claim.paper}
    return entry | change | {"verdict": verdict(change), "untestable": claim.untestable}


# ---------------------------------------------------------------- figures


def points(values: Iterable[float]) -> float:
    """The mean in points of 100."""
    return round(100 * mean(values), 2)


def figures_of(seeds: dict[int, dict]) -> dict[str, Any]:
    """What RESULTS.json keeps of a row: figures in points, one a seed."""
    rows = list(seeds.values())
    summaries = [row["summary"] for row in rows]
    figures: dict[str, Any] = {"seeds": list(seeds)}
    for column, name in COLUMNS.items():
        figures[column] = [points(row["samples"][name]) for row in rows]
    for name in ("acc50", "acc75"):
        figures[name] = [points([summary["cue"][name]]) for summary in summaries]
    figures["seconds"] = [row["seconds"]["all"] for row in rows]
    if "attention" in summaries[0]:
        looks = [summary["attention"] for summary in summaries]
        figures["aib"] = [points([look["mean_aib"]]) for look in looks]
        figures["peak"] = [points([look["peak"]]) for look in looks]
        figures["aib by layer"] = [points(layer) for layer in zip(*(look["aib_by_layer"] for look in looks))]
        grounding = [summary["grounding"] for summary in summaries]
        figures["grounding"] = {
            band: points(found["accuracy"][band]["accuracy"] for found in grounding) for band in BANDS
        }
        for side in ("right", "wrong"):
            ious = (found[side]["mean_iou"] for found in grounding)
            figures["grounding"][f"IoU where {side}"] = points(ious)
    if "suppressed" in summaries[0]:
        parts = {"overall": "", "attributes": "_attribute", "places": "_place"}
        figures["suppression"] = {
            part: [points(rows[0]["samples"][f"{name}{end}"]) for name in ("questions", "suppressed")]
            for part, end in parts.items()
        }
    return figures


def mean_curve(seeds: dict[int, dict]) -> dict[str, list[float]]:
    """A row's training curve, each step's mean over the seeds."""
    curves = [row["curve"] for row in seeds.values()]
    steps = {key: zip(*(curve[key] for curve in curves)) for key in ("iou", "format", "kl")}
    return {key: [round(mean(values), 4) for values in by_step] for key, by_step in steps.items()}


# ---------------------------------------------------------------- what the world can tell


def slide(image: Tensor, window: Tensor) -> Tensor:
    """The sum of products with a window at every place, [C, H, W] and [C, h, w] to [H − h + 1, W − w + 1]."""
    (H, W), (h, w) = image.shape[1:], window.shape[1:]
    spectrum = torch.fft.rfft2(image) * torch.fft.rfft2(window, s=(H, W)).conj()  # [C, H, W/2 + 1]
    return torch.fft.irfft2(spectrum, s=(H, W)).sum(0)[: H - h + 1, : W - w + 1]


def template_iou(image: Image.Image, box: Box) -> float:
    """IoU of where a window's pixels are found in their image; the mean, where they fit at several places."""
    x1, y1, x2, y2 = box
    pixels = torch.from_numpy(np.array(image, dtype=np.float64)).permute(2, 0, 1)  # [3, H, W]
    window = pixels[:, y1:y2, x1:x2]  # [3, h, w]
    distance = slide(pixels**2, torch.ones_like(window)) - 2 * slide(pixels, window) + (window**2).sum()
    places = (distance <= distance.min() + 0.5).nonzero()  # [places, 2]
    return mean(iou((x, y, x + x2 - x1, y + y2 - y1), box) for y, x in places.tolist())


def world(n: int = 200) -> dict[str, float]:
    """Can the embedded world tell what the tables ask? Shares and IoU of n cues a kind, in points."""
    sources = ("object", "random", "large")
    cues = {source: list(islice(scene_cues(CueConfig(source), "train", 0), n)) for source in sources}
    answers = {
        f"{source} crops found by a template matcher, IoU": mean(
            template_iou(cue.image, cue.box) for cue in drawn
        )
        for source, drawn in cues.items()
    }
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (cue.box for cue in cues["large"])]
    answers["large crops' share of the scene"] = mean(areas) / SIDE**2
    return {question: round(100 * share, 1) for question, share in answers.items()}


def collect(folders: dict[tuple[str, int], Path]) -> dict[str, Any]:
    """RESULTS.json's content, from the row.json in the folder of each (row, seed)."""
    rows: dict[str, dict[int, dict]] = {}
    for (name, seed), folder in folders.items():
        rows.setdefault(name, {})[seed] = read_json(folder / "row.json")
    figures = {name: figures_of(seeds) for name, seeds in rows.items()}
    figures["LOCUS"]["curve"] = mean_curve(rows["LOCUS"])  # Fig. 9
    return {
        "settings": read_json(next(iter(folders.values())).parent / "settings.json"),
        "versions": versions(),
        "rows": figures,
        "claims": [judged(claim, rows) for claim in CLAIMS],
        "world": world(),
    }
