"""What a step needs of a GPU: predicted from a model's config, measured on the largest steps there can be.

    python locus_mini.py --model Qwen/Qwen2.5-VL-7B-Instruct --dry-run

The prediction counts what the code keeps alive; on a machine without CUDA it is all there is.
`tests/gpu_check.py --only memory` compares it with what was really allocated.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from PIL import Image
from torch import nn

from data import Cue
from files.errors import UserError
from models import read_family
from policy import LOGIT_CHUNK_SIZE, MAX_PATCHES_PER_PASS, Policy
from prompts import Family
from reward import Reward
from training.experiment import prepare
from training.memory import LOWER, PEAKS
from training.settings import Config, resolve

WORDS = 128  # tokens of a prompt beside its images, about
CARDS = (8, 12, 16, 24, 48, 80)  # GB
CONTEXT = 0.6  # GB of a card that CUDA itself and its kernels take, about

# ---------------------------------------------------------------- prediction


def empty_model(config: Any) -> nn.Module:
    """A model without its numbers, in an instant and in no memory."""
    with torch.device("meta"):
        return hf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def weights(model: nn.Module, family: Family, four: bool, rank: int) -> dict[str, int]:
    """Bytes of text layers in 4 bit (NF4, double quantisation), of the rest in 16, of an adapter in 32."""
    out = {"text layers": 0, "other weights": 0, "adapter": 0}
    small = {}  # bytes of quantised weights, by the name of their layer
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if four and not name.startswith(family.skip_4bit):
            n = module.weight.numel()  # half a byte each, a byte for every 64, four for every 64 · 256
            small[f"{name}.weight"] = n // 2 + n // 64 + n // 64 // 64
        if re.fullmatch(family.lora_targets, name):
            out["adapter"] += 4 * rank * (module.in_features + module.out_features)
    for name, weight in model.named_parameters():  # tied ones once
        kind = "text layers" if ".layers." in name and "language_model" in name else "other weights"
        out[kind] += small.get(name, 2 * weight.numel())
    return out


def prompt_tokens(config: Any, cfg: Config) -> int:
    """Tokens of the longest prompt: image and crop at their limits, and the words."""
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    return cfg.image_pixels // side**2 + cfg.crop_pixels // side**2 + WORDS


def predict(model: nn.Module, cfg: Config, family: Family) -> dict[str, dict[str, int]]:
    """Bytes on a GPU by phase and part; the model may be empty.

    Counted by token of a row [prompt | answers], some numbers in 16 bits, some in 32, with H the hidden size,
    F that of the feed-forward part, A of all heads together:
    rollout      keys and values; while prompts are read, 12·F + 15·H for the layer at work, later 16 for the
                 chance of each next token; before, what the vision tower needs
    policy pass  a layer's input, 2·H, and for the layer at work 28·H + 12·A + 14·F; without gradient
                 checkpointing all that a layer keeps, 28·H + 12·A + 10·F, and 4·F for that at work; or a
                 chunk of logits
    """
    text, vision = model.config.get_text_config(), model.config.vision_config
    parts = weights(model, family, cfg.load_in_4bit is not False, cfg.lora_rank)
    known = parts | {"moments": 2 * parts["adapter"]}
    H, F, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    size = getattr(text, "head_dim", None) or H // text.num_attention_heads
    A, P = text.num_attention_heads * size, prompt_tokens(model.config, cfg)
    row = P + cfg.num_generations * cfg.max_new_tokens
    at_once, micro = min(cfg.rollout_batch, cfg.prompts), min(cfg.micro_batch, cfg.prompts // cfg.updates)
    column = 4 * text.num_key_value_heads * size * layers
    patches = min(MAX_PATCHES_PER_PASS, at_once * (P - WORDS) * vision.spatial_merge_size**2)
    seeing = patches * (20 * vision.hidden_size + 6 * vision.intermediate_size)
    reading = at_once * P * (12 * F + 15 * H + column)
    writing = at_once * (row * column + 16 * cfg.num_generations * text.vocab_size)
    kept, work = (
        (2 * H, 28 * H + 12 * A + 14 * F) if cfg.gradient_checkpointing else (28 * H + 12 * A + 10 * F, 4 * F)
    )
    layer = micro * row * (work + 3 * row) + 2 * H * F  # and a weight that is no longer 4-bit
    logits = 16 * min(LOGIT_CHUNK_SIZE, micro * (row - P) * text.vocab_size)
    passing = {"gradients": parts["adapter"], "layers' inputs": micro * row * (layers * kept + 10 * H)}
    return {
        "loading": parts,
        "rollout": known | {"cache and layer at work": max(seeing, reading, writing)},
        "policy pass": known | passing | {"layer at work": max(layer, logits)},
        "optimizer": known | {"gradients": parts["adapter"], "update": parts["adapter"]},
    }


# ---------------------------------------------------------------- a dry run


@dataclass(frozen=True)
class LargestCues:
    """Cues of one grey photo, as large as image and crop may be: 4 by 3, with a window of its own shape."""

    image_pixels: int
    crop_pixels: int

    def __getitem__(self, index: int) -> Cue:
        w, h = round((self.image_pixels * 4 / 3) ** 0.5), round((self.image_pixels * 3 / 4) ** 0.5)
        share = min(1.0, (self.crop_pixels / self.image_pixels) ** 0.5)
        box = (0, 0, round(w * share), round(h * share))
        return Cue(Image.new("RGB", (w, h), "gray"), box, "large")


def random_rewards(completions: list[str], example: Any, cfg: Config) -> list[Reward]:
    """Rewards by chance: they differ within a group, so every token of it has a gradient to compute."""
    rng = random.Random(example.index)
    return [Reward(rng.random(), 0.0, 0.0) for _ in completions]


def largest_steps(policy: Policy, cfg: Config, train_step: Callable, task: Any) -> list[dict]:
    """Metrics of two steps with the longest answers there can be and rewards by chance; PEAKS by phase."""
    never = torch.tensor([-1], device=policy.device)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
    cues, cfg = LargestCues(cfg.image_pixels, cfg.crop_pixels), replace(cfg, steps=2)
    policy, task = replace(policy, stop_ids=never), replace(task, score=random_rewards)
    return [train_step(policy, optimizer, cues, i, cfg, task)[0] for i in range(2)]


def dry_run(flags: dict[str, Any], train_step: Callable, task: Any) -> None:
    """Prints the peak memory by phase: measured on the largest steps where there is a GPU, else predicted."""
    if "resume" in flags:
        raise UserError("--dry-run goes with the flags of a run themselves, not with --resume: give those.")
    config, family = read_family(flags.get("model", "tiny"), flags.get("box_frame"))
    cfg, _ = resolve(flags, family)
    predicted = predict(empty_model(config), cfg, family)
    if not torch.cuda.is_available():
        print(table(predicted))
        return
    try:
        policy, cfg, _ = prepare(flags)
        seconds = [f"{step['seconds']:.1f}" for step in largest_steps(policy, cfg, train_step, task)]
    finally:
        print(table(predicted, PEAKS))  # as far as it came
    print(f"seconds of the two steps, of which the first warms up: {', '.join(seconds)}")
    print(
        f"PyTorch holds {torch.cuda.memory_reserved() / 1e9:.2f} GB in the end, with what it keeps for later"
    )


def table(predicted: dict[str, dict], measured: dict[str, int] | None = None) -> str:
    """Peaks by phase in GB, with what was measured if anything was, and the smallest card that holds them."""
    lines = [
        f"{'phase':14}{'predicted':>10}" + f"{'measured':>10}" * bool(measured) + "  of which (predicted)"
    ]
    for name, parts in predicted.items():
        total = sum(parts.values())
        there = f"{measured.get(name, 0) / 1e9:10.2f}" if measured else ""
        of_which = ", ".join(f"{what} {n / 1e9:.2f}" for what, n in parts.items())
        lines.append(f"{name:14}{total / 1e9:10.2f}{there}  {of_which}")
    worst = max(predicted, key=lambda name: sum(predicted[name].values()))
    peak = max(measured.values()) if measured else sum(predicted[worst].values())
    worst = max(measured, key=measured.get) if measured else worst
    card = next((f"a card of {c} GB" for c in CARDS if peak / 1e9 + CONTEXT <= c), "no single card")
    how = "Measured" if measured else "Predicted, not measured"
    lines.append(f"{how}, in GB: {peak / 1e9:.2f} at most, so {card}. If it does not fit: {LOWER[worst]}.")
    return "\n".join(lines)
