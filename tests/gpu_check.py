"""What only a GPU can show: memory against cards of a given size, speed and where it goes, TRL beside it.

    python tests/gpu_check.py --only memory|speed|trl

Each part is meant to end within 8 minutes and prints one table. No weights are needed: the published shapes
get random ones, written as safetensors (17 GB at most, where TMPDIR says), and go through the program's code.
Without CUDA a part does what a CPU can show of it. What is measured stands with the machine and versions.
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
from training.experiment import prepare
from training.settings import resolve

CUDA, ROOT = torch.cuda.is_available(), Path(__file__).parents[1]


def machine() -> str:
    name = torch.cuda.get_device_name() if CUDA else "CPU only"
    used = (torch, transformers, bitsandbytes)
    return f"{name}; " + ", ".join(f"{module.__name__} {module.__version__}" for module in used)


# ---------------------------------------------------------------- memory


class Tracker(TorchDispatchMode):
    """Bytes of tensors alive, counted as operators return them: a CPU's stand-in for torch.cuda's own count.

    What an operator needs inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def add_model(self, model: nn.Module) -> None:
        for tensor in model.parameters():
            self.add(tensor)
            if state := getattr(tensor, "quant_state", None):
                for part in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
                    self.add(part)

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def max_memory_allocated(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.now


@dataclass
class Case:
    """A published model, flags of locus_mini.py, other values of its config, the card that must do in GB."""

    name: str
    flags: dict[str, Any]
    changed: dict[str, Any] = field(default_factory=dict)
    card: int | None = None


# As the issue of a card's size is put: a photo, a crop, 8 answers of 256 tokens to each of 8 prompts.
ON_GPU = [
    Case("Qwen2.5-VL-3B-Instruct", {"image_pixels": 640 * 480}, card=8),
    Case("Qwen3-VL-4B-Instruct", {"image_pixels": 640 * 480}, card=8),
    Case("Qwen2.5-VL-7B-Instruct", {"image_pixels": 640 * 480}, card=12),
    Case("Qwen2.5-VL-7B-Instruct", {"image_pixels": 1280 * 960}, card=16),
]
# True widths, but so few layers, words and tokens that a CPU can do it.
FEW = {
    "num_generations": 4,
    "max_new_tokens": 24,
    "prompts": 2,
    "image_pixels": 224**2,
    "crop_pixels": 112**2,
}
FLAT = {
    "num_hidden_layers": 2,
    "vocab_size": 32_000,
    "vision_config": {"depth": 2, "fullatt_block_indexes": [1]},
}
NESTED = {"text_config": {"num_hidden_layers": 2, "vocab_size": 32_000}}
NESTED["vision_config"] = {"depth": 2, "deepstack_visual_indexes": [0]}
ON_CPU = [
    Case("Qwen2.5-VL-3B-Instruct", FEW, FLAT),
    Case("Qwen2.5-VL-3B-Instruct", FEW | {"gradient_checkpointing": False}, FLAT),
    Case("Qwen3-VL-4B-Instruct", FEW, NESTED),
    Case("Qwen2.5-VL-7B-Instruct", FEW, FLAT),
]


def build(name: str, folder: Path, **changed: Any) -> Path:
    """A published shape with random weights in a folder, if they are not there yet."""
    if not (folder / "model.safetensors.index.json").exists():
        families.random_weights(families.settings(name, folder, **changed))
        if CUDA:
            torch.cuda.empty_cache()
    return folder


def measure_case(case: Case, folder: Path) -> dict[str, Any]:
    """Peak bytes by phase, predicted and found; on a GPU also the seconds of the second of two steps."""
    build(case.name, folder, **case.changed)
    flags = {"model": str(folder), "load_in_4bit": True} | case.flags
    config, family = read_family(flags["model"])
    cfg, _ = resolve(flags, family)
    predicted = dry_run.predict(dry_run.empty_model(config), cfg, family)
    row = {"predicted": {name: sum(parts.values()) for name, parts in predicted.items()}}
    if CUDA:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (case.card - dry_run.CONTEXT) * 1e9 / whole))
        policy, cfg, _ = prepare(flags)
        steps = dry_run.largest_steps(policy, cfg, train_step, LOCUS)
        row |= {
            "seconds": steps[-1]["seconds"],
            "tokens": cfg.prompts * cfg.num_generations * cfg.max_new_tokens,
        }
        return row | {"found": memory.PEAKS}
    policy, cfg, _ = prepare(flags, dtype=torch.bfloat16)
    memory.METER = tracker = Tracker()
    tracker.add_model(policy.model)
    memory.PEAKS["loading"] = tracker.now
    with tracker:
        dry_run.largest_steps(policy, cfg, train_step, LOCUS)
    return row | {"found": memory.PEAKS}


