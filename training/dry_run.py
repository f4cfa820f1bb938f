"""The memory and the time of a run: predicted from a model's config, and measured on a GPU in four steps.

    python locus_mini.py --model Qwen/Qwen2.5-VL-7B-Instruct --dry-run

The prediction of memory counts the tensors that the code keeps. Without CUDA nothing is measured.
`tests/gpu_check.py --only memory` compares it with what a GPU allocates.

The prediction of time counts work. A forward pass takes as long as the slower of two: Python, which starts
its operations one by one, and the GPU, which moves bytes and multiplies. What is marked as an assumption has
not been measured on a GPU; docs/gpu.md explains it and has the hours of published models.
"""

import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from PIL import Image

from data import Cue, Cues
from evaluation.heldout import build_heldout_set, evaluate
from evaluation.reply_cache import default_batch_size
from files.errors import UserError
from models import read_family
from policy import LOGIT_CHUNK_SIZE, MAX_PATCHES_PER_PASS, Policy
from prompts import Family
from reward import Reward
from training.decoding import PROMPTS_PER_PASS
from training.experiment import open_run_cues, prepare
from training.learning import NUM_CUES, NUM_QUESTIONS
from training.memory import LOWER, PEAKS
from training.settings import Config, resolve

SIZES = (8, 12, 16, 24, 48, 80)  # of cards, in GB
CONTEXT = 0.6  # GB of a card that CUDA itself and its kernels take, roughly
TEXT_TOKENS = 128  # of a prompt, roughly; the rest are image tokens
MEAN_LENGTH = 0.5  # of --max-new-tokens that a completion has on average: an assumption
# Operations that PyTorch dispatches for a pass of a text layer with LoRA in 4 bit: by run_text, and by the
# fused layers that decode a rollout (tests/count_dispatches.py: 3,434 and 1,189 at 36 layers, without views).
LAYER_CALLS, FUSED_CALLS = 3434 / 36, 1189 / 36
CALL_SECONDS = 15e-6  # Python's time for each and its views: an assumption, 10 to 20 µs on most hosts
BANDWIDTH_SHARE, FLOPS_SHARE = 0.8, 0.5  # of the data sheet that real kernels reach: an assumption

# From data sheets: a part of the name that CUDA gives, GB, GB/s, and TFLOPs of dense 16-bit matrix products
# that add up in float32.
CARDS = {
    "RTX 4060": (8, 272, 30),
    "RTX 3060": (12, 360, 25),
    "T4": (16, 320, 65),
    "RTX 3090": (24, 936, 71),
    "RTX 4090": (24, 1008, 165),
    "H100": (80, 3350, 989),
}

# ---------------------------------------------------------------- predicted memory


