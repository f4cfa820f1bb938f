"""Measures what only a GPU can show: kernels, gaps, speed, peak memory, and a step beside TRL's.

    python tests/gpu_check.py --only NAME [NAME ...] [--small] [--models FOLDER]

The names are the parts below. A part runs in a process of its own, prints the card, the versions and its
command, and is stopped after 8 minutes. Nothing is downloaded: models of the published shapes get random
weights, written as safetensors to the folder --models (7.5 GB), where the next call finds them, or to TMPDIR
(memory: 17 GB at most). Without CUDA every part is small: miniatures and few tokens, and what a CPU cannot
show is left out. docs/gpu.md has the plan for a new card: three calls, what each line proves, and what
refutes it.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import bitsandbytes
import families
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import policy as policy_module
from data import CueConfig, encode_cue, open_cues
from evaluation.scores import mean
from locus_mini import LOCUS, group_advantages, optimizer_step, train_step
from models import add_lora, load_policy, read_family
from policy import Batch, Policy, Rollout, collate, rollout, token_logps
from prompts import EncodedPrompt
from tiny import scenes
from training import dry_run, memory
from training.decoding import decoder
from training.experiment import prepare
from training.settings import Config, resolve

CUDA, ROOT = torch.cuda.is_available(), Path(__file__).parents[1]
DEVICE = "cuda" if CUDA else "cpu"
PART_SECONDS = 8 * 60  # after which a part is stopped
LARGE_MODEL = "Qwen2.5-VL-3B-Instruct"  # of the parts that measure a step's speed


def machine() -> str:
    name = torch.cuda.get_device_name() if CUDA else "CPU only"
    packages = (torch, transformers, bitsandbytes)
    return f"{name}; " + ", ".join(f"{package.__name__} {package.__version__}" for package in packages)


def synchronize() -> None:
    """Waits for the GPU, which works on after a call has returned."""
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], repeat: int = 1) -> float:
    """Mean seconds of a call."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeat


def peak_gigabytes(call: Callable[[], Any]) -> str:
    """The most memory that PyTorch allocates during a call."""
    if not CUDA:
        return "memory not measured on a CPU"
    torch.cuda.reset_peak_memory_stats()
    call()
    return f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"


def use_cudnn(enabled: bool) -> None:
    """Whether attention may use cuDNN's kernel, which plans anew for every length."""
    torch.backends.cuda.enable_cudnn_sdp(enabled)


def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


# ---------------------------------------------------------------- memory


