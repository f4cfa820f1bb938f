"""What the rows of reproduce.py say: figures, a verdict on each claim, and what the world can tell."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import CueConfig, SceneCues
from evaluation.attention import BANDS
from evaluation.scores import mean
from reward import Box, iou
from tiny.scenes import SIDE
from training.run_folder import versions

POINTLESS = ("random rewards", "format reward only", "shuffled target", "more pretraining")
INFORMED = ("SFT on the best of G", "GRPO on the questions", "more pretraining, 1 to 4 things")
SHOWN = {  # column of the tables: list of samples
    "questions": "questions",
    "places": "questions_place",
    "attributes": "questions_attribute",
    "find by text": "find",
    "cue search": "cue",
}


@dataclass(frozen=True)
class Claim:
    """`row` against `other`, on the samples `metric`; what the paper has for it."""

    title: str
    row: str
    other: str
    metric: str
    paper: str
    untestable: str = ""  # what this world lacks to tell


TWINS = "no scene holds two things of one name, by construction, so a text says what the crop says"
CLAIMS = (
    Claim("RL over base", "LOCUS", "base", "questions", "V\\* 79.6 → 87.4"),
    Claim("RL over SFT", "LOCUS", "SFT", "questions", "V\\* 80.1 → 87.4"),
    Claim("visual over text cue", "LOCUS", "text cue", "questions", "V\\* 83.8 → 87.4", TWINS),
    Claim("small over large crops", "LOCUS", "large crops", "questions", "V\\* 81.2 → 87.4"),
    Claim("mixture over tiny only", "LOCUS", "tiny:small 100:0", "questions", "V\\* 86.9 → 87.4"),
    Claim("object over random crop", "LOCUS", "random crop", "questions", "V\\* 81.2 → 87.4"),
    Claim("suppression helps the base", "base", "base", "suppressed", "V\\* 79.6 → 85.9"),
    Claim("better grounding goes with better answers", "base", "base", "bands", "48.1 → 91.1"),
    Claim("Attention-in-Box rises", "LOCUS", "base", "aib", "7.9 → 10.0"),
    Claim("full-image questions rise: places", "LOCUS", "base", "questions_place", "–"),
    Claim("full-image questions rise: attributes", "LOCUS", "base", "questions_attribute", "–"),
    Claim("the same over the best pointless control: places", "LOCUS", "", "questions_place", "–"),
    Claim("the same over the best pointless control: attributes", "LOCUS", "", "questions_attribute", "–"),
    Claim("the same over the best pointless control: both", "LOCUS", "", "questions", "–"),
)

# ---------------------------------------------------------------- from rows to RESULTS.json


def contrast(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Change of the same samples, lists by seed: mean, paired 95 % interval, and by seed; in points.

    A sample's change is its mean over the seeds, so the interval is about other scenes, and the signs by seed
    about other trainings.
    """
    seeds = [100 * (mean(a) - mean(b)) for a, b in zip(one, other, strict=True)]
    columns = zip(zip(*one, strict=True), zip(*other, strict=True), strict=True)
    changes = [100 * (mean(a) - mean(b)) for a, b in columns]
    middle, n = mean(changes), len(changes)
    error = math.sqrt(sum((c - middle) ** 2 for c in changes) / (n - 1) / n) if n > 1 else math.inf
    return interval(middle, error, n) | {"seeds": [round(s, 2) for s in seeds]}


def interval(middle: float, error: float, n: int) -> dict[str, Any]:
    numbers = {"change": middle, "low": middle - 1.96 * error, "high": middle + 1.96 * error}
    return {key: round(value, 2) for key, value in numbers.items()} | {"n": n}


