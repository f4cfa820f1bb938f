"""Cues, prompts and box frames: from a picture to what the policy sees and must answer.

A cue is a window of an image. The policy gets the full image and the window's crop, and must answer with the
window's box. Cues come from COCO boxes, from any folder of images, or from the embedded world (scenes.py).

    python data.py show [--data scenes|coco|DIR] [--source object|random|large|text] [--out cues.png]
"""

import argparse
import json
import random
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

import scenes
from scenes import Box, Scene

SOURCES = ("object", "random", "large", "text")
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class UserError(Exception):
    """Wrong use: one sentence that names the file, the value and the remedy; the programs exit with 2."""


# ---------------------------------------------------------------- cue windows (PAPER §3, Table 9)


@dataclass(frozen=True)
class CueConfig:
    """Which windows are drawn; the numbers are those of the paper's Table 9."""

    source: str = "object"  # object | random | large | text: Tables 5 to 7
    tiny_ratio: float = 0.7  # share of tiny cues; the rest is small
    padding: tuple[float, float] = (0.0, 0.1)  # of a tiny object's sides, all around
    scale: tuple[float, float] = (0.8, 2.0)  # of a tiny object's window [A]: of the window, not of the pixels
    min_side: int = 16  # pixels of the full image


@dataclass
class Cue:
    """A full image and the window to be found in it.

    image: RGB; box: (x1, y1, x2, y2) in its pixels, the crop window itself; size: tiny | small | large;
    text: a description of what is in the window, or None; scene: where the image was drawn from, if it was.
    """

    image: Image.Image
    box: Box
    size: str
    text: str | None = None
    scene: Scene | None = None

    @property
    def crop(self) -> Image.Image:
        """The window's pixels; the embedded world enlarges them to four image tokens."""
        crop = self.image.crop(self.box)
        side = scenes.CROP_SIDE
        return crop if self.scene is None else crop.resize((side, side), Image.Resampling.BICUBIC)


def size_class(box: Box, width: int, height: int) -> str:
    """tiny below 1 % of the image, small to 5 %, large above 10 %, and medium, which is never drawn, between."""
    share = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
    return "tiny" if share < 0.01 else "small" if share <= 0.05 else "large" if share > 0.1 else "medium"


def draw_class(rng: random.Random, cfg: CueConfig) -> str:
    if cfg.source == "large":
        return "large"
    return "tiny" if rng.random() < cfg.tiny_ratio else "small"


def sample_cue_box(rng: random.Random, object_box: Box, width: int, height: int, cfg: CueConfig) -> Box | None:
    """A window around an object: padded and scaled if the object is tiny, at least 16 px a side, clipped.

    object_box and result: (x1, y1, x2, y2) in pixels of the image of width × height; the result's edges are
    whole pixels. None where nothing of the object is inside the image.
    """
    x1, y1, x2, y2 = object_box
    grow = 1.0
    if size_class(object_box, width, height) == "tiny":
        grow = (1 + 2 * rng.uniform(*cfg.padding)) * rng.uniform(*cfg.scale)
    edges = []
    for low, high, limit in ((x1, x2, width), (y1, y2, height)):
        if not (low < high and high > 0 and low < limit):  # also where a NaN stands
            return None
        half = max(grow * (high - low), cfg.min_side) / 2
        low, high = max(0, round((low + high) / 2 - half)), min(limit, round((low + high) / 2 + half))
        if high - low < cfg.min_side:  # clipping cut it short: take the rest from inside the image
            low, high = (0, min(limit, cfg.min_side)) if low == 0 else (max(0, limit - cfg.min_side), limit)
        edges.append((low, high))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def sample_random_box(
    rng: random.Random, width: int, height: int, size: str, cfg: CueConfig, hold: Box | None = None
) -> Box | None:
    """A window of a size class anywhere in the image (Table 7), or around `hold`; None if it does not fit."""
    low, high = {"tiny": (0.001, 0.01), "small": (0.01, 0.05), "large": (0.1, 0.3)}[size]
    area = rng.uniform(low, high) * width * height
    aspect = 2 ** rng.uniform(-1, 1)
    w, h = max(cfg.min_side, round((area * aspect) ** 0.5)), max(cfg.min_side, round((area / aspect) ** 0.5))
    x_range, y_range = (0, width - w), (0, height - h)
    if hold is not None:
        x_range = (max(0, round(hold[2]) - w), min(width - w, round(hold[0])))
        y_range = (max(0, round(hold[3]) - h), min(height - h, round(hold[1])))
    if x_range[0] > x_range[1] or y_range[0] > y_range[1]:
        return None
    x, y = rng.randint(*x_range), rng.randint(*y_range)
    return x, y, x + w, y + h