class Tracker(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return: for a CPU, what torch.cuda counts on a GPU.

    Memory that an operator uses only internally does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # bytes of each storage
        self.current = self.peak = 0

    def synchronize(self) -> None:
        """A CPU has nothing in flight."""

    def memory_reserved(self) -> int:
        return self.current

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.current -= self.sizes.pop(key)

    def add_model(self, model: nn.Module) -> None:
        for tensor in model.parameters():
            self.add(tensor)
            if state := getattr(tensor, "quant_state", None):
                for part in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
                    self.add(part)

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def max_memory_allocated(self) -> int:
        return self.peak

    def max_memory_reserved(self) -> int:
        return self.peak  # a CPU has no allocator that keeps memory for reuse

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.current


@dataclass
class Case:
    """A published model and how to run it; `card`: GB of the card on which it must fit."""

    name: str
    flags: dict[str, Any]  # of locus_mini.py
    overrides: dict[str, Any] = field(default_factory=dict)  # of the model's config
    card: int | None = None


# A photo and a crop, and 8 completions of 256 tokens for each of 8 prompts.
ON_GPU = [
    Case("Qwen2.5-VL-3B-Instruct", {"image_pixels": 640 * 480}, card=8),
    Case("Qwen3-VL-4B-Instruct", {"image_pixels": 640 * 480}, card=8),
    Case("Qwen2.5-VL-7B-Instruct", {"image_pixels": 640 * 480}, card=12),
    Case("Qwen2.5-VL-7B-Instruct", {"image_pixels": 1280 * 960}, card=16),
]
# The published widths, but few enough layers, words and tokens for a CPU.
SMALL_FLAGS = {
    "num_generations": 4,
    "max_new_tokens": 24,
    "prompts": 2,
    "image_pixels": 224**2,
    "crop_pixels": 112**2,
}
TWO_LAYERS_QWEN2_5 = {
    "num_hidden_layers": 2,
    "vocab_size": 32_000,
    "vision_config": {"depth": 2, "fullatt_block_indexes": [1]},
}
TWO_LAYERS_QWEN3 = {"text_config": {"num_hidden_layers": 2, "vocab_size": 32_000}}
TWO_LAYERS_QWEN3["vision_config"] = {"depth": 2, "deepstack_visual_indexes": [0]}
ON_CPU = [
    Case("Qwen2.5-VL-3B-Instruct", SMALL_FLAGS, TWO_LAYERS_QWEN2_5),
    Case("Qwen2.5-VL-3B-Instruct", SMALL_FLAGS | {"gradient_checkpointing": False}, TWO_LAYERS_QWEN2_5),
    Case("Qwen3-VL-4B-Instruct", SMALL_FLAGS, TWO_LAYERS_QWEN3),
    Case("Qwen2.5-VL-7B-Instruct", SMALL_FLAGS, TWO_LAYERS_QWEN2_5),
]


def build(name: str, folder: Path, **overrides: Any) -> Path:
    """Writes a model of a published shape with random weights to a folder, unless the folder has it."""
    if not (folder / "model.safetensors.index.json").exists():
        families.random_weights(families.settings(name, folder, **overrides))
        if CUDA:
            torch.cuda.empty_cache()
    return folder


def measure_case(case: Case, folder: Path) -> dict[str, Any]:
    """Peak bytes by phase, predicted and measured; on a GPU also the seconds of the second of two steps."""
    build(case.name, folder, **case.overrides)
    flags = {"model": str(folder), "load_in_4bit": True} | case.flags
    config, family = read_family(flags["model"])
    cfg, _ = resolve(flags, family)
    predicted = dry_run.predict(dry_run.empty_model(config), cfg, family)
    row = {"predicted": {name: sum(parts.values()) for name, parts in predicted.items()}}
    if CUDA:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (case.card - dry_run.CONTEXT) * 1e9 / total))
        policy, cfg, _ = prepare(flags)
        steps = dry_run.largest_steps(policy, cfg, train_step, LOCUS)
        row |= {
            "seconds": steps[-1]["seconds"],
            "tokens": cfg.prompts * cfg.num_generations * cfg.max_new_tokens,
        }
        return row | {"measured": memory.PEAKS}
    policy, cfg, _ = prepare(flags, dtype=torch.bfloat16)
    memory.METER = tracker = Tracker()
    tracker.add_model(policy.model)
    memory.PEAKS["loading"] = tracker.current
    with tracker:
        dry_run.largest_steps(policy, cfg, train_step, LOCUS)
    return row | {"measured": memory.PEAKS}


def check_memory(indices: tuple[int, ...]) -> None:
    """Measures each case in a process of its own, so that no memory of a case counts in the next.

    indices: of the cases in ON_GPU, without CUDA in ON_CPU.
    """
    print(
        f"{'model':26}{'image':>10}{'card':>7}" + "".join(f"{name:>18}" for name in memory.LOWER) + "   step"
    )
    with tempfile.TemporaryDirectory() as temp:
        for number, case in enumerate(ON_GPU if CUDA else ON_CPU):
            if number not in indices:
                continue
            folder = Path(temp) / case.name
            for old in (path for path in Path(temp).iterdir() if path != folder):
                shutil.rmtree(old)  # the disk holds one model at a time
            command = [sys.executable, __file__, "--only", "memory", "--case", str(number), str(folder)]
            process = subprocess.run(command, capture_output=True, text=True)
            title = f"{case.name:26}{case.flags['image_pixels']:>10,}{f'{case.card} GB' if CUDA else '':>7}"
            if process.returncode:
                print(f"{title}  failed: {(process.stderr.strip().splitlines() or ['it was killed'])[-1]}")
                continue
            row = json.loads(process.stdout.strip().splitlines()[-1])
            for name in memory.LOWER:
                measured, predicted = row["measured"].get(name, 0) / 1e9, row["predicted"][name] / 1e9
                title += f"{measured:8.3f} ({predicted / measured - 1:+5.0%})" if measured else ""
            seconds = (
                f"{row['seconds']:6.1f} s, {row['tokens'] / row['seconds']:.0f} tokens/s" if CUDA else ""
            )
            print(title + seconds, flush=True)
    meaning = "allocated on the GPU" if CUDA else "of tensors on the CPU, with 2 layers and 32,000 words"
    print(f"GB {meaning}; in brackets, how far the prediction is off; {machine()}")


# ---------------------------------------------------------------- attention kernels


