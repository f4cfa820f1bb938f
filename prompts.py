"""Prompts and box frames: from text and pictures to what a model family takes, and back from its boxes."""

from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from reward import Box


@dataclass(frozen=True)
class BoxFrame:
    """The one place that knows coordinate conventions: between pixels of the full image and frame units."""

    width: int  # of the full image in pixels
    height: int
    units_x: int  # the same edges in units: the resized image's pixels (Qwen2.5-VL) or 1,000 (Qwen3-VL)
    units_y: int

    def to_units(self, box: Box) -> Box:
        x, y = self.units_x / self.width, self.units_y / self.height
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y

    def to_text(self, box: Box) -> str:
        """A box in pixels as the model should write it: whole units."""
        return "[" + ", ".join(str(round(v)) for v in self.to_units(box)) + "]"

    def to_pixels(self, numbers: Box) -> Box:
        return BoxFrame(self.units_x, self.units_y, self.width, self.height).to_units(numbers)


def box_frame(name: str, width: int, height: int, grid: Tensor, patch: int) -> BoxFrame:
    """The frame `name` of an image that became `grid` = (t, h, w) patches of `patch` px."""
    if name == "relative1000":
        return BoxFrame(width, height, 1000, 1000)
    return BoxFrame(width, height, int(grid[2]) * patch, int(grid[1]) * patch)


# The paper's content in our words, and a short form that the embedded model was built with.
PROMPTS = {
    "paper": {
        "cue": "Image 2 is a crop of Image 1. Give its box in Image 1 as [x1, y1, x2, y2] in {units}.",
        "text": "Find in the image: {text}. Give its box as [x1, y1, x2, y2] in {units}.",
        "name": "Name what the second image, a crop of the first, shows, in a few words.",
        "choice": "{question}\n{options}\nAnswer with the letter of the right option.",
        "yesno": "{question} Answer yes or no.",
        "string": "{question}",
        "think": " First reason inside <think> </think>, then answer inside <answer> </answer>.",
    },
    "short": dict(cue="Find Image 2 in Image 1.", text="Find the {text}.", name="What is Image 2?", think="")
    | dict.fromkeys(("choice", "yesno", "string"), "{question}"),
}
UNITS = {"resized": "pixel coordinates", "relative1000": "coordinates from 0 to 1000"}


@dataclass(frozen=True)
class Family:
    """What differs between model families: one row of FAMILIES. A flag of the same name wins."""

    box_frame: str  # resized | relative1000
    template: str  # key of PROMPTS
    image_pixels: tuple[int, int]  # least and most pixels of a full image as the model sees it
    crop_pixels: tuple[int, int]  # the same for a crop
    lr: float
    prompts: int  # a step
    max_new_tokens: int
    micro_batch: int  # prompts in one forward and backward pass
    recompute: bool  # text layers keep their inputs alone for the backward pass
    opening: str = ""  # what the chat template has already written of the completion ("<think>")
    lora_targets: str = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    skip_4bit: tuple[str, ...] = ("model.visual", "lm_head")


# Pixels as (28·28 or 32·32 of an image token) × tokens. A model that thinks at length gets room for it.
QWEN2_5 = Family("resized", "paper", (56**2, 1280 * 28**2), (112**2, 324 * 28**2), 1e-5, 8, 256, 1, True)
QWEN3 = Family("relative1000", "paper", (64**2, 1280 * 32**2), (128**2, 324 * 32**2), 1e-5, 8, 256, 1, True)
FAMILIES = {
    "tiny": Family("relative1000", "short", (64**2, 192**2), (64**2, 64**2), 7e-4, 8, 40, 8, False),
    "qwen2_5_vl": QWEN2_5,
    "qwen3_vl": QWEN3,
    "qwen3_vl_thinking": replace(QWEN3, max_new_tokens=1024),  # its chat template opens with <think>
    "mimo_vl": replace(QWEN2_5, max_new_tokens=1024),  # of Qwen2.5-VL's architecture, but it thinks
}


def limit_pixels(family: Family, image: int, crop: int) -> Family:
    """The family with other most pixels of image and crop."""
    low, least = min(family.image_pixels[0], image), min(family.crop_pixels[0], crop)
    return replace(family, image_pixels=(low, image), crop_pixels=(least, crop))


@dataclass
class Tools:
    """What turns text and pictures into a model's inputs."""

    tokenizer: Any
    image_processor: Any
    family: Family
    image_token: str


@dataclass
class Picture:
    """An image, cut into N patches by the processor. Prompts on the same image share it, and its features."""

    pixels: Tensor  # [N, 3·2·patch·patch]
    grid: Tensor  # [3]: patches in t, h, w
    size: tuple[int, int]  # width and height of the image, in its own pixels
    features: list[Tensor] | None = None  # (1 + deepstack) × [cells, width], once it was seen


@dataclass
class Encoded:
    """One prompt of P tokens, ready for the model."""

    ids: Tensor  # [P]
    kinds: Tensor  # [P]: 1 where an image token stands (mm_token_type_ids), else 0
    pictures: list[Picture]  # the full image or images, and the crop if there is one
    frame: BoxFrame  # of the (first) full image


def encode(
    tools: Tools, text: str, *images: Image.Image | Picture, crop: Image.Image | Picture | None = None
):
    """A prompt of full images, the crop if there is one, and the text, in the family's chat template."""
    processor, family, pictures = tools.image_processor, tools.family, []
    for picture, (low, high) in [(i, family.image_pixels) for i in images] + [(crop, family.crop_pixels)]:
        if isinstance(picture, Image.Image):
            size = {"shortest_edge": low, "longest_edge": high}
            seen = processor(picture, size=size, return_tensors="pt")
            picture = Picture(seen["pixel_values"], seen["image_grid_thw"][0], picture.size)
        pictures += [picture] if picture else []
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    prompt = tools.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, *after = prompt.split(tools.image_token)
    cells = [int(picture.grid.prod()) // processor.merge_size**2 for picture in pictures]
    prompt = before + "".join(tools.image_token * n + rest for n, rest in zip(cells, after, strict=True))
    ids = tools.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"][0]  # [P]
    kinds = (ids == tools.tokenizer.convert_tokens_to_ids(tools.image_token)).long()  # [P]
    full = pictures[0]
    return Encoded(
        ids, kinds, pictures, box_frame(family.box_frame, *full.size, full.grid, processor.patch_size)
    )


def opening(tokenizer: Any) -> str:
    """What the chat template itself writes of an answer: "<think>" and a line break, if the model thinks."""
    messages = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt[prompt.rindex("<think>") :] if prompt.rstrip().endswith("<think>") else ""


def prompt_text(family: Family, task: str, think: bool = True, **words: str) -> str:
    """The words of a task ("cue", "text" or "name"), with the instruction to think unless it is unwanted."""
    template = PROMPTS[family.template]
    text = template[task].format(units=UNITS[family.box_frame], **words)
    return text + (template["think"] if think else "")