def cue_rng(split: str, seed: int, index: int) -> random.Random:
    """The i-th cue depends on (split, seed, i) alone, so resuming neither replays nor skips."""
    return random.Random(f"{split}/{seed}/{index}")


# ---------------------------------------------------------------- where cues come from


@dataclass(frozen=True)
class SceneCues:
    """Endless cues from the embedded world; `split` (train | heldout) and seed name their own scenes."""

    cfg: CueConfig
    split: str
    seed: int
    things: tuple[int, int] = (12, 16)

    def __getitem__(self, index: int) -> Cue:
        rng = cue_rng(f"scenes-{self.split}", self.seed, index)
        size = draw_class(rng, self.cfg)
        exact = CueConfig(padding=self.cfg.padding, scale=(1.0, 1.0), min_side=self.cfg.min_side)
        while True:
            scene = scenes.draw_layout(rng, rng.randint(*self.things))
            thing = rng.choice(scene.things)
            if self.cfg.source in ("object", "text"):
                box = sample_cue_box(rng, thing.box, scenes.SIDE, scenes.SIDE, exact)
            else:
                hold = thing.box if self.cfg.source == "large" else None
                box = sample_random_box(rng, scenes.SIDE, scenes.SIDE, size, self.cfg, hold)
            if box is not None and size_class(box, scenes.SIDE, scenes.SIDE) == size:
                name = None if self.cfg.source == "random" else thing.name
                return Cue(scenes.render(scene), box, size, name, scene)


# ---------------------------------------------------------------- box frames


@dataclass(frozen=True)
class BoxFrame:
    """The one place that knows coordinate conventions: between pixels of the full image and frame units.

    width, height: the full image in pixels; units_x, units_y: the same edges in frame units: the resized
    image's pixels (`resized`, Qwen2.5-VL) or 1,000 (`relative1000`, Qwen3-VL).
    """

    width: int
    height: int
    units_x: int
    units_y: int

    def to_units(self, box: Box) -> Box:
        """A box in pixels of the full image, in frame units; not rounded."""
        x, y = self.units_x / self.width, self.units_y / self.height
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y

    def to_text(self, box: Box) -> str:
        """A box in pixels of the full image, as the model should write it: `[x1, y1, x2, y2]`, whole units."""
        return "[" + ", ".join(str(round(v)) for v in self.to_units(box)) + "]"

    def to_pixels(self, numbers: Box) -> Box:
        """A box in frame units, in pixels of the full image."""
        x, y = self.width / self.units_x, self.height / self.units_y
        return numbers[0] * x, numbers[1] * y, numbers[2] * x, numbers[3] * y


def box_frame(name: str, width: int, height: int, grid: Tensor, patch: int) -> BoxFrame:
    """The frame `name` of an image of width × height pixels that became `grid` = (t, h, w) patches of `patch` px."""
    if name == "relative1000":
        return BoxFrame(width, height, 1000, 1000)
    return BoxFrame(width, height, int(grid[2]) * patch, int(grid[1]) * patch)


# ---------------------------------------------------------------- prompts and model families

# The paper's content in our words, and a short form that the embedded model was built with.
PROMPTS = {
    "paper": {
        "cue": "The second image is a crop of the first image. Find where it was cut out and give that box in the "
        "first image as [x1, y1, x2, y2] in {units}.",
        "text": "Find in the image: {text}. Give its box as [x1, y1, x2, y2] in {units}.",
        "name": "Name what the second image, a crop of the first, shows, in a few words.",
        "think": " First reason inside <think> </think>, then give the final answer inside <answer> </answer>.",
    },
    "short": {
        "cue": "Find Image 2 in Image 1.",
        "text": "Find the {text}.",
        "name": "What is Image 2?",
        "think": "",
    },
}
UNITS = {"resized": "pixel coordinates", "relative1000": "coordinates from 0 to 1000"}