def check_memory() -> None:
    """Each case in a process of its own: what one could not give back would be the next one's."""
    print(
        f"{'model':26}{'image':>10}{'card':>7}" + "".join(f"{name:>18}" for name in memory.LOWER) + "   step"
    )
    with tempfile.TemporaryDirectory() as there:
        for number, case in enumerate(ON_GPU if CUDA else ON_CPU):
            folder = Path(there) / case.name
            for other in (path for path in Path(there).iterdir() if path != folder):
                shutil.rmtree(other)  # one model at a time on the disk
            command = [sys.executable, __file__, "--only", "memory", "--case", str(number), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            title = f"{case.name:26}{case.flags['image_pixels']:>10,}{f'{case.card} GB' if CUDA else '':>7}"
            if done.returncode:
                print(f"{title}  failed: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}")
                continue
            row = json.loads(done.stdout.strip().splitlines()[-1])
            for name in memory.LOWER:
                one, other = row["found"].get(name, 0) / 1e9, row["predicted"][name] / 1e9
                title += f"{one:8.3f} ({other / one - 1:+5.0%})" if one else ""
            seconds = (
                f"{row['seconds']:6.1f} s, {row['tokens'] / row['seconds']:.0f} tokens/s" if CUDA else ""
            )
            print(title + seconds, flush=True)
    found = "allocated on the GPU" if CUDA else "tensors alive on the CPU, of 2 layers and 32,000 words"
    print(f"GB {found}, in brackets how far off the prediction is; {machine()}")


# ---------------------------------------------------------------- speed


def bandwidth() -> float:
    """Bytes a second that the GPU reads and writes, by copying 2 GB a few times."""
    one = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    other = one.clone()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        other.copy_(one)
    torch.cuda.synchronize()
    return 10 * 2 * len(one) / (time.perf_counter() - began)


def decoding(policy: Policy, batch: Any, group: int, longest: int) -> float:
    """Seconds of a rollout without reading its prompts: that of all tokens less that of one."""
    seconds = []
    for tokens in (1, 1, longest):  # the first warms up
        generator = torch.Generator(policy.device).manual_seed(0)
        torch.cuda.synchronize()
        began = time.perf_counter()
        rollout(policy, batch, group, tokens, generator)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[2] - seconds[1]


def check_rollout(folder: Path) -> None:
    """Tokens a second at batch 64 beside what the memory's bandwidth allows, and where a step's time goes."""
    policy, cfg, _ = prepare({"model": str(folder), "load_in_4bit": True, "image_pixels": 640 * 480})
    cues, G, T = (
        dry_run.LargestCues(cfg.image_pixels, cfg.crop_pixels),
        cfg.num_generations,
        cfg.max_new_tokens,
    )
    items = [example.prompt for example in sample_batch(policy.processor, cues, 0, cfg)]
    checked = self_check(policy, items[:2], G, 32, 0)
    print("self-check: " + ", ".join(f"{name} {value:.2g}" for name, value in checked.items()))
    policy = replace(policy, stop_ids=torch.tensor([-1], device=policy.device))
    batch = collate(policy, items)
    seconds, rate = decoding(policy, batch, G, T), bandwidth()
    config, family = read_family(str(folder))
    text, sizes = config.get_text_config(), dry_run.weights(dry_run.empty_model(config), family, True, 16)
    size = text.hidden_size // text.num_attention_heads
    column = 4 * text.num_key_value_heads * size * text.num_hidden_layers  # bytes of keys and values
    cache = len(items) * (batch.input_ids.shape[1] + G * T / 2) * column
    head = 2 * text.vocab_size * text.hidden_size
    least = (sizes["text layers"] + sizes["adapter"] + head + cache) / rate  # seconds for one token of all
    found, allowed = len(items) * G * T / seconds, len(items) * G / least
    print(
        f"rollout: {found:.0f} tokens/s, and {rate / 1e9:.0f} GB/s allow {allowed:.0f}: {found / allowed:.0%}"
    )
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        train_step(policy, optimizer, cues, 0, replace(cfg, reward="random", steps=2, max_new_tokens=32))
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=12, max_name_column_width=50))


