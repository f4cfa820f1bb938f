"""Prompts and box frames: from text and images to a model's inputs, and back from the boxes it writes.

What differs from a typical VLM preprocessor:
- A crop and a full image have separate pixel limits: a 16 px crop must not become four blurred tokens.
- An image is processed once and shared by all prompts about it, and so are its vision features.
- Placeholders are expanded here, without AutoProcessor: Qwen-VL's needs torchvision.
"""

from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from reward import Box


@dataclass(frozen=True)
class BoxFrame:
    """The one place that knows coordinate conventions: between pixels of the full image and frame units.

    >>> frame = BoxFrame(width=1920, height=1080, units_x=1000, units_y=1000)  # Qwen3-VL: relative to 1,000
    >>> frame.to_text((960, 540, 1920, 1080))
    '[500, 500, 1000, 1000]'
    >>> frame.to_pixels((500, 500, 1000, 1000))
    (960.0, 540.0, 1920.0, 1080.0)
    """

    width: int  # of the full image, in its own pixels
    height: int
    units_x: int  # the same width in units: pixels of the resized image (Qwen2.5-VL), or 1,000 (Qwen3-VL)
    units_y: int

    def to_units(self, box: Box) -> Box:
        scale_x, scale_y = self.units_x / self.width, self.units_y / self.height
        return box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y

    def to_text(self, box: Box) -> str:
        """A box in pixels as the model should write it, in whole units."""
        return "[" + ", ".join(str(round(coordinate)) for coordinate in self.to_units(box)) + "]"

    def to_pixels(self, box: Box) -> Box:
        return BoxFrame(self.units_x, self.units_y, self.width, self.height).to_units(box)


def box_frame(frame_name: str, width: int, height: int, grid_thw: Tensor, patch_size: int) -> BoxFrame:
    """The frame `frame_name` of an image of width × height pixels that became `grid_thw` patches."""
    if frame_name == "relative1000":
        return BoxFrame(width, height, 1000, 1000)
    # The size that the model sees comes from the grid: the processor rounds it to whole image tokens.
    return BoxFrame(width, height, int(grid_thw[2]) * patch_size, int(grid_thw[1]) * patch_size)


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
    """What differs between model families: one row of FAMILIES. A flag of the same name overrides it."""

    box_frame: str  # resized | relative1000
    template: str  # key of PROMPTS
    image_pixels: tuple[int, int]  # fewest and most pixels of a full image as the model sees it
    crop_pixels: tuple[int, int]  # the same for a crop
    lr: float
    prompts: int  # per step
    max_new_tokens: int
    micro_batch: int  # prompts in one forward and backward pass
    gradient_checkpointing: bool  # of the text layers
    steps: int = 300  # rollouts of a run
    beta: float = 0.04  # coefficient of the KL to the reference
    cue_text: str = ""  # the prompt of --cue-prompt, in place of the template's "cue" and "think"
    opening: str = ""  # what the chat template has already written of the completion ("<think>")
    lora_targets: str = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # never the vision tower's MLP
    skip_4bit: tuple[str, ...] = ("model.visual", "lm_head")


# Pixels = image tokens × the pixels of one (28² or 32²). A model that thinks at length gets room for it.
TINY = Family("relative1000", "short", (64**2, 256**2), (64**2, 64**2), 1e-3, 8, 40, 8, False, 200, 0.08)
QWEN2_5 = Family("resized", "paper", (56**2, 1280 * 28**2), (112**2, 324 * 28**2), 1e-5, 8, 256, 1, True)
QWEN3 = Family("relative1000", "paper", (64**2, 1280 * 32**2), (128**2, 324 * 32**2), 1e-5, 8, 256, 1, True)
FAMILIES = {
    "tiny": TINY,
    "qwen2_5_vl": QWEN2_5,
    "qwen3_vl": QWEN3,
    "qwen3_vl_thinking": replace(QWEN3, max_new_tokens=1024),  # its chat template opens with <think>
    "mimo_vl": replace(QWEN2_5, max_new_tokens=1024),  # Qwen2.5-VL's architecture, but it thinks
}


@dataclass
class Processor:
    """Turns text and images into a model's inputs."""

    tokenizer: Any
    image_processor: Any
    family: Family
    image_token: str


@dataclass
class ProcessedImage:
    """An image, cut into N patches by the image processor."""

    pixel_values: Tensor  # [N, 3·2·patch·patch]; emptied once the features are computed
    grid_thw: Tensor  # [3]: patches along time, height, width
    size: tuple[int, int]  # width and height of the image, in its own pixels
    features: list[Tensor] | None = None  # (1 + deepstack) × [image tokens, H], once they are computed


@dataclass
class EncodedPrompt:
    """One prompt of P tokens, ready for the model."""

    input_ids: Tensor  # [P]
    mm_token_type_ids: Tensor  # [P]: 1 for an image token, else 0
    images: list[ProcessedImage]  # the full image or images, then the crop if there is one
    frame: BoxFrame  # of the (first) full image


def encode(
    processor: Processor, request: str, *images: Image.Image | ProcessedImage, crop: Image.Image | None = None
) -> EncodedPrompt:
    """A prompt of full images, the crop if there is one, and the text, in the family's chat template."""
    tokenizer, image_processor, family = processor.tokenizer, processor.image_processor, processor.family
    pixel_limits = [(image, family.image_pixels) for image in images]
    pixel_limits += [(crop, family.crop_pixels)] if crop is not None else []
    processed_images = [process_image(image_processor, image, *pixels) for image, pixels in pixel_limits]
    message_content = [{"type": "image"}] * len(processed_images) + [{"type": "text", "text": request}]
    messages = [{"role": "user", "content": message_content}]
    chat_text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes one placeholder per image; the model expects one per image token.
    expanded_text, *text_parts = chat_text.split(processor.image_token)
    token_counts = [int(image.grid_thw.prod()) // image_processor.merge_size**2 for image in processed_images]
    for num_tokens, text_part in zip(token_counts, text_parts, strict=True):
        expanded_text += processor.image_token * num_tokens + text_part
    input_ids = tokenizer(expanded_text, add_special_tokens=False, return_tensors="pt").input_ids[0]  # [P]
    # Without these, transformers silently gives image tokens one-dimensional positions.
    image_token_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    mm_token_type_ids = (input_ids == image_token_id).long()  # [P]
    full_image = processed_images[0]
    frame = box_frame(family.box_frame, *full_image.size, full_image.grid_thw, image_processor.patch_size)
    return EncodedPrompt(input_ids, mm_token_type_ids, processed_images, frame)


def process_image(
    image_processor: Any, image: Image.Image | ProcessedImage, min_pixels: int, max_pixels: int
) -> ProcessedImage:
    """An image resized to between min_pixels and max_pixels and cut into patches, if it is not yet."""
    if isinstance(image, ProcessedImage):
        return image
    # Qwen's names, though both are areas.
    area_limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    image_inputs = image_processor(image, size=area_limits, return_tensors="pt")
    return ProcessedImage(image_inputs["pixel_values"], image_inputs["image_grid_thw"][0], image.size)


def prompt_text(family: Family, task: str, think: bool = True, **template_values: str) -> str:
    """The text of a task (a key of PROMPTS), with the instruction to think unless `think` is False."""
    prompt_template, units = PROMPTS[family.template], UNITS[family.box_frame]
    if task == "cue" and family.cue_text:
        return family.cue_text.replace("{units}", units).replace("{think}", prompt_template["think"])
    task_text = prompt_template[task].format(units=units, **template_values)
    return task_text + (prompt_template["think"] if think else "")
