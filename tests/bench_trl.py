"""One GRPO step of the loop beside one of TRL, in seconds and memory; scale/test_trl.py compares gradients.

    python tests/bench_trl.py [--repeat 3]

The embedded model takes 8 prompts on scenes, and its completions end by themselves. The model of 60 million
random parameters takes one prompt of 600 tokens, and its completions have 100.
"""

import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from datasets import Dataset
from random_models import random_policy
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor, TrainerCallback
from trl import GRPOConfig

from data import Cue, CueConfig, Cues, scene_cues
from files.errors import FlagParser, exit_on_error
from locus_mini import train_step
from models import add_lora, load_policy
from policy import Policy
from scale.export import Target, make_row
from scale.train_trl import OURS, PAPER, build_trainer
from training.settings import Config, resolve

HEADER = "| model | trainer | seconds a step | of them processor time | peak memory | tokens a completion |"
GROUP, LENGTH = PAPER["num_generations"], 100
# README.md says which of these settings make TRL's step the loop's. The loop's own step has no warm-up.
SETTINGS = PAPER | OURS | dict(warmup_steps=0, use_cpu=True, bf16=False, report_to="none", save_strategy="no")


def rows_of(policy: Policy, cues: list[Cue], source: str) -> list[dict[str, Any]]:
    """Cues as rows of an export for TRL, with the images themselves in place of their paths."""
    family, processor = policy.processor.family, policy.processor.image_processor
    cell = processor.patch_size * processor.merge_size
    target = Target("trl", family, cell, family.image_pixels, family.image_pixels)
    return [make_row(target, cue, source, [cue.image, target.crop(cue)]) for cue in cues]


def make_trainer(policy: Policy, rank: int, rows: list[dict], folder: str, **settings: Any) -> Any:
    """TRL's trainer for a new adapter on the policy's model, with the same image processor, in float32."""
    own, (low, high) = policy.processor, policy.processor.family.image_pixels
    own.image_processor.size = {"shortest_edge": low, "longest_edge": high}
    template = own.tokenizer.chat_template
    processor = Qwen3VLProcessor(own.image_processor, own.tokenizer, Qwen3VLVideoProcessor(), template)
    args = GRPOConfig(folder, **(SETTINGS | settings))
    return build_trainer(policy.model, rank, args, Dataset.from_list(rows), processor)


def prepare(model: str) -> tuple[Policy, Cues, Config]:
    """The policy, cues and settings for a measurement with a model."""
    if model == "embedded":
        policy, flags = load_policy("tiny"), {"prompts": 8}
    else:
        policy = random_policy("qwen3_vl", width=512, layers=15, intermediate_size=2048)
        # The least size enlarges the scenes, so that the images of a prompt have 488 tokens.
        policy.processor.family = replace(policy.processor.family, image_pixels=(704**2, 768**2))
        policy.stop_ids = torch.tensor([-1])  # no token, so that every completion has full length
        flags = {"prompts": 1, "max_new_tokens": LENGTH}
    return policy, scene_cues(CueConfig(), "train", 0), resolve(flags, policy.processor.family)[0]


class Clock(TrainerCallback):
    """The time and the processor time at the end of each optimizer step, in seconds."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


def measure(model: str, trainer_name: str, repeat: int, folder: str) -> str:
    """A row of the table: the best of `repeat` full steps after a first one, and memory beyond the model."""
    (policy, cues, cfg), clock = prepare(model), Clock()
    millions = sum(p.numel() for p in policy.model.parameters()) / 1e6
    loaded = getrusage(RUSAGE_SELF).ru_maxrss / 2**20
    if trainer_name == "ours":
        policy = add_lora(policy, 16)
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
        for step in range(repeat + 1):
            length = train_step(policy, optimizer, cues, step, cfg)[0]["completions/mean_length"]
            clock.on_step_end()
    else:
        rows = rows_of(policy, [cues[i] for i in range(cfg.prompts * (repeat + 1))], cfg.source)
        settings = dict(max_completion_length=cfg.max_new_tokens, learning_rate=cfg.lr, beta=cfg.beta)
        settings |= dict(per_device_train_batch_size=cfg.prompts * GROUP, max_steps=repeat + 1)
        settings["gradient_checkpointing"] = trainer_name == "TRL"
        settings["generation_kwargs"] = {"min_new_tokens": 0 if model == "embedded" else LENGTH}
        trainer = make_trainer(policy, 16, rows, folder, **settings)
        trainer.add_callback(clock)
        trainer.train()
        length = trainer.state.log_history[-2]["completions/mean_length"]
    wall, processor = (min(end - start for start, end in pairwise(times)) for times in zip(*clock.times))
    memory = f"{getrusage(RUSAGE_SELF).ru_maxrss / 2**20 - loaded:.2f} GB | {length:.0f}"
    return f"| {model} ({millions:.1f} M) | {trainer_name} | {wall:.2f} | {processor:.2f} | {memory} |"


def main() -> None:
    parser = FlagParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    cases = product(("embedded", "60 million"), ("ours", "TRL", "TRL, checkpointing off"))
    # A process for each measurement, so that its peak memory is its own.
    pool = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    with exit_on_error(), tempfile.TemporaryDirectory() as folder, pool:
        rows = [pool.submit(measure, *case, repeat, folder).result() for case in cases]
    print(HEADER, "|---" * 6 + "|", *rows, sep="\n")


if __name__ == "__main__":
    main()
