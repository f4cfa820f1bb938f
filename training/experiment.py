"""What surrounds the training loop: load, check, measure the base, train, measure again, write it down."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data import CueConfig, Cues, open_cues
from evaluation import heldout
from evaluation.reply_cache import ReplyCache
from evaluation.scores import compare, table
from files.disk import write_json
from models import add_lora, enable_gradient_checkpointing, load_policy
from policy import Policy
from training import checks, pictures, run_folder
from training.memory import phase
from training.settings import MEMORY, Config, print_settings, resolve


@dataclass
class Experiment:
    """A run that is ready to start or to resume."""

    policy: Policy
    cues: Cues
    heldout_cues: Cues
    cfg: Config
    folder: Path
    state: dict[str, str]  # the settings and inputs that a checkpoint belongs to
    resume_command: str
    started: float  # by time.monotonic()


@phase("loading")
def prepare(
    flags: dict[str, Any], adapt: Callable = add_lora, dtype: torch.dtype | None = None
) -> tuple[Policy, Config, dict[str, str]]:
    """The model that the flags name, with something to train; every setting, and where it came from."""
    wanted = flags.get("model", "tiny"), flags.get("load_in_4bit"), flags.get("box_frame")
    policy = load_policy(*wanted, dtype)
    cfg, origin = resolve(flags, policy.processor.family)
    family = policy.processor.family
    image_limits = min(family.image_pixels[0], cfg.image_pixels), cfg.image_pixels
    crop_limits = min(family.crop_pixels[0], cfg.crop_pixels), cfg.crop_pixels
    policy.processor.family = replace(family, image_pixels=image_limits, crop_pixels=crop_limits)
    if cfg.gradient_checkpointing:
        enable_gradient_checkpointing(policy)
    return adapt(policy, cfg.lora_rank, cfg.seed), cfg, origin


def open_experiment(flags: dict[str, Any], task: str, adapt: Callable = add_lora) -> Experiment:
    """Settings, model, cues and folder of a run, new or resumed; prints the settings."""
    started, folder, stored = time.monotonic(), flags.pop("resume", None), {}
    if folder is not None:
        stored, flags = run_folder.resume_flags(folder, flags)
    policy, cfg, origin = prepare(flags, adapt)
    files = {name: getattr(cfg, name) for name in ("annotations", "images", "exclude", "expressions")}
    cues = open_cues(cfg.data, "train", cfg.seed, CueConfig(cfg.source, cfg.tiny_ratio), **files)
    heldout_cues = open_cues(cfg.data, "heldout", 0, CueConfig(), **files)
    folder = folder or run_folder.new_folder(cfg.out)
    inputs = {"task": task} | run_folder.fingerprints(policy.base_model, *files.values(), Path(cfg.data))
    origin = run_folder.write_config(folder, stored, cfg, origin, inputs)
    print_settings(cfg, policy.processor.family, origin)
    for part in (part for part in cues.left_out if part.reasons):
        print(part)
    state = inputs | {name: str(v) for name, v in asdict(cfg).items() if name not in ("out", *MEMORY)}
    program = "locus_mini.py" if task == "locus" else f"-m paper.variants {task}"
    command = f"python {program} --resume {folder}"
    return Experiment(policy, cues, heldout_cues, cfg, folder, state, command, started)


def run_experiment(experiment: Experiment, train: Callable, encode: Callable) -> None:
    """All of a run, one process at a time; Ctrl-C leaves what is done and says how to continue."""
    try:
        with run_folder.lock_run_folder(experiment.folder):
            train_and_measure(experiment, train, encode)
    except KeyboardInterrupt:
        print(f"Stopped. It goes on with: {experiment.resume_command}", file=sys.stderr)
        sys.exit(130)


def train_and_measure(experiment: Experiment, train: Callable, encode: Callable) -> None:
    """Check, measure, train, measure again, and leave it all in the run folder.

    train: (policy, cues, cfg, folder, state) -> None; encode: (tools, cue, index, cfg) -> a step's prompt.
    """
    policy, cfg, folder, state = experiment.policy, experiment.cfg, experiment.folder, experiment.state
    if (folder / "results.json").exists():
        print(f"{folder} is complete: its results.json is there.")
        return
    run_folder.last_checkpoint_step(folder, state)
    few = min(4, cfg.prompts, max(2, cfg.micro_batch))
    first = [encode(policy.processor, experiment.cues[i], i, cfg) for i in range(few)]
    with phase("rollout"):
        checked = checks.self_check(policy, first, cfg.num_generations, cfg.max_new_tokens, cfg.seed)
    print("self-check passed: " + ", ".join(f"{name} {value:.2g}" for name, value in checked.items()))
    cache, longest = ReplyCache(folder / "answers.jsonl", state), cfg.max_new_tokens
    held = heldout.build_heldout_set(policy, experiment.heldout_cues, cfg.eval_cues)
    before = heldout.evaluate(policy, held, longest, "before", cache)
    checks.check_frame(policy, held, before)
    floor = heldout.baselines(policy, held, longest, cache)
    train(policy, experiment.cues, cfg, folder, state)
    run_folder.save_adapter(policy.model, folder / "adapter")
    after = heldout.evaluate(policy, held, longest, "after", cache)
    pictures.draw_cues(held.cues, before.boxes, after.boxes, folder / "before_after.png")
    results = {"before": before.summary, "after": after.summary, "change": compare(before, after)}
    results |= {"baselines": floor, "self_check": checked, "seed": cfg.seed, "settings": asdict(cfg)}
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    seconds = sum(step["seconds"] for step in steps), time.monotonic() - experiment.started
    results["seconds"] = {name: round(value, 1) for name, value in zip(("training", "all"), seconds)}
    left_out = (*experiment.cues.left_out, *experiment.heldout_cues.left_out)
    results["left_out"] = {part.what: dict(part.reasons) for part in left_out}
    write_json(folder / "results.json", results)
    print(table(before, after))
    print("cue search without searching (IoU): " + ", ".join(f"{k} {100 * v:.1f}" for k, v in floor.items()))
    print(f"{seconds[1]:.0f} seconds; adapter, results.json and pictures are in {folder}")