def check_packing() -> None:
    """A token's log-probability in bf16, packed with its group and in a row alone: the median difference."""
    policy = add_lora(load_policy("tiny", load_in_4bit=False, dtype=torch.bfloat16), 16)
    cues = open_cues("scenes", "train", 0, CueConfig())
    items = [encode_cue(policy.processor, cues[i], "object") for i in range(8)]
    batch = collate(policy, items)
    generator = torch.Generator(policy.device).manual_seed(0)
    rollouts = rollout(policy, batch, 8, 40, generator)
    with torch.no_grad():
        packed = token_logps(policy, batch, rollouts.tokens, rollouts.mask)  # [B, G, T]
        alone = torch.zeros_like(packed)
        for b, item in enumerate(items):
            row = collate(policy, [item])
            for g in range(8):
                some = (slice(b, b + 1), slice(g, g + 1))
                alone[some] = token_logps(policy, row, rollouts.tokens[some], rollouts.mask[some])
    gap = (packed - alone).abs()[rollouts.mask]
    print(
        f"bf16, packed against one row: median {gap.median():.4f} nats, largest {gap.max():.3f} (under 0.02)"
    )


def check_curve() -> None:
    """Fifty steps of the embedded model on this device and on the CPU: IoU of the first and last ten."""
    for device in ("GPU", "CPU") if CUDA else ("CPU",):
        with tempfile.TemporaryDirectory() as there:
            command = [sys.executable, "locus_mini.py", "--steps", "50", "--eval-cues", "10", "--out", there]
            command += ["--no-load-in-4bit", "--show-every", "0"]
            unseen = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "CPU" else {})
            done = subprocess.run(command, cwd=ROOT, env=unseen, capture_output=True, text=True)
            if done.returncode:
                print(f"{device}: {done.stderr[-2000:]}")
                continue
            lines = (Path(there) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
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
        print("Without a GPU: no rate of a rollout of a true shape, and nowhere for its time to go.")
        return
    with tempfile.TemporaryDirectory() as there:
        check_rollout(build("Qwen2.5-VL-7B-Instruct", Path(there) / "Qwen2.5-VL-7B-Instruct"))


# ---------------------------------------------------------------- TRL


def check_trl() -> None:
    """One step of TRL's trainer and one of ours: same model in 4 bit, adapter, prompts, lengths, answers."""
    if find_spec("trl") is None:
        print("TRL is not installed: pip install -r scale/requirements.txt, in an environment of its own.")
        return
    if not CUDA:
        subprocess.run([sys.executable, "-m", "scale.side_by_side"], cwd=ROOT, check=True)
        return
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there) / "Qwen3-VL-4B-Instruct"
        for way in ("ours", "TRL"):
            command = [sys.executable, __file__, "--only", "trl", "--case", way, str(folder)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            print(done.stdout.strip().splitlines()[-1] if not done.returncode else done.stderr[-2000:])
    print(f"{folder.name} in 4 bit, a photo of 640 × 480, 8 prompts, 8 answers of 256 tokens; {machine()}")


def one_step(way: str, folder: Path) -> None:
    """Seconds of the second of two steps and the peak memory, by ours or by TRL's trainer.

    Each recomputes its layers in its own way; TRL's attention is ours too, which only helps it.
    """
    build(folder.name, folder)
    flags = {"model": str(folder), "load_in_4bit": True, "image_pixels": 640 * 480}
    policy, cfg, _ = prepare(flags | {"gradient_checkpointing": way == "ours"})
    cues = dry_run.LargestCues(cfg.image_pixels, cfg.crop_pixels)
    memory.METER = None  # one peak of all phases
    torch.cuda.reset_peak_memory_stats()
    if way == "ours":
        seconds = dry_run.largest_steps(policy, cfg, train_step, LOCUS)[-1]["seconds"]
    else:
        from scale.side_by_side import Clock, make_trainer, rows_of

        policy.model = policy.model.unload()
        rows = rows_of(policy, [cues[i] for i in range(2 * cfg.prompts)], "object")
        ways = dict(use_cpu=False, bf16=True, gradient_checkpointing=True, max_steps=2)
        ways |= dict(per_device_train_batch_size=cfg.num_generations, gradient_accumulation_steps=cfg.prompts)
        ways |= dict(max_completion_length=cfg.max_new_tokens, learning_rate=cfg.lr, beta=cfg.beta)
        ways |= dict(generation_kwargs={"min_new_tokens": cfg.max_new_tokens})
        trainer, clock = make_trainer(policy, cfg.lora_rank, rows, str(folder / "trl"), **ways), Clock()
        trainer.add_callback(clock)
        trainer.train()
        seconds = clock.times[1][0] - clock.times[0][0]
    print(f"{way:6}{seconds:8.1f} s a step, {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("memory", "speed", "trl"), required=True)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case and args.only == "memory":
        cases = ON_GPU if CUDA else ON_CPU
        print(json.dumps(measure_case(cases[int(args.case[0])], Path(args.case[1]))))
    elif args.case:
        one_step(args.case[0], Path(args.case[1]))
    else:
        {"memory": check_memory, "speed": check_speed, "trl": check_trl}[args.only]()


if __name__ == "__main__":
    main()
