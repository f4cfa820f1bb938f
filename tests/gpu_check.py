"""Measures what only a GPU can show: peak memory on cards of a given size, speed, and a step beside TRL's.

    python tests/gpu_check.py --only memory|speed|trl

Each part should end within 8 minutes and prints one table with the name of the machine and the versions. No
download is needed: models of the published shapes get random weights, written as safetensors to TMPDIR (17 GB
at most), and go through the program's own code. Without CUDA, each part does as much of it as a CPU can.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import bitsandbytes
import families
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import CueConfig, encode_cue, open_cues
from evaluation.scores import mean
from locus_mini import LOCUS, sample_batch, train_step
from models import add_lora, load_policy, read_family
from policy import Policy, collate, rollout, token_logps
from training import dry_run, memory
from training.checks import self_check
from training.decoding import decoder
from training.experiment import prepare
from training.settings import resolve

CUDA, ROOT = torch.cuda.is_available(), Path(__file__).parents[1]


def machine() -> str:
    name = torch.cuda.get_device_name() if CUDA else "CPU only"
    packages = (torch, transformers, bitsandbytes)
    return f"{name}; " + ", ".join(f"{package.__name__} {package.__version__}" for package in packages)


# ---------------------------------------------------------------- memory


class Tracker(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return: for a CPU, what torch.cuda counts on a GPU.

    Memory that an operator uses only internally does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # bytes of each storage
        self.current = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.current -= self.sizes.pop(key)

    def synchronize(self) -> None:
        """On a CPU everything is done when a call returns."""

    def memory_reserved(self) -> int:
        return self.current

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


def check_memory() -> None:
    """Measures each case in a process of its own, so that no memory of a case counts in the next."""
    print(
        f"{'model':26}{'image':>10}{'card':>7}" + "".join(f"{name:>18}" for name in memory.LOWER) + "   step"
    )
    with tempfile.TemporaryDirectory() as temp:
        for number, case in enumerate(ON_GPU if CUDA else ON_CPU):
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


# ---------------------------------------------------------------- speed


def bandwidth() -> float:
    """Bytes per second that the GPU reads and writes while it copies 2 GB ten times."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = source.clone()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    return 10 * 2 * len(source) / (time.perf_counter() - start)


def decoding_seconds(policy: Policy, batch: Any, num_generations: int, max_new_tokens: int) -> float:
    """Seconds of a rollout without its prefill: those for all tokens minus those for the first."""
    seconds = []
    for num_tokens in (1, 1, max_new_tokens):  # the first warms up
        generator = torch.Generator(policy.device).manual_seed(0)
        torch.cuda.synchronize()
        start = time.perf_counter()
        decode = decoder(policy, num_generations, num_tokens)
        rollout(policy, batch, num_generations, num_tokens, generator, decode)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2] - seconds[1]


def check_rollout(folder: Path) -> None:
    """Tokens per second of 64 completions, what the memory bandwidth allows, and where a step's time goes."""
    policy, cfg, _ = prepare({"model": str(folder), "load_in_4bit": True, "image_pixels": 640 * 480})
    cues = dry_run.LargestCues(cfg.image_pixels, cfg.crop_pixels)
    G, T = cfg.num_generations, cfg.max_new_tokens
    prompts = [example.prompt for example in sample_batch(policy.processor, cues, 0, cfg)]
    results = self_check(policy, prompts[:2], G, 32, 0)
    print("self-check: " + ", ".join(f"{name} {value:.2g}" for name, value in results.items()))
    policy = replace(policy, stop_ids=torch.tensor([-1], device=policy.device))
    batch = collate(policy, prompts)
    seconds, rate = decoding_seconds(policy, batch, G, T), bandwidth()
    config, family = read_family(str(folder))
    text, weights = config.get_text_config(), dry_run.weights(dry_run.empty_model(config), family, True, 16)
    head_size = text.hidden_size // text.num_attention_heads
    column_bytes = 4 * text.num_key_value_heads * head_size * text.num_hidden_layers  # of keys and values
    cache = len(prompts) * (batch.input_ids.shape[1] + G * T / 2) * column_bytes
    lm_head = 2 * text.vocab_size * text.hidden_size
    # To sample a token of every completion, the GPU reads all of these bytes once.
    bytes_per_token = weights["text layers"] + weights["adapter"] + lm_head + cache
    measured, possible = len(prompts) * G * T / seconds, len(prompts) * G * rate / bytes_per_token
    limit = f"{possible:.0f} tokens/s that {rate / 1e9:.0f} GB/s allow"
    print(f"rollout: {measured:.0f} tokens/s, {measured / possible:.0%} of the {limit}")
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params, lr=cfg.lr)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        cfg = replace(cfg, steps=2, max_new_tokens=32)
        train_step(policy, optimizer, cues, 0, cfg, replace(LOCUS, score=dry_run.random_rewards))
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=12, max_name_column_width=50))


