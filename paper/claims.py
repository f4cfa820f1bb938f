"""From the rows of reproduce.py to RESULTS.json: figures, a verdict on each claim, checks of the world."""

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

# Controls: as many steps as LOCUS, on a signal that should teach nothing.
POINTLESS = ("random rewards", "format reward only", "shuffled target", "more pretraining")
# Column of the tables: list of samples.
COLUMNS = {"questions": "questions", "places": "questions_place", "attributes": "questions_attribute"}
COLUMNS |= {"find by text": "find", "cue search": "cue"}

Seeds = dict[int, dict]  # the content of a row's row.json files, by training seed


@dataclass(frozen=True)
class Claim:
    """A claim: on the samples `metric`, `row` is better than `other`. An entry of claims.json."""

    title: str
    row: str
    other: str  # empty: the best of the pointless controls
    metric: str
    paper: str  # the paper's own figures
    untestable: str = ""  # why the embedded world cannot test the claim, if it cannot
    reasons: dict[str, str] = field(default_factory=dict)  # by verdict: what we think explains it


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


CLAIMS = [Claim(**entry) for entry in read_json(Path(__file__).with_name("claims.json"))]

# ---------------------------------------------------------------- verdicts


def interval(change: float, error: float, n: int, seeds: list[float]) -> dict[str, Any]:
    """A change over n samples with its 95 % interval, and the change of each seed; error: standard error."""
    values = {"change": change, "low": change - 1.96 * error, "high": change + 1.96 * error}
    rounded = {name: round(value, 2) for name, value in values.items()}
    return rounded | {"n": n, "seeds": [round(seed, 2) for seed in seeds]}