def bands_apart(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Accuracy where the box is found less accuracy where it is missed (Fig. 2); the two are not paired."""
    found, missed = samples[BANDS[2]], samples[BANDS[0]]
    rates = [mean(some) for some in (found, missed)]
    error = 100 * math.sqrt(sum(p * (1 - p) / len(s) for p, s in zip(rates, (found, missed), strict=True)))
    out = interval(100 * (rates[0] - rates[1]), error, len(found) + len(missed))
    return out | {"seeds": [out["change"]]}


def verdict(change: dict[str, Any]) -> str:
    """The rule of reproduce.py."""
    if change["low"] > 0 and min(change["seeds"]) > 0:
        return "same direction"
    if change["high"] < 0 and max(change["seeds"]) < 0:
        return "opposite direction"
    return "no difference"


def judged(claim: Claim, rows: dict[str, dict[int, dict]]) -> dict[str, Any]:
    """A claim with its figures and verdict, as it stands in RESULTS.json."""
    mine, other, metric = list(rows[claim.row].values()), claim.other, claim.metric
    if metric == "bands":
        change = bands_apart(mine[0]["samples"])
    elif metric == "suppressed":
        change = contrast(*([mine[0]["samples"][name]] for name in ("suppressed", "questions")))
    else:
        if not other:  # the pointless control that does best at this
            there = [name for name in POINTLESS if name in rows]
            other = max(there, key=lambda name: mean(mean(r["samples"][metric]) for r in rows[name].values()))
        theirs = [rows[other].get(seed) or next(iter(rows[other].values())) for seed in rows[claim.row]]
        change = contrast(*([row["samples"][metric] for row in some] for some in (mine, theirs)))
    said = {"title": claim.title, "row": claim.row, "other": other, "metric": metric, "paper": claim.paper}
    return said | change | {"verdict": verdict(change), "untestable": claim.untestable}


def figures_of(seeds: dict[int, dict]) -> dict[str, Any]:
    """What RESULTS.json keeps of a row: figures in points, one a seed."""
    rows = list(seeds.values())
    out: dict[str, Any] = {"seeds": list(seeds)}
    for column, name in SHOWN.items():
        out[column] = [round(100 * mean(row["samples"][name]), 2) for row in rows]
    for name in ("acc50", "acc75"):
        out[name] = [round(100 * row["summary"]["cue"][name], 2) for row in rows]
    out["seconds"] = [row["seconds"]["all"] for row in rows]
    if rows[0]["curve"]["iou"]:
        out["curve"] = {
            key: [round(mean(column), 4) for column in zip(*(row["curve"][key] for row in rows))]
            for key in ("iou", "format", "kl")
        }
    if "attention" in rows[0]["summary"]:
        looks = [row["summary"]["attention"] for row in rows]
        out["aib"] = [round(100 * look["mean_aib"], 2) for look in looks]
        out["peak"] = [round(100 * look["peak"], 2) for look in looks]
        layers = zip(*(look["aib_by_layer"] for look in looks))
        out["aib by layer"] = [round(100 * mean(layer), 2) for layer in layers]
        found = [row["summary"]["grounding"] for row in rows]
        out["grounding"] = {
            name: round(100 * mean(f["accuracy"][name]["accuracy"] for f in found), 2) for name in BANDS
        }
        for side in ("right", "wrong"):
            out["grounding"][f"IoU where {side}"] = round(100 * mean(f[side]["mean_iou"] for f in found), 2)
    if "suppressed" in rows[0]["summary"]:
        parts = {"overall": "", "attributes": "_attribute", "places": "_place"}
        out["suppression"] = {
            part: [
                round(100 * mean(rows[0]["samples"][f"{name}{end}"]), 2)
                for name in ("questions", "suppressed")
            ]
            for part, end in parts.items()
        }
    return out


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
    apart = slide(pixels**2, torch.ones_like(window)) - 2 * slide(pixels, window) + (window**2).sum()
    places = (apart <= apart.min() + 0.5).nonzero()  # [places, 2]
    return mean(iou((x, y, x + x2 - x1, y + y2 - y1), box) for y, x in places.tolist())


def world(n: int = 200) -> dict[str, float]:
    """Can the embedded world tell what the tables ask? Shares and IoU of n cues a kind, in points."""
    by = {source: SceneCues(CueConfig(source), "train", 0) for source in ("object", "random", "large")}
    cues = {source: [some[i] for i in range(n)] for source, some in by.items()}
    out = {
        f"{s} crops found by a template matcher, IoU": [template_iou(c.image, c.box) for c in cues[s]]
        for s in by
    }
    sides = [(x2 - x1, y2 - y1) for x1, y1, x2, y2 in (cue.box for cue in cues["large"])]
    out["large crops' share of the scene"] = [w * h / SIDE**2 for w, h in sides]
    return {what: round(100 * mean(values), 1) for what, values in out.items()}


def collect(folders: dict[tuple[str, int], Path]) -> dict[str, Any]:
    """RESULTS.json's content, from the row.json in the folder of each (row, seed)."""
    rows: dict[str, dict[int, dict]] = {}
    for (name, seed), folder in folders.items():
        rows.setdefault(name, {})[seed] = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    some = next(iter(folders.values())).parent / "settings.json"
    out: dict[str, Any] = {"settings": json.loads(some.read_text(encoding="utf-8")), "versions": versions()}
    out["rows"] = {name: figures_of(seeds) for name, seeds in rows.items()}
    for name in out["rows"].keys() - {"LOCUS"}:  # Fig. 9 shows LOCUS's curve
        out["rows"][name].pop("curve", None)
    out["claims"] = [judged(claim, rows) for claim in CLAIMS]
    out["world"] = world()
    return out