def empty_model(config: Any) -> torch.nn.Module:
    """A model whose weights have shapes but no values, so it takes no time and no memory."""
    with torch.device("meta"):
        return hf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def weights(model: torch.nn.Module, family: Family, load_in_4bit: bool, rank: int) -> dict[str, int]:
    """Bytes of the weights: text layers (NF4 with double quantization, if in 4 bit), others in 16 bit, and
    the adapter in float32."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = [module for name, module in linear.items() if re.fullmatch(family.lora_targets, name)]
    adapter = sum(4 * rank * (module.in_features + module.out_features) for module in adapted)
    sizes = {"text layers": 0, "other weights": 0, "adapter": adapter}
    for name, weight in model.named_parameters():  # a tied weight comes once
        part = "text layers" if ".layers." in name and "language_model" in name else "other weights"
        n, is_linear = weight.numel(), name.removesuffix(".weight") in linear
        nf4 = n // 2 + n // 64 + n // 64 // 64  # half a byte, and a scale: 1 byte per 64, 4 per 64 · 256
        sizes[part] += nf4 if load_in_4bit and is_linear and not name.startswith(family.skip_4bit) else 2 * n
    return sizes


def predict(model: torch.nn.Module, cfg: Config, family: Family) -> dict[str, dict[str, int]]:
    """Bytes on a GPU by phase and part; the model may be an empty one.

    A row of P prompt tokens and G · T completion tokens has L = P + G · T columns. With H the hidden size, F
    that of the feed-forward layers and A that of all attention heads together, in bytes:

    rollout      the vision tower or, if it is larger, all keys and values, and with them a layer that reads
                 four prompts, 12·F + 15·H per token and their keys and values again, or 16 per completion
                 and word of the vocabulary
    policy pass  per column, with gradient checkpointing: each layer's input, 2·H, and one layer at work,
                 28·H + 12·A + 14·F; without: what each layer keeps, 28·H + 12·A + 10·F and a copy of the
                 mask, 2·L, and 4·F for the one at work; and the mask and scores, 3·L. Or a chunk of
                 logits, if it is larger
    """
    text, vision = model.config.get_text_config(), model.config.vision_config
    H, F, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    head_dim = getattr(text, "head_dim", None) or H // text.num_attention_heads
    A, kv_bytes = text.num_attention_heads * head_dim, 4 * text.num_key_value_heads * head_dim * layers
    # The longest prompt has image and crop at their largest.
    token_pixels = (vision.patch_size * vision.spatial_merge_size) ** 2
    P = TEXT_TOKENS + cfg.image_pixels // token_pixels + cfg.crop_pixels // token_pixels
    L = P + cfg.num_generations * cfg.max_new_tokens
    # The rollout sees the images, reads the prompts, then writes the completions.
    batch = min(cfg.rollout_batch, cfg.prompts)
    patches = min(MAX_PATCHES_PER_PASS, batch * (P - TEXT_TOKENS) * vision.spatial_merge_size**2)
    seeing = patches * (20 * vision.hidden_size + 6 * vision.intermediate_size)
    reading = min(PROMPTS_PER_PASS, batch) * P * (12 * F + 15 * H + kv_bytes)
    writing = batch * 16 * cfg.num_generations * text.vocab_size
    rollout = max(seeing, batch * L * kv_bytes + max(reading, writing))
    # The policy pass keeps something of each layer, and needs more for the layer at work.
    kept, work = 28 * H + 12 * A + 10 * F + 2 * L, 4 * F
    if cfg.gradient_checkpointing:
        kept, work = 2 * H, 28 * H + 12 * A + 14 * F
    batch = min(cfg.micro_batch, cfg.prompts // cfg.updates)
    layer = batch * L * (work + 3 * L) + 2 * H * F  # 2 · H · F: a weight, back in 16 bit
    logits = 16 * min(LOGIT_CHUNK_SIZE, batch * (L - P) * text.vocab_size)
    parts = weights(model, family, cfg.load_in_4bit is not False, cfg.lora_rank)
    static, gradients = parts | {"moments": 2 * parts["adapter"]}, {"gradients": parts["adapter"]}
    inputs = {"layers' inputs": batch * L * (layers * kept + 10 * H)}
    return {
        "loading": parts,
        "rollout": static | {"cache and layer at work": rollout},
        "policy pass": static | gradients | inputs | {"layer at work": max(layer, logits)},
        "optimizer": static | gradients | {"update": parts["adapter"]},
    }


# ---------------------------------------------------------------- predicted time


def summary(training: float, evaluation: float) -> str:
    """Hours as text: their sum and its parts; less than an hour in minutes.

    >>> summary(training=2.25, evaluation=0.5)
    '2.8 h (training 2.2 h, evaluation 30 min), predicted'
    """
    hours = (training + evaluation, training, evaluation)
    total, *parts = (f"{h:.1f} h" if h >= 0.95 else f"{ceil(60 * h)} min" for h in hours)
    return f"{total} (training {parts[0]}, evaluation {parts[1]}), predicted"


def predict_hours(model: torch.nn.Module, cfg: Config, card: str) -> tuple[float, float]:
    """Hours of training and of both evaluations on a card of CARDS; the model may be an empty one.

    A forward pass of B rows with Q new tokens each, at L columns, through n layers:

    Python   n · calls of a layer · CALL_SECONDS
    bytes    the layers' weights: 2 each in 16 bits, ½ in 4 bits, 4½ where bitsandbytes first writes and
             reads them in 16 bits; lm_head, 2 each; and the keys and values of B · L columns
    FLOPs    2 per weight and token, and 4 · n · A · L per token for attention over A = all heads together
    seconds  max(Python, bytes / (BANDWIDTH_SHARE · bandwidth) + FLOPs / (FLOPS_SHARE · TFLOPs))

    A rollout reads the images and the prompts, then runs a pass per token until its longest completion ends:
    --max-new-tokens passes. A training pass is a packed row; a backward pass costs as much as a forward pass.
    Nothing here has been compared with a GPU.
    """
    text_layers, vision = model.model.language_model.layers, model.config.vision_config
    parts = (text_layers, model.model.visual, model.lm_head)
    in_layers, in_vision, in_head = (sum(w.numel() for w in part.parameters()) for part in parts)
    attention, layers = text_layers[0].self_attn, len(text_layers)
    A, kv_bytes = attention.q_proj.out_features, 4 * layers * attention.k_proj.out_features  # of a column
    _, bandwidth, tflops = CARDS[card]
    # A photo is at its upper limit of pixels; the crop of a small object is enlarged to the lower limit.
    patches = (cfg.image_pixels + cfg.crop_min_pixels) // vision.patch_size**2
    P, T = TEXT_TOKENS + patches // vision.spatial_merge_size**2, cfg.max_new_tokens

    def forward(B: int, Q: float, L: float, vision_flops: float = 0.0, calls: float = LAYER_CALLS) -> float:
        in_4bit = 0.5 if B * Q <= 64 else 4.5  # bitsandbytes' own limit depends on the card and the shape
        moved = in_layers * (2 if cfg.load_in_4bit is False else in_4bit) + 2 * in_head + B * L * kv_bytes
        flops = vision_flops + B * Q * (2 * (in_layers + in_head) + 4 * layers * A * L)
        on_gpu = moved / (BANDWIDTH_SHARE * bandwidth * 1e9) + flops / (FLOPS_SHARE * tflops * 1e12)
        return max(layers * calls * CALL_SECONDS, on_gpu)

    def generate(B: int, G: int) -> float:
        # Read images and prompts, then run a pass per token; half of the completions' columns on average.
        calls = FUSED_CALLS if G > 1 else LAYER_CALLS  # an evaluation decodes with run_text
        return forward(B, P, P, 2 * in_vision * B * patches) + T * forward(B, G, P + G * T / 2, calls=calls)

    batch = min(cfg.rollout_batch, cfg.prompts)
    sampling = ceil(cfg.prompts / batch) * generate(batch, cfg.num_generations)
    # The reference, the policy, its layers again (gradient checkpointing), and backward; π_old if it is used.
    passes = cfg.iterations * ((cfg.beta > 0) + 1 + cfg.gradient_checkpointing + 1)
    passes += cfg.updates * cfg.iterations > 1
    rows = min(cfg.micro_batch, cfg.prompts // cfg.updates)
    columns = P + cfg.num_generations * T * MEAN_LENGTH
    learning = cfg.updates * ceil(cfg.prompts / cfg.updates / rows) * passes * forward(rows, columns, columns)
    # Before and after; of scenes eight replies a cue (heldout.evaluate), and two for the baselines.
    replies = cfg.eval_cues * (2 * 8 + 2 if cfg.data == "scenes" else 2)
    if cfg.eval_every:  # and while training
        replies += cfg.steps // cfg.eval_every * (NUM_CUES + NUM_QUESTIONS * (cfg.data == "scenes"))
    batch = default_batch_size(SimpleNamespace(device=torch.device("cuda")))
    evaluation = ceil(replies / batch) * generate(batch, 1)
    return cfg.steps * (sampling + learning) / 3600, evaluation / 3600


# ---------------------------------------------------------------- measurement


def largest_cue(cfg: Config) -> Cue:
    """A cue on a grey 4:3 image; image and crop have as many pixels as the model's limits allow."""
    w, h = round((cfg.image_pixels * 4 / 3) ** 0.5), round((cfg.image_pixels * 3 / 4) ** 0.5)
    share = min(1.0, (cfg.crop_pixels / cfg.image_pixels) ** 0.5)
    return Cue(Image.new("RGB", (w, h), "gray"), (0, 0, round(w * share), round(h * share)), "large")