def contrast(after: Sequence[Sequence[float]], before: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The change of the same samples, given as a list for each seed, with its paired interval; in points.

    A sample counts once, with its mean over the seeds. So the interval is about other scenes, and the changes
    by seed are about other training runs.
    """
    seeds = [100 * (mean(a) - mean(b)) for a, b in zip(after, before, strict=True)]
    pairs = zip(zip(*after, strict=True), zip(*before, strict=True), strict=True)
    changes = [100 * (mean(a) - mean(b)) for a, b in pairs]  # of each sample
    error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.inf
    return interval(mean(changes), error, len(changes), seeds)


def bands_apart(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Accuracy where the evidence was found minus that where it was missed (Fig. 2), not paired."""
    found, missed = samples[BANDS[2]], samples[BANDS[0]]
    change = 100 * (mean(found) - mean(missed))
    variance = sum(mean(hits) * (1 - mean(hits)) / len(hits) for hits in (found, missed))
    return interval(change, 100 * math.sqrt(variance), len(found) + len(missed), [change])


def verdict(change: dict[str, Any]) -> str:
    """The rule of reproduce.py."""
    if change["low"] > 0 and min(change["seeds"]) > 0:
        return "same direction"
    return "opposite direction" if change["high"] < 0 and max(change["seeds"]) < 0 else "no difference"


def samples_of(seeds: Seeds, metric: str) -> list[list[float]]:
    """The samples of a row, a list for each seed."""
    return [row["samples"][metric] for row in seeds.values()]


def best_control(metric: str, rows: dict[str, Seeds]) -> str:
    """The pointless control with the highest mean."""
    return max(POINTLESS, key=lambda name: mean(map(mean, samples_of(rows[name], metric))))


def judge(claim: Claim, rows: dict[str, Seeds]) -> dict[str, Any]:
    """A claim with its change and verdict, as an entry of RESULTS.json."""
    metric, other = claim.metric, claim.other or best_control(claim.metric, rows)
    if metric == "bands":
        change = bands_apart(*(row["samples"] for row in rows[claim.row].values()))  # one seed: the base's
    else:
        # Suppression is compared with the same questions on full images.
        metric_before = "questions" if metric == "suppressed" else metric
        after, before = samples_of(rows[claim.row], metric), samples_of(rows[other], metric_before)
        # The base has one seed, which every seed of LOCUS is compared with.
        change = contrast(after, before * (len(after) // len(before)))
    entry = {"title": claim.title, "row": claim.row, "other": other, "metric": metric, "paper": claim.paper}
    return entry | change | {"verdict": verdict(change), "untestable": claim.untestable}


# ---------------------------------------------------------------- figures


def points(values: Iterable[float]) -> float:
    """The mean in points of 100."""
    return round(100 * mean(values), 2)


def row_figures(seeds: Seeds) -> dict[str, Any]:
    """What RESULTS.json records of a row: figures in points of 100, one for each seed."""
    rows = list(seeds.values())
    summaries = [row["summary"] for row in rows]
    figures: dict[str, Any] = {"seeds": list(seeds)}
    figures |= {column: list(map(points, samples_of(seeds, name))) for column, name in COLUMNS.items()}
    figures |= {name: [points([s["cue"][name]]) for s in summaries] for name in ("acc50", "acc75")}
    figures["seconds"] = [row["seconds"]["all"] for row in rows]
    if "attention" in summaries[0]:
        attention = [summary["attention"] for summary in summaries]
        figures["aib"] = [points([a["mean_aib"]]) for a in attention]
        figures["peak"] = [points([a["peak"]]) for a in attention]
        figures["aib by layer"] = [points(layer) for layer in zip(*(a["aib_by_layer"] for a in attention))]
        grounding = [summary["grounding"] for summary in summaries]
        bands = {band: points(g["accuracy"][band]["accuracy"] for g in grounding) for band in BANDS}
        ious = {f"IoU where {k}": points(g[k]["mean_iou"] for g in grounding) for k in ("right", "wrong")}
        figures["grounding"] = bands | ious
    if "suppressed" in summaries[0]:
        figures["suppression"] = {}
        for part, kind in (("overall", ""), ("attributes", "_attribute"), ("places", "_place")):
            pair = (f"questions{kind}", f"suppressed{kind}")
            figures["suppression"][part] = [points(rows[0]["samples"][name]) for name in pair]
    return figures


def mean_curve(seeds: Seeds) -> dict[str, list[float]]:
    """A row's training curve: for each step, the mean over the seeds."""
    curves = [row["curve"] for row in seeds.values()]
    steps = {key: zip(*(curve[key] for curve in curves)) for key in ("iou", "format", "kl")}
    return {key: [round(mean(values), 4) for values in by_step] for key, by_step in steps.items()}


# ---------------------------------------------------------------- what the embedded world can show


def correlate(image: Tensor, window: Tensor) -> Tensor:
    """Σ image · window at every position of the window: [C, H, W] and [C, h, w] to [H − h + 1, W − w + 1]."""
    (H, W), (h, w) = image.shape[1:], window.shape[1:]
    spectrum = torch.fft.rfft2(image) * torch.fft.rfft2(window, s=(H, W)).conj()  # [C, H, W/2 + 1]
    return torch.fft.irfft2(spectrum, s=(H, W)).sum(0)[: H - h + 1, : W - w + 1]


def template_iou(image: Image.Image, box: Box) -> float:
    """IoU of a window (pixels of the image) with where its pixels match best; the mean over equal matches."""
    x1, y1, x2, y2 = box
    pixels = torch.from_numpy(np.array(image, dtype=np.float64)).permute(2, 0, 1)  # [3, H, W]
    window = pixels[:, y1:y2, x1:x2]  # [3, h, w]
    # Σ (image − window)² = Σ image² − 2 Σ image · window + Σ window²
    distance = correlate(pixels**2, torch.ones_like(window)) - 2 * correlate(pixels, window)
    distance = distance + (window**2).sum()  # [H − h + 1, W − w + 1]
    matches = (distance <= distance.min() + 0.5).nonzero()  # [matches, 2]
    return mean(iou((x, y, x + x2 - x1, y + y2 - y1), box) for y, x in matches.tolist())


def check_world(n: int = 200) -> dict[str, float]:
    """Can the crops of each source be found at all, and how large are large ones? In points, over n cues."""
    checks = {}
    for source in ("object", "random", "large"):
        cues = list(islice(scene_cues(CueConfig(source), "train", 0), n))
        found = mean(template_iou(cue.image, cue.box) for cue in cues)
        checks[f"{source} crops found by a template matcher, IoU"] = found
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (cue.box for cue in cues)]  # of the large crops
    checks["large crops' share of the scene"] = mean(areas) / SIDE**2
    return {check: round(100 * share, 1) for check, share in checks.items()}


def collect(folders: dict[tuple[str, int], Path]) -> dict[str, Any]:
    """The content of RESULTS.json, from the row.json in the folder of each (row, seed)."""
    rows: dict[str, Seeds] = {}
    for (name, seed), folder in folders.items():
        rows.setdefault(name, {})[seed] = read_json(folder / "row.json")
    figures = {name: row_figures(seeds) for name, seeds in rows.items()}
    figures["LOCUS"]["curve"] = mean_curve(rows["LOCUS"])  # Fig. 9
    return {
        "settings": read_json(next(iter(folders.values())).parent / "settings.json"),
        "versions": versions(),
        "rows": figures,
        "claims": [judge(claim, rows) for claim in CLAIMS],
        "world": check_world(),
    }
