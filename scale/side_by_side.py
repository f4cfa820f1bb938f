"""One GRPO step, ours beside TRL's: from the same answers (test_trl.py), and in seconds and memory.

    python -m scale.side_by_side [--repeat 3]

Each way runs in a process of its own, so that its peak memory is its own. The embedded model: 8 prompts on
scenes, its own answers. 60 million random parameters: a prompt of 600 tokens, answers of 100.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor, TrainerCallback

from data import Cue, CueConfig, Cues, folder_cues, open_cues
from locus_mini import train_step
from models import add_lora, load_policy, make_policy
from policy import Policy
from prompts import FAMILIES, Processor
from scale.export import Target, make_row
from scale.rewards import box_reward
from training.settings import Config, resolve

WAYS = ("ours", "TRL", "TRL, checkpointing off")
MODELS = {"embedded": 8, "60 million": 1}  # prompts a step
GROUP, ANSWER = 8, 100
# What makes TRL's step the loop's: see README.md. Rewards are scaled by std + 1e-4, the loop's by std + 1e-6.
SAME = dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.3, scale_rewards="group", num_generations=GROUP)
SAME |= dict(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, importance_sampling_level="token")
SAME |= dict(
    use_bias_correction_kl=False,
    num_iterations=1,
    mask_truncated_completions=False,
    max_grad_norm=1.0,
    weight_decay=0.01,
)


def rows_of(policy: Policy, cues: list[Cue], source: str) -> list[dict[str, Any]]:
    """Cues as rows of an export for TRL, with the pictures themselves in place of their paths."""
    family, processor = policy.processor.family, policy.processor.image_processor
    cell = processor.patch_size * processor.merge_size
    target = Target("trl", family, cell, family.image_pixels, family.image_pixels)
    return [make_row(target, cue, source, [cue.image, target.crop(cue)]) for cue in cues]


def make_trainer(policy: Policy, rank: int, rows: list[dict], folder: str, **settings: Any) -> Any:
    """TRL's trainer of a new adapter on the policy's model, with the same image processor, in float32."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    processor, (low, high) = policy.processor, policy.processor.family.image_pixels
    processor.image_processor.size = {"shortest_edge": low, "longest_edge": high}
    template = processor.tokenizer.chat_template
    processor = Qwen3VLProcessor(
        processor.image_processor, processor.tokenizer, Qwen3VLVideoProcessor(), template
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=processor.family.lora_targets)
    quiet = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    args = GRPOConfig(folder, **(SAME | quiet | dict(shuffle_dataset=False, logging_steps=1) | settings))
    data = Dataset.from_list(rows)
    return GRPOTrainer(policy.model, box_reward, args, data, processing_class=processor, peft_config=lora)


def subject(name: str, folder: Path) -> tuple[Policy, Cues, Config]:
    """A model, cues and settings to measure a step with."""
    if name == "embedded":
        policy = load_policy("tiny")
        cfg, _ = resolve({"prompts": MODELS[name], "num_generations": GROUP}, policy.processor.family)
        return policy, open_cues("scenes", "train", 0, CueConfig()), cfg
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from random_models import noise, random_model, random_policy

    from tiny import architecture

    tokenizer = architecture.build_tokenizer()
    model = random_model("qwen3_vl", tokenizer, width=512, layers=15, intermediate_size=2048)
    processor = random_policy("qwen3_vl").processor.image_processor
    family = replace(FAMILIES["qwen3_vl"], image_pixels=(64**2, 768**2), crop_pixels=(64**2, 64**2))
    policy = make_policy(model, Processor(tokenizer, processor, family, ""), torch.device("cpu"))
    policy.stop_ids = torch.tensor([-1])  # every answer has full length
    for i in range(20):
        noise((704, 704), i).save(folder / f"{i}.png")
    flags = {"prompts": MODELS[name], "num_generations": GROUP, "max_new_tokens": ANSWER, "source": "random"}
    cfg, _ = resolve(flags, family)
    return policy, folder_cues(folder, CueConfig("random"), "train", 0), cfg


class Clock(TrainerCallback):
    """Of each optimizer step of TRL's with the rollout before it: seconds, and seconds of processor time."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        wall, processor = self.began
        self.steps.append((time.perf_counter() - wall, time.process_time() - processor))


def measure(name: str, way: str, repeat: int, folder: Path) -> dict[str, float]:
    """The best of `repeat` full steps after a first one, and the peak memory above the loaded model."""
    (policy, cues, cfg), clock = subject(name, folder), Clock()
    size = sum(p.numel() for p in policy.model.parameters())
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == "ours":
        policy = add_lora(policy, 16)
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
        for step in range(repeat + 1):
            clock.on_step_begin()
            length = train_step(policy, optimizer, cues, step, cfg)[0]["completions/mean_length"]
            clock.on_step_end()
    else:
        rows = rows_of(policy, [cues[i] for i in range(cfg.prompts * (repeat + 1))], cfg.source)
        answers = dict(max_completion_length=cfg.max_new_tokens, learning_rate=cfg.lr, beta=cfg.beta)
        answers |= dict(per_device_train_batch_size=cfg.prompts * GROUP, max_steps=repeat + 1, delta=3.0)
        answers["gradient_checkpointing"] = way == "TRL"
        if name != "embedded":
            answers["generation_kwargs"] = {"min_new_tokens": ANSWER}
        trainer = make_trainer(policy, 16, rows, str(folder / "trl"), **answers)
        trainer.add_callback(clock)
        trainer.train()
        length = trainer.state.log_history[-2]["completions/mean_length"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, processor = (min(column) for column in zip(*clock.steps[1:]))
    found = {"seconds": seconds, "processor": processor, "gb": (peak - base) / 2**20, "size": size}
    return found | {"length": length}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(*args.one, args.repeat, Path(folder))))
        return
    print("| model | way | seconds a step | of them processor time | peak memory | tokens an answer |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        for way in WAYS:
            command = [sys.executable, "-m", "scale.side_by_side", "--repeat", str(args.repeat)]
            out = subprocess.run([*command, "--one", name, way], capture_output=True, text=True, check=True)
            m = json.loads(out.stdout.strip().splitlines()[-1])
            times = f"{m['seconds']:.2f} | {m['processor']:.2f}"
            line = f"| {name} ({m['size'] / 1e6:.1f} M) | {way} | {times} | {m['gb']:.2f} GB"
            print(f"{line} | {m['length']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