@dataclass(frozen=True)
class Family:
    """What differs between model families; one row of FAMILIES, and any of it can be set by a flag."""

    box_frame: str  # resized | relative1000
    prompts: str  # key of PROMPTS
    image_pixels: tuple[int, int]  # least and most pixels of a full image as the model sees it
    crop_pixels: tuple[int, int]  # the same for a crop
    lr: float
    prompts_a_step: int
    max_new_tokens: int
    opening: str = ""  # what the chat template has already written of the completion ("<think>")
    lora_targets: str = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    skip_4bit: tuple[str, ...] = ("model.visual", "lm_head")


FAMILIES = {
    "tiny": Family("relative1000", "short", (64 * 64, 192 * 192), (64 * 64, 64 * 64), 7e-4, 8, 40),
    "qwen2_5_vl": Family("resized", "paper", (56 * 56, 1280 * 28 * 28), (112 * 112, 324 * 28 * 28), 1e-5, 8, 256),
    "qwen3_vl": Family("relative1000", "paper", (64 * 64, 1280 * 32 * 32), (128 * 128, 324 * 32 * 32), 1e-5, 8, 256),
}


@dataclass
class Tools:
    """What turns text and pictures into a model's inputs."""

    tokenizer: Any
    image_processor: Any
    family: Family
    image_token: str


@dataclass
class Encoded:
    """One prompt, ready for the model. P tokens, n images, N patches in all."""

    ids: Tensor  # [P]
    kinds: Tensor  # [P]: 1 where an image token stands (mm_token_type_ids), else 0
    pixels: Tensor  # [N, 3·2·patch·patch]
    grids: Tensor  # [n, 3]: patches of each image in t, h, w
    frame: BoxFrame  # of the first image
    features: list[Tensor] | None = field(default=None, repr=False)  # n × [cells, width], once they were seen


def encode(tools: Tools, text: str, image: Image.Image, crop: Image.Image | None = None) -> Encoded:
    """A prompt of the full image, the crop if there is one, and the text, in the family's chat template."""
    limits = [(image, tools.family.image_pixels), (crop, tools.family.crop_pixels)]
    seen = [
        tools.image_processor(picture, size={"shortest_edge": low, "longest_edge": high}, return_tensors="pt")
        for picture, (low, high) in limits
        if picture is not None
    ]
    grids = torch.cat([s["image_grid_thw"] for s in seen])  # [n, 3]
    content = [{"type": "image"}] * len(seen) + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    prompt = tools.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, *after = prompt.split(tools.image_token)
    cells = (grids.prod(-1) // tools.image_processor.merge_size**2).tolist()
    prompt = before + "".join(tools.image_token * n + rest for n, rest in zip(cells, after, strict=True))
    ids = tools.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"][0]  # [P]
    kinds = (ids == tools.tokenizer.convert_tokens_to_ids(tools.image_token)).long()  # [P]
    frame = box_frame(tools.family.box_frame, *image.size, grids[0], tools.image_processor.patch_size)
    return Encoded(ids, kinds, torch.cat([s["pixel_values"] for s in seen]), grids, frame)


def prompt_text(family: Family, task: str, think: bool = True, **words: str) -> str:
    """The words of a task ("cue", "text" or "name"), with the instruction to think unless it is unwanted."""
    template = PROMPTS[family.prompts]
    text = template[task].format(units=UNITS[family.box_frame], **words)
    return text + (template["think"] if think else "")


def encode_cue(tools: Tools, cue: Cue, source: str) -> Encoded:
    """The training prompt of a cue: image and crop, or for the text cue (Table 5) the image and its description."""
    if source == "text":
        return encode(tools, prompt_text(tools.family, "text", text=cue.text), cue.image)
    return encode(tools, prompt_text(tools.family, "cue"), cue.image, cue.crop)