def two_steps(policy: Policy, cues: Cues | list, cfg: Config, train_step: Callable, task: Any) -> list[dict]:
    """The metrics of two training steps with an optimizer of their own."""
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=cfg.lr)
    return [train_step(policy, optimizer, cues, step, cfg, task)[0] for step in range(2)]


def largest_steps(policy: Policy, cfg: Config, train_step: Callable, task: Any) -> list[dict]:
    """Metrics of two steps with the largest images and longest completions; PEAKS has their memory."""
    cues = [largest_cue(cfg)] * 2 * cfg.prompts
    # No token has the id −1, so no completion stops before the limit.
    policy = replace(policy, stop_ids=torch.tensor([-1], device=policy.device))
    # Random rewards differ within a group, so every token has a gradient to compute.
    task = replace(task, score=lambda texts, *_: [Reward(random.random(), 0.0, 0.0) for _ in texts])
    return two_steps(policy, cues, cfg, train_step, task)


def measure_hours(policy: Policy, cfg: Config, train_step: Callable, task: Any) -> str:
    """Hours of a run as one line, from two steps and the evaluation of one batch, on the run's own cues.

    Completions end by themselves. The first step warms up; the second counts. Its images are prepared within
    it, not in a thread during the step before, so the hours are a little high. Those of --eval-every are not
    part of them.
    """
    cues, heldout_cues, _ = open_run_cues(cfg)
    step = two_steps(policy, cues, cfg, train_step, task)[1]
    num_cues, started = min(default_batch_size(policy), cfg.eval_cues), time.monotonic()
    evaluate(policy, build_heldout_set(policy, heldout_cues, num_cues), cfg.max_new_tokens)
    evaluation = 2 * cfg.eval_cues / num_cues * (time.monotonic() - started)
    hours = summary(cfg.steps * step["seconds"] / 3600, evaluation / 3600)
    return f"{hours}: {step['seconds']:.1f} s a step, {step['completions/mean_length']:.0f} tokens on average"