def check_sdpa(small: bool) -> None:
    """What a length that attention has not met costs beside a known one, with cuDNN and without."""
    rollout_length, row_length = (64, 96) if small else (600, 1500)
    for label, enabled in (("cuDNN allowed", True), ("without cuDNN", False)):
        use_cudnn(enabled)
        offset = 0 if enabled or small else 4000  # other lengths: those before are known by now
        decoding = [
            attention_call(8, 2, 64, rollout_length + offset + 8 * i, backward=False) for i in range(1, 9)
        ]
        if CUDA:
            with profile(activities=[ProfilerActivity.CUDA]) as recorded:
                attention_call(8, 2, 64, rollout_length, backward=False)()
            print(f"{label}, kernels: {[event.key[:60] for event in recorded.key_averages()][:4]}")
        print(f"{label}, rollout: {new_and_known(decoding)}")
        rows = [row_length + 13 * i + (0 if enabled else 5) for i in range(4)]
        training = [attention_call(1, 16, length, length, backward=True) for length in rows]
        print(f"{label}, packed pass with gradient: {new_and_known(training)}", flush=True)


def attention_call(B: int, A: int, Q: int, L: int, backward: bool) -> Callable[[], None]:
    """A call of sdpa with a bool mask, in the shapes of a rollout or of a packed pass."""
    query = torch.randn(B, A, Q, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=backward)
    key, value = (torch.randn(B, A, L, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    key.requires_grad_(backward), value.requires_grad_(backward)
    mask = torch.ones(B, 1, Q, L, dtype=torch.bool, device=DEVICE).tril(L - Q)

    def call() -> None:
        out = F.scaled_dot_product_attention(query, key, value, mask)
        if backward:
            out.sum().backward()

    return call


def new_and_known(calls: list[Callable[[], None]]) -> str:
    """Milliseconds of the first and of the second time that each call runs."""
    new, known = (1e3 * mean(seconds_of(call) for call in calls) for _ in range(2))
    return f"{new:.2f} ms for a new length, {known:.2f} ms for a known one"


# ---------------------------------------------------------------- gaps between rollout and training pass

MEAN_LIMIT, Q90_LIMIT = 0.03, 0.15  # nats; in 16 bits a sound pass stays below both


def others_visible(segment_ids: Tensor, num_queries: int | None = None) -> Tensor:
    """A wrong mask, in which the completions of a group see each other."""
    return SOUND_MASK(segment_ids.clamp(max=0), num_queries)


SOUND_MASK = policy_module.group_mask


@contextmanager
def sharper_head(policy: Policy, factor: float) -> Iterator[None]:
    """Logits times a factor; by a hook, because the embedded model's lm_head is also its embedding."""
    hook = policy.base_model.lm_head.register_forward_hook(lambda module, inputs, output: factor * output)
    try:
        yield
    finally:
        hook.remove()


def scored(policy: Policy, batch: Batch, rollouts: Rollout, fault: str) -> Tensor:
    """Log-probabilities of the training pass [B, G, T], with a fault."""
    head = sharper_head(policy, 3) if "× 3" in fault else nullcontext()
    if fault == "positions off by one":
        batch = replace(batch, completion_start=batch.completion_start + 1)
    policy_module.group_mask = others_visible if fault == "completions see each other" else SOUND_MASK
    try:
        with torch.no_grad(), head:
            return token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    finally:
        policy_module.group_mask = SOUND_MASK


def check_gaps(small: bool) -> None:
    """|rollout − training pass| per token, of a sound pass and of faulty ones, on trained weights."""
    num_wrong = 0
    for label, load_in_4bit, dtype in (
        ("float32", False, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("NF4", True, torch.bfloat16),
    ):
        policy = add_lora(load_policy("tiny", load_in_4bit=load_in_4bit, dtype=dtype), 16)
        cues = open_cues("scenes", "train", 0, CueConfig())
        prompts = [encode_cue(policy.processor, cues[i], "object") for i in range(2 if small else 8)]
        batch = collate(policy, prompts)
        rollouts = rollout(policy, batch, 8, 40, generator())
        with sharper_head(policy, 3):
            sharp = rollout(policy, batch, 8, 40, generator())
        sound = scored(policy, batch, rollouts, "none")
        again = scored(policy, batch, rollouts, "none")
        print(f"{label}: a repeated pass differs by {(again - sound).abs().max():.2g} at most")
        for fault, sampled, verdict in (
            ("none", rollouts, "accepted"),
            ("lm_head × 3 in both", sharp, "accepted"),
            ("positions off by one", rollouts, "refused"),
            ("completions see each other", rollouts, "refused"),
            ("lm_head × 3 in scoring only", rollouts, "refused"),
        ):
            gap = (scored(policy, batch, sampled, fault) - sampled.logps)[sampled.mask]
            sizes = gap.abs()
            average, q90 = sizes.mean().item(), sizes.quantile(0.9).item()
            found = "accepted" if average < MEAN_LIMIT and q90 < Q90_LIMIT else "refused"
            figures = (
                f"median {sizes.median():.4f}  mean {average:.4f}  90 % {q90:.4f}  max {sizes.max():.3f}"
            )
            ratio = f"mean ratio {gap.exp().mean():.3f}"
            num_wrong += found != verdict
            remark = "as it should be" if found == verdict else f"WRONG: should be {verdict}"
            print(f"{label:8}{fault:28} {figures}  {ratio}  {found}, {remark}", flush=True)
        print(f"{label}: packed and alone {packing_gap(policy, prompts, rollouts)}")
    if num_wrong:
        raise SystemExit(f"{num_wrong} verdicts are wrong")


def packing_gap(policy: Policy, prompts: list[EncodedPrompt], rollouts: Rollout) -> str:
    """How much a log-probability differs between the packed pass of a group and a row of its own."""
    rollouts, batch = rollouts.select(slice(0, 1)), collate(policy, prompts[:1])
    with torch.no_grad():
        packed = token_logps(policy, batch, rollouts.tokens, rollouts.mask)  # [1, G, T]
        completions = [rollouts.tokens[:, [g]] for g in range(8)], [rollouts.mask[:, [g]] for g in range(8)]
        alone = torch.cat([token_logps(policy, batch, *pair) for pair in zip(*completions)], 1)  # [1, G, T]
    difference = (packed - alone).abs()[rollouts.mask]
    return f"{difference.mean():.4f} nats apart (mean), {difference.max():.3f} at most"


# ---------------------------------------------------------------- speed of a published shape


def published_policy(models: Path, small: bool, **flags: Any) -> tuple[Policy, Config, Callable]:
    """A policy of the published shape (small: a miniature) whose completions never stop, its settings, and
    a function that encodes n new prompts with the largest image and the crop of a small object."""
    folder = build(LARGE_MODEL, models / (LARGE_MODEL + "-small" * small), miniature=small)
    pixels = dict(image_pixels=112 * 112) if small else dict(image_pixels=640 * 480, crop_pixels=112 * 224)
    policy, cfg, _ = prepare(
        {"model": str(folder), "load_in_4bit": True} | pixels | flags, dtype=dtype_here()
    )
    cue = dry_run.largest_cue(cfg)
    policy = replace(policy, stop_ids=torch.tensor([-1], device=policy.device))
    return policy, cfg, lambda n: [encode_cue(policy.processor, cue, "object") for _ in range(n)]


def dtype_here() -> torch.dtype | None:
    """The device's own dtype on a GPU; bf16 on a CPU, as on most GPUs."""
    return None if CUDA else torch.bfloat16


def bandwidth() -> float:
    """Bytes per second that the memory reads and writes while it copies 2 GB (on a CPU 64 MB) ten times."""
    source = torch.empty(2**31 if CUDA else 2**26, dtype=torch.uint8, device=DEVICE)
    target = source.clone()
    return 2 * len(source) / seconds_of(lambda: target.copy_(source), repeat=10)


def bytes_per_token(policy: Policy, folder: str, batch: Batch, num_generations: int, length: int) -> float:
    """What a GPU must read to sample one token of every completion: all weights, and the cache so far."""
    config, family = read_family(folder)
    text, weights = config.get_text_config(), dry_run.weights(dry_run.empty_model(config), family, True, 16)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    column_bytes = 4 * text.num_key_value_heads * head_size * text.num_hidden_layers  # of keys and values
    cache = len(batch.prompts) * (batch.input_ids.shape[1] + num_generations * length / 2) * column_bytes
    return weights["text layers"] + weights["adapter"] + 2 * text.vocab_size * text.hidden_size + cache


def decoding_rate(
    policy: Policy, prompts: list[EncodedPrompt], num_generations: int, length: int, greedy: bool = False
) -> float:
    """Seconds per token of a rollout without its prefill: a longer rollout minus a shorter one."""
    batch = collate(policy, prompts)

    def sample(num_tokens: int) -> None:
        if greedy:  # evaluation
            rollout(policy, batch, num_generations, num_tokens)
        else:
            decode = decoder(policy, num_generations, num_tokens)
            rollout(policy, batch, num_generations, num_tokens, generator(), decode)

    sample(2)  # warms up
    return (seconds_of(lambda: sample(length)) - seconds_of(lambda: sample(2))) / (length - 2)


def generate_rate(policy: Policy, prompts: list[EncodedPrompt], num_generations: int, length: int) -> float:
    """Seconds per token of transformers' own `generate` on new prompts of equal length, without prefill."""
    images, config = [image for prompt in prompts for image in prompt.images], policy.base_model.config
    inputs = dict(
        input_ids=torch.stack([prompt.input_ids for prompt in prompts]),
        mm_token_type_ids=torch.stack([prompt.mm_token_type_ids for prompt in prompts]),
        pixel_values=torch.cat([image.pixel_values for image in images]).to(policy.base_model.dtype),
        image_grid_thw=torch.stack([image.grid_thw for image in images]),
    )
    inputs = {name: tensor.to(policy.device) for name, tensor in inputs.items()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    sampling |= dict(num_return_sequences=num_generations, pad_token_id=0)
    sampling |= dict(suppress_tokens=[config.image_token_id, config.video_token_id])

    def sample(num_tokens: int) -> None:
        out = policy.model.generate(
            **inputs, **sampling, min_new_tokens=num_tokens, max_new_tokens=num_tokens
        )
        assert out.shape == (len(prompts) * num_generations, inputs["input_ids"].shape[1] + num_tokens)

    sample(2)
    return (seconds_of(lambda: sample(length)) - seconds_of(lambda: sample(2))) / (length - 2)


def check_decode(small: bool, models: Path) -> None:
    """Milliseconds a token: rows, cuDNN, 4 bit; beside the bandwidth's limit and transformers' generate."""
    length, B, G = (8, 2, 2) if small else (48, 8, 8)
    policy, _, encode = published_policy(models, small)
    prompts = encode(2 * B)

    def report(label: str, num_prompts: int, num_generations: int, seconds: float) -> None:
        rate = num_prompts * num_generations / seconds
        print(f"{label:52}{1e3 * seconds:8.1f} ms a token {rate:8.0f} tokens/s", flush=True)

    use_cudnn(True)
    for label in ("4 bit, cuDNN allowed, new lengths", "4 bit, cuDNN allowed, the same lengths again"):
        report(f"{label}, {B} × {G}", B, G, decoding_rate(policy, prompts[:B], G, length))
    use_cudnn(False)
    seconds = decoding_rate(policy, prompts[:B], G, length)
    report(f"4 bit, without cuDNN, {B} × {G}", B, G, seconds)
    folder = policy.base_model.name_or_path
    needed = bytes_per_token(policy, folder, collate(policy, prompts[:B]), G, length)
    rate = bandwidth()
    limit = f"{B * G * rate / needed:.0f} tokens/s that {rate / 1e9:.0f} GB/s allow"
    print(f"{'':52}{needed / rate / seconds:8.1%} of the {limit}")
    report(f"generate, 4 bit, {B} × {G}", B, G, generate_rate(policy, encode(B), G, length))
    report(f"4 bit, without cuDNN, {2 * B} × {G}", 2 * B, G, decoding_rate(policy, prompts, G, length))
    for n in (2, 4) if small else (4, 16, 32):
        seconds = decoding_rate(policy, (prompts * 2)[:n], 1, length, greedy=True)
        report(f"4 bit, greedy, {n} prompts (evaluation)", n, 1, seconds)
    profile_decoding(policy, prompts[:B], G)
    del policy, encode
    policy, _, encode = published_policy(models, small, load_in_4bit=False)
    report(f"16 bits, without cuDNN, {B} × {G}", B, G, decoding_rate(policy, encode(B), G, length))


def profile_decoding(policy: Policy, prompts: list[EncodedPrompt], num_generations: int) -> None:
    """What a token costs the GPU alone, so what a captured CUDA graph could gain at most; its top kernels."""
    if not CUDA:
        print("busy time and launches of a GPU: not measured on a CPU")
        return
    batch, busy, launches = collate(policy, prompts), [], []
    for num_tokens in (2, 10):
        synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            decode = decoder(policy, num_generations, num_tokens)
            rollout(policy, batch, num_generations, num_tokens, generator(), decode)
            synchronize()
        events = recorded.key_averages()
        busy.append(sum(event.self_device_time_total for event in events) / 1e3)
        launches.append(sum(event.count for event in events if "LaunchKernel" in event.key))
    busy_token, launched = (busy[1] - busy[0]) / 8, (launches[1] - launches[0]) / 8
    wall = 1e3 * decoding_rate(policy, prompts, num_generations, 18)
    gain = f"a CUDA graph could gain {wall / busy_token:.1f}× at most"
    print(f"GPU busy {busy_token:.1f} of {wall:.1f} ms a token, {launched:.0f} launches a token: {gain}")
    print(events.table(sort_by="self_device_time_total", row_limit=10, max_name_column_width=45))


def check_passes(small: bool, models: Path) -> None:
    """Seconds and memory of a prompt's reference and gradient pass: as is, with TF32, under autocast."""
    use_cudnn(False)
    policy, _, encode = published_policy(models, small)
    batch, repeat = collate(policy, encode(1)), 1 if small else 3
    tokens = torch.randint(100, 300, (1, 8, 4 if small else 120), device=policy.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]

    def reference() -> None:
        with torch.no_grad(), policy.reference():
            token_logps(policy, batch, tokens, mask)

    def gradient() -> Tensor:
        grads = torch.autograd.grad(token_logps(policy, batch, tokens, mask).mean(), parameters)
        return torch.cat([grad.flatten() for grad in grads])

    first = gradient()
    dtype = policy.base_model.dtype
    for label, context, tf32 in (
        ("as it is", nullcontext(), False),
        ("TF32", nullcontext(), True),
        ("autocast", torch.autocast(DEVICE, dtype), False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        with context:
            vector = gradient()
            times = f"reference {1e3 * seconds_of(reference, repeat):.0f} ms"
            times += f", gradient {1e3 * seconds_of(gradient, repeat):.0f} ms, {peak_gigabytes(gradient)}"
        cosine = F.cosine_similarity(first, vector, dim=0)
        same = "the same bits" if torch.equal(first, vector) else f"cosine to the first {cosine:.5f}"
        columns = batch.input_ids.shape[1] + tokens.numel()
        print(f"{label:10} row of {columns} columns: {times}, {same}", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False


def check_packed(small: bool, models: Path) -> None:
    """A group as one packed row and as eight rows in a batch: seconds and memory of rollout and update."""
    use_cudnn(False)
    policy, cfg, encode = published_policy(models, small)
    (prompt,), length, G = encode(1), 8 if small else 120, 8
    cfg = replace(cfg, prompts=1, updates=1, max_new_tokens=length)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    advantages = group_advantages(torch.arange(float(G), device=policy.device)[None])  # [1, G]
    results = {}
    for label, rows, num_generations in (("one packed row", 1, G), ("eight rows", G, 1)):
        batch, shares = collate(policy, [prompt] * rows), advantages.view(rows, num_generations)
        sample = partial(rollout, policy, batch, num_generations, length, generator())
        update = partial(optimizer_step, policy, optimizer, [(batch, sample(), shares, None)], cfg)
        update()  # warms up
        results[label] = seconds_of(sample), seconds_of(update)
        times = f"rollout {results[label][0]:.2f} s, update {results[label][1]:.2f} s"
        memory_peaks = f"rollout {peak_gigabytes(sample)}, update {peak_gigabytes(update)}"
        print(f"{label:16}{times}; {memory_peaks}", flush=True)
    one, eight = results.values()
    print(f"eight rows take {eight[0] / one[0]:.1f}× in the rollout, {eight[1] / one[1]:.1f}× in the update")
    print(f"prompt of {batch.input_ids.shape[1]} tokens, {G} completions of {length}")


# ---------------------------------------------------------------- whole runs


def check_curve(small: bool) -> None:
    """The embedded model on the GPU beside the CPU: its first float32 steps, then its curve."""
    devices = ("GPU", "CPU") if CUDA else ("CPU",)
    steps = 2 if small else 20
    probes = []
    for device in devices:
        *rows, probe = curve(device, "float32", steps)
        probes.append(torch.tensor(probe["logps"]))
        print(f"{device}, float32: {curve_line(rows)}", flush=True)
    if len(probes) == 2:
        difference = (probes[0] - probes[1]).abs().max()
        print(f"float32 log-probabilities of the same tokens differ by {difference:.1g} nats at most")
    for device in devices:
        *rows, _ = curve(
            device, "default", (3 if small else 300) if device == "GPU" else (3 if small else 80)
        )
        for start in range(0, len(rows), 20):
            if start < 80 or start + 20 >= len(rows):
                print(f"{device}, steps from {start}: {curve_line(rows[start : start + 20])}", flush=True)


def curve_line(rows: list[dict[str, float]]) -> str:
    """Mean IoU and its standard error, seconds a step and tokens a completion."""
    ious = torch.tensor([row["iou"] for row in rows])
    error = ious.std().item() / len(ious) ** 0.5 if len(ious) > 1 else float("nan")
    seconds, length = (mean(row[key] for row in rows) for key in ("seconds", "completions/mean_length"))
    return (
        f"{len(rows)} steps, IoU {ious.mean():.3f} ± {error:.3f}, {seconds:.2f} s a step, {length:.1f} tokens"
    )


def curve(device: str, dtype: str, steps: int) -> list[dict[str, Any]]:
    """The metrics of some steps, and then the probe, from a process of its own, which can hide CUDA."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "CPU" else {})
    command = [sys.executable, __file__, "--only", "curve", "--case", dtype, str(steps)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{device}: {process.stderr[-2000:]}")
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def measure_curve(dtype: str, steps: int) -> None:
    """Prints the metrics of each step of the default run, and log-probabilities of the base model."""
    flags = {"load_in_4bit": False, "steps": 300}
    policy, cfg, _ = prepare(flags, dtype=torch.float32 if dtype == "float32" else None)
    cues = open_cues("scenes", "train", 0, CueConfig())
    batch = collate(policy, [encode_cue(policy.processor, cues[i], "object") for i in range(4)])
    tokens = torch.arange(100, 132, device=policy.device).view(1, 2, 16).expand(4, -1, -1)  # words
    with torch.no_grad():
        logps = token_logps(policy, batch, tokens, torch.ones_like(tokens, dtype=torch.bool))
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=cfg.lr)
    for step in range(steps):
        print(json.dumps(train_step(policy, optimizer, cues, step, cfg)[0]), flush=True)
    print(json.dumps({"logps": logps.tolist()}))


def run_program(command: str, show: str) -> None:
    """Runs a program of the project, and prints its seconds and those lines of its output that match."""
    start = time.perf_counter()
    arguments = [sys.executable, *shlex.split(command)]
    process = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    print(f"$ python {command}   ({time.perf_counter() - start:.0f} s, exit status {process.returncode})")
    print(*(f"    {line}" for line in process.stdout.splitlines() if re.search(show, line)), sep="\n")
    if process.returncode:
        raise SystemExit(process.stderr[-3000:] or process.stdout[-3000:])
    sys.stdout.flush()


RESULT_LINES = r"self-check|cue search|mean IoU|seconds;|complete|predicted|Predicted|Measured|peak|reserve"


def check_tiny_run(small: bool) -> None:
    """The default program and eval.py with the embedded model, then a resumed run."""
    steps, num_cues = (2, 2) if small else (20, 40)
    with tempfile.TemporaryDirectory() as temp:
        out = f"{temp}/run"
        flags = f"--steps {steps} --eval-cues {num_cues} --show-every 0 --out {out}"
        run_program(f"locus_mini.py {flags}" + " --prompts 2" * small, RESULT_LINES)
        run_program(
            f"eval.py scenes --adapter {out}/adapter --n {num_cues} --out {temp}/eval", r"IoU|accuracy|\|"
        )
        run_program(f"locus_mini.py --resume {out}", "complete")


def check_full_run(small: bool, models: Path) -> None:
    """The program on photos with a published shape: dry run, three steps with evaluation, a resumed run."""
    folder = build(LARGE_MODEL, models / (LARGE_MODEL + "-small" * small), miniature=small)
    model = f"--model {folder} --load-in-4bit"
    flags = "--prompts 2 --num-generations 2 --image-pixels 12544" if small else "--image-pixels 307200"
    steps = "--steps 2 --eval-cues 2 --max-new-tokens 6" if small else "--steps 3 --eval-cues 8"
    with tempfile.TemporaryDirectory() as temp:
        (Path(temp) / "photos").mkdir()
        for i in range(60):
            photo = scenes.render(scenes.draw_layout(random.Random(i), 14)).resize((640, 480))
            photo.save(f"{temp}/photos/{i}.png")
        common = f"{model} {flags} {steps} --data {temp}/photos"
        run_program(f"locus_mini.py --dry-run {common}", ".")
        run_program(f"locus_mini.py {common} --save-every 1 --out {temp}/run", RESULT_LINES)
        for line in (Path(temp) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            print(f"    {line}")
        run_program(f"locus_mini.py --resume {temp}/run", "complete")


def check_tests(small: bool) -> None:
    """The test files whose code differs most on a GPU."""
    files = ["policy"] if small else ["policy", "locus_mini", "models", "families", "program"]
    names = " ".join(f"tests/test_{name}.py" for name in files)
    run_program(f"-m pytest -q --maxfail=8 -p no:cacheprovider {names}", r"passed|failed|^FAILED|^ERROR")


# ---------------------------------------------------------------- TRL


def check_trl() -> None:
    """A step of TRL's trainer and one of ours, with the same 4-bit model, adapter, prompts and lengths."""
    if find_spec("trl") is None:
        print("TRL is not installed: pip install -r scale/requirements.txt, in an environment of its own.")
        return
    if not CUDA:
        subprocess.run([sys.executable, "tests/bench_trl.py"], cwd=ROOT, check=True)
        return
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "Qwen3-VL-4B-Instruct"
        for trainer in ("ours", "TRL"):
            command = [sys.executable, __file__, "--only", "trl", "--case", trainer, str(folder)]
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            failed = process.returncode != 0
            print(process.stderr[-2000:] if failed else process.stdout.strip().splitlines()[-1])
    print(f"{folder.name} in 4 bit, photos of 640 × 480, 8 prompts × 8 completions × 256 tokens; {machine()}")


def measure_trainer(name: str, folder: Path) -> None:
    """Prints the seconds of the second of two steps and the peak memory of a trainer, "ours" or "TRL".

    Each uses its own gradient checkpointing.
    """
    build(folder.name, folder)
    flags = {"model": str(folder), "load_in_4bit": True, "image_pixels": 640 * 480}
    policy, cfg, _ = prepare(flags | {"gradient_checkpointing": name == "ours"})
    cue = dry_run.largest_cue(cfg)
    memory.METER = None  # the peak of all phases together, not of each
    torch.cuda.reset_peak_memory_stats()
    if name == "ours":
        seconds = dry_run.largest_steps(policy, cfg, train_step, LOCUS)[-1]["seconds"]
    else:
        from bench_trl import Clock, make_trainer, rows_of

        policy.model = policy.model.unload()
        rows = rows_of(policy, [cue] * 2 * cfg.prompts, "object")
        kwargs = dict(use_cpu=False, bf16=True, gradient_checkpointing=True, max_steps=2)
        kwargs |= dict(per_device_train_batch_size=cfg.num_generations)
        kwargs |= dict(gradient_accumulation_steps=cfg.prompts, learning_rate=cfg.lr, beta=cfg.beta)
        kwargs |= dict(max_completion_length=cfg.max_new_tokens)
        kwargs |= dict(generation_kwargs={"min_new_tokens": cfg.max_new_tokens})
        trainer, clock = make_trainer(policy, cfg.lora_rank, rows, str(folder / "trl"), **kwargs), Clock()
        trainer.add_callback(clock)
        trainer.train()
        seconds = clock.times[1][0] - clock.times[0][0]
    print(f"{name:6}{seconds:8.1f} s a step, {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most")


# ---------------------------------------------------------------- command line

PARTS: dict[str, Callable[[bool, Path], None]] = {
    "sdpa": lambda small, models: check_sdpa(small),
    "gaps": lambda small, models: check_gaps(small),
    "tiny-run": lambda small, models: check_tiny_run(small),
    "curve": lambda small, models: check_curve(small),
    "tests": lambda small, models: check_tests(small),
    "decode": check_decode,
    "passes": check_passes,
    "packed": check_packed,
    "full-run": check_full_run,
    "memory": lambda small, models: check_memory((0, 2)),
    "memory-more": lambda small, models: check_memory((1, 3)),
    "trl": lambda small, models: check_trl(),
}


def run_case(name: str, case: list[str]) -> None:
    """What a part runs in a process of its own."""
    if name == "memory":
        cases = ON_GPU if CUDA else ON_CPU
        print(json.dumps(measure_case(cases[int(case[0])], Path(case[1]))))
    elif name == "curve":
        measure_curve(case[0], int(case[1]))
    else:
        measure_trainer(case[0], Path(case[1]))


def run_part(name: str, given: list[str], models: Path) -> bool:
    """Runs a part in a process of its own, for 8 minutes at most; whether it succeeded.

    given: the flags beside --only. models: the folder of the weights, a temporary one unless it was given.
    """
    print(f"=== {name}: python tests/gpu_check.py {shlex.join(['--only', name, *given])}", flush=True)
    start = time.perf_counter()
    # A session of its own, so that its processes can be stopped together.
    command = [
        sys.executable,
        __file__,
        "--only",
        name,
        *given,
        "--models",
        str(models),
        "--case",
        "part",
        name,
    ]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        outcome = f"exit status {process.wait(PART_SECONDS)}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {PART_SECONDS} s"
    finally:  # after Ctrl-C and SIGTERM too
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"--- {name}: {time.perf_counter() - start:.0f} s, {outcome}", flush=True)
    return process.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, required=True, metavar="NAME", help=", ".join(PARTS)
    )
    parser.add_argument("--small", action="store_true", help="reduced sizes; without CUDA always")
    parser.add_argument("--models", type=Path, help="folder of the random weights; default: a temporary one")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if args.case and args.case[0] == "part":
        print(machine(), flush=True)
        PARTS[args.case[1]](args.small or not CUDA, args.models)
    elif args.case:
        run_case(args.only[0], args.case)
    else:
        with tempfile.TemporaryDirectory() as temp:
            given = ["--small"] * args.small + (["--models", str(args.models)] if args.models else [])
            models = args.models.absolute() if args.models else Path(temp)
            succeeded = [run_part(name, given, models) for name in args.only]
        sys.exit(not all(succeeded))


if __name__ == "__main__":
    main()
