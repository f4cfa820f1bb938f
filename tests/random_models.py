"""Small random models of both architectures, and prompts with images of different sizes, for fast tests."""

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models import add_lora, make_policy
from policy import Policy, compute_image_features
from prompts import FAMILIES, EncodedPrompt, Processor, encode
from tiny import architecture

KINDS = ("qwen2_5_vl", "qwen3_vl")


def random_model(
    kind: str, tokenizer: PreTrainedTokenizerFast, width: int = 64, layers: int = 2, **text_config: Any
) -> PreTrainedModel:
    """A miniature random model of the family's own class; text_config: other settings of its text layers."""
    token = tokenizer.convert_tokens_to_ids
    ids = dict(
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    text = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width)
    text |= dict(
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1
    )
    text |= text_config
    height = width // 32 + 1  # rotary dimensions of an image's height; its width has as many, time the rest
    sections = [width // 8 - 2 * height, height, height]
    rope = dict(rope_type="default", rope_theta=10_000.0, mrope_section=sections)
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=width)
    torch.manual_seed(0)
    if kind == "qwen3_vl":
        text |= dict(head_dim=width // 4, rope_parameters=rope | {"mrope_interleaved": True})
        vision |= dict(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0])
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
        return Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    text |= dict(rope_parameters=rope)
    vision |= dict(patch_size=14, window_size=56, fullatt_block_indexes=[1])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def random_policy(kind: str, stop_every: int = 12, **kwargs: Any) -> Policy:
    """A policy around a `random_model`, without an adapter; every `stop_every`-th token is a stop token."""
    tokenizer = architecture.build_tokenizer()
    model, half = random_model(kind, tokenizer, **kwargs), [0.5, 0.5, 0.5]
    patch = model.config.vision_config.patch_size
    processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, image_mean=half, image_std=half)
    cell = (2 * patch) ** 2  # pixels of an image token
    family = replace(FAMILIES[kind], image_pixels=(cell, 12 * cell), crop_pixels=(cell, 4 * cell))
    policy = make_policy(model, Processor(tokenizer, processor, family, ""), torch.device("cpu"))
    policy.stop_ids = torch.arange(20, len(tokenizer), stop_every)
    return policy


def with_adapter(policy: Policy, rank: int = 4) -> Policy:
    """The policy with an adapter that changes its outputs: B is random instead of 0."""
    policy = add_lora(policy, rank)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """An image of random pixels; Pillow's own noise cannot be seeded."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def png_cell(image: Image.Image, **options) -> str:
    """The cell of a benchmark table that holds this image: base64 of a PNG, saved with Pillow's `options`."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()


def prompts(policy: Policy, count: int = 3) -> list[EncodedPrompt]:
    """Prompts of different lengths: images of different sizes, with and without a crop."""
    sizes = [(90, 60), (64, 130), (200, 70), (64, 64)]
    images = [noise(sizes[i % 4], i) for i in range(count)]
    crops = [None if i % 3 == 2 else image.crop((5, 5, 45, 35)) for i, image in enumerate(images)]
    texts = ["Find it." * (i + 1) for i in range(count)]
    inputs = zip(texts, images, crops, strict=True)
    return [encode(policy.processor, text, image, crop=crop) for text, image, crop in inputs]


def make_infinite(policy: Policy, prompt: EncodedPrompt) -> None:
    """From here on the prompt's hidden states are not finite, as where an image overflows float16."""
    compute_image_features(policy, [prompt])
    image = prompt.images[0]
    image.features = [torch.full_like(layer, torch.inf) for layer in image.features]