def dry_run(flags: dict[str, Any], train_step: Callable, task: Any) -> None:
    """Prints the peak memory by phase and the hours of a run: predicted, and where there is a GPU from steps.

    The largest possible steps measure memory; two steps on the run's own cues then give its hours.
    """
    if "resume" in flags:
        raise UserError("--dry-run does not read --resume: give it the flags of the run instead.")
    config, family = read_family(flags.get("model", "tiny"), flags.get("box_frame"))
    model, cfg = empty_model(config), resolve(flags, family)[0]
    predicted = predict(model, cfg, family)
    try:
        if torch.cuda.is_available() and not flags.get("cpu"):
            policy, cfg, _ = prepare(flags)
            largest_steps(policy, cfg, train_step, task)
            # Now the memory of the largest steps is measured, and their shapes have warmed up the GPU.
            print(f"A run on this GPU, from two steps: {measure_hours(policy, cfg, train_step, task)}")
    finally:
        print(table(predicted, PEAKS))  # after an out-of-memory error too: it has the phases before
        peak = max(sum(parts.values()) for parts in predicted.values()) / 1e9 + CONTEXT
        print(f"Predicted time if completions have {MEAN_LENGTH * cfg.max_new_tokens:.0f} tokens on average:")
        for card, (memory, *_) in CARDS.items():
            if memory >= peak:
                print(f"{card:9}{memory:>3} GB  {summary(*predict_hours(model, cfg, card))}")
    advise_16_bits(flags)


def advise_16_bits(flags: dict[str, Any]) -> None:
    """Prints a sentence where 4 bit is only the default and 16 bits would fit this GPU too, as predicted."""
    if not torch.cuda.is_available() or flags.keys() & {"cpu", "load_in_4bit", "resume"}:
        return
    config, family = read_family(flags.get("model", "tiny"), flags.get("box_frame"))
    cfg, _ = resolve(flags | {"load_in_4bit": False}, family)
    peak = max(sum(parts.values()) for parts in predict(empty_model(config), cfg, family).values())
    fits = peak + CONTEXT * 1e9 <= torch.cuda.get_device_properties(0).total_memory
    if fits and not hasattr(config, "quantization_config"):  # weights that are in 4 bit already stay so
        gain = "the weights are then not rounded, and need no time to unpack (not measured)"
        print(f"--no-load-in-4bit would fit this GPU (peak {peak / 1e9:.2f} GB, predicted): {gain}.")


def table(predicted: dict[str, dict[str, int]], measured: dict[str, int]) -> str:
    """Peak memory by phase in GB, and the smallest card that holds it; `measured` is empty without a GPU.

    The phases are measured by what is allocated, which names the one to lower. A card must hold what is
    reserved.
    """
    totals = {name: sum(parts.values()) for name, parts in predicted.items()}
    lines = ["Measured on this GPU." if measured else "Predicted, not measured: nothing has run on a GPU."]
    lines.append(f"{'phase':14}{'predicted':>10}{'allocated':>10}  GB; predicted parts")
    for name, parts in predicted.items():
        # Less than 5e6 bytes would print as 0.00.
        columns = [f"{n / 1e9:.2f}" if n >= 5e6 else "-" for n in (totals[name], measured.get(name, 0))]
        shown = ", ".join(f"{part} {n / 1e9:.2f}" for part, n in parts.items() if n >= 5e6)
        if columns != ["-", "-"]:
            lines.append(f"{name:14}{columns[0]:>10}{columns[1]:>10}  {shown}".rstrip())
    worst = max(predicted, key=lambda name: (measured or totals).get(name, 0))
    peak = max((measured["reserved"] if measured else totals[worst]) / 1e9, 0.01)
    card = next((f"a card of {size} GB is" for size in SIZES if peak + CONTEXT <= size), "no single card is")
    kind = "reserved" if measured else "predicted"
    lines.append(f"The {kind} peak is {peak:.2f} GB, so {card} enough. If it does not fit: {LOWER[worst]}.")
    return "\n".join(lines)