def check_packing() -> None:
    """How much a log-probability in bf16 differs between the packed pass of a group and a row of its own."""
    policy = add_lora(load_policy("tiny", load_in_4bit=False, dtype=torch.bfloat16), 16)
    cues = open_cues("scenes", "train", 0, CueConfig())
    prompts = [encode_cue(policy.processor, cues[i], "object") for i in range(8)]
    batch = collate(policy, prompts)
    generator = torch.Generator(policy.device).manual_seed(0)
    rollouts = rollout(policy, batch, 8, 40, generator)
    with torch.no_grad():
        packed = token_logps(policy, batch, rollouts.tokens, rollouts.mask)  # [B, G, T]
        alone = torch.zeros_like(packed)
        for b, prompt in enumerate(prompts):
            row = collate(policy, [prompt])
            for g in range(8):
                index = (slice(b, b + 1), slice(g, g + 1))
                alone[index] = token_logps(policy, row, rollouts.tokens[index], rollouts.mask[index])
    difference = (packed - alone).abs()[rollouts.mask]
    median, largest = difference.median(), difference.max()
    print(f"bf16, packed and alone: {median:.4f} nats apart (median; under 0.02), {largest:.3f} at most")


def check_curve() -> None:
    """Trains the embedded model for 50 steps on GPU and CPU: the mean IoU of the first and last ten."""
    for device in ("GPU", "CPU") if CUDA else ("CPU",):
        with tempfile.TemporaryDirectory() as temp:
            command = [sys.executable, "locus_mini.py", "--steps", "50", "--eval-cues", "10", "--out", temp]
            command += ["--no-load-in-4bit", "--show-every", "0"]
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "CPU" else {})
            process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if process.returncode:
                print(f"{device}: {process.stderr[-2000:]}")
                continue
            lines = (Path(temp) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        first, last = (mean(step["iou"] for step in part) for part in (steps[:10], steps[-10:]))
        error = torch.tensor([step["iou"] for step in steps[-10:]]).std() / 10**0.5
        seconds = mean(step["seconds"] for step in steps[5:])
        tens = f"IoU {first:.3f} in the first ten steps, {last:.3f} ± {error:.3f} in the last ten"
        print(f"{device}: {tens}, {seconds:.2f} s a step", flush=True)


def check_speed() -> None:
    print(machine())
    check_packing()
    check_curve()
    if not CUDA:
        print("Without a GPU, the rollout of a published shape and the profile of a step are not measured.")
        return
    with tempfile.TemporaryDirectory() as temp:
        check_rollout(build("Qwen2.5-VL-7B-Instruct", Path(temp) / "Qwen2.5-VL-7B-Instruct"))


# ---------------------------------------------------------------- TRL


def check_trl() -> None:
    """A step of TRL's trainer and one of ours, with the same 4-bit model, adapter, prompts and lengths."""
    if find_spec("trl") is None:
        print("TRL is not installed: pip install -r scale/requirements.txt, in an environment of its own.")
        return
    if not CUDA:
        subprocess.run([sys.executable, "-m", "scale.side_by_side"], cwd=ROOT, check=True)
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

    Each uses its own gradient checkpointing. TRL runs with our attention, which makes it faster.
    """
    build(folder.name, folder)
    flags = {"model": str(folder), "load_in_4bit": True, "image_pixels": 640 * 480}
    policy, cfg, _ = prepare(flags | {"gradient_checkpointing": name == "ours"})
    cues = dry_run.LargestCues(cfg.image_pixels, cfg.crop_pixels)
    memory.METER = None  # the peak of all phases together, not of each
    torch.cuda.reset_peak_memory_stats()
    if name == "ours":
        seconds = dry_run.largest_steps(policy, cfg, train_step, LOCUS)[-1]["seconds"]
    else:
        from scale.side_by_side import Clock, make_trainer, rows_of

        policy.model = policy.model.unload()
        rows = rows_of(policy, [cues[i] for i in range(2 * cfg.prompts)], "object")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("memory", "speed", "trl"), required=True)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case and args.only == "memory":
        cases = ON_GPU if CUDA else ON_CPU
        print(json.dumps(measure_case(cases[int(args.case[0])], Path(args.case[1]))))
    elif args.case:
        measure_trainer(args.case[0], Path(args.case[1]))
    else:
        {"memory": check_memory, "speed": check_speed, "trl": check_trl}[args.only]()


if __name__ == "__main__":
    main()
