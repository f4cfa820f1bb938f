"""The paper's tables and figures in miniature, and the controls that it does not have, as one command.

    python -m paper.reproduce           every row, two at a time (1.5 hours on 2 cores), then RESULTS
    python -m paper.reproduce --quick    the same in 3 minutes, too short to mean anything, into runs/quick

A row is one training with one seed and what its model then answers, in a folder of its own, on one thread.
One with a row.json is not done again (delete that after changing a row), a stopped one goes on.

The rule, written down before the run: settings were chosen on the held-out scenes of seed 0; everything here
is measured on those of HELD_OUT, which nothing was chosen on, with training seeds that nothing was chosen on.
A claim has the *same direction* if the paired 95 % interval of its change excludes 0 and all seeds share the
sign, the *opposite direction* if that holds the other way round, and else there is *no difference*.
"""

import json
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import CueConfig, open_cues, scene_cues
from evaluation.attention import analyse_questions
from evaluation.heldout import HeldOutSet, build_heldout_set, evaluate
from files.disk import fingerprint, write_json
from files.errors import FlagParser, UserError, exit_on_error
from locus_mini import learning_rate, train
from models import load_policy
from paper import report
from paper.claims import collect, read_json
from paper.variants import VARIANTS, variant_flags
from policy import Policy
from tiny.build import Build
from training.run_folder import lock_run_folder, require_same_settings, weight_samples
from training.settings import Config, resolve

HELD_OUT = 2026  # seed of the scenes that everything is measured on
SEEDS = (11, 12, 13)
ROWS_OF_EVERY_SEED: dict[str, dict[str, Any]] = {  # row: a variant, and flags of locus_mini.py
    "LOCUS": {},
    "random rewards": {"variant": "random"},
    "format reward only": {"alpha": 1.0},
    "shuffled target": {"variant": "shuffled"},
    "more pretraining": {},
    "SFT": {"variant": "sft"},
    "SFT on the best of G": {"variant": "best"},
    "GRPO on the questions": {"variant": "questions"},
    "text cue": {"source": "text"},
    "random crop": {"source": "random"},
    "large crops": {"source": "large"},
    **{f"tiny:small {tiny}:{100 - tiny}": {"tiny_ratio": tiny / 100} for tiny in (100, 60, 80, 90)},
}
ROWS_OF_FIRST_SEED: dict[str, dict[str, Any]] = {
    "more pretraining, 1 to 4 things": {},
    **{f"KL {kl:g}": {"beta": kl} for kl in (0.0, 0.01, 0.16)},
    **{f"G = {group}": {"num_generations": group} for group in (2, 4, 16)},
    **{f"LoRA rank {rank}": {"lora_rank": rank} for rank in (4, 64)},
    "all weights, lr 1e-4": {"variant": "all_weights", "lr": 1e-4},
    "SFT, a third of the rate": {"variant": "sft", "lr": 7e-4 / 3},
}
FLAGS = ROWS_OF_EVERY_SEED | ROWS_OF_FIRST_SEED
# What the base was built with, instead of cue search: numbers of things in a scene.
PRETRAINING = {"more pretraining": 9 * (1,) + (2,), "more pretraining, 1 to 4 things": (1, 2, 3, 4)}
LOOKED_AT = ("base", "LOCUS", "text cue", "large crops")  # attention and grounding are measured: Figs. 2, 4
BATCH = 128  # prompts at a time

# Every row and its seed: those that the claims need come first, seed by seed.
PLAN = [("base", SEEDS[0]), *((name, seed) for seed in SEEDS for name in ROWS_OF_EVERY_SEED)]
PLAN += [(name, SEEDS[0]) for name in ROWS_OF_FIRST_SEED]

# ---------------------------------------------------------------- one row


@cache
def held_scenes(n: int) -> HeldOutSet:
    """n questions of each kind and half as many cues, the same for every row; seen once by a process."""
    held = build_heldout_set(load_policy("tiny"), scene_cues(CueConfig(), "heldout", HELD_OUT), n)
    parts = ("cues", "cue_prompts", "find_prompts")
    return replace(held, **{part: getattr(held, part)[: n // 2] for part in parts})


def pretrain(policy: Policy, objects: tuple[int, ...], cfg: Config, folder: Path) -> None:
    """As many steps of what the base model was built with, through the same adapter: eight turns a scene."""
    build = Build(folder / "more", 0, cfg.seed)
    build.model = policy.base_model
    build.draw_examples(objects, max(100, cfg.steps * cfg.prompts // 100 * 100))
    trained = [weight for weight in policy.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=cfg.weight_decay)
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        loss, _ = build.finding_loss(random.Random(f"{cfg.seed}/{step}"), step, crop_share=1 / 3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm)
        optimizer.step()


def do_row(name: str, seed: int, folder: Path, steps: int, n: int) -> float:
    """Train, ask, and write row.json: summary, samples, training curve, seconds. Returns the accuracy."""
    torch.set_num_threads(1)
    start, policy = time.monotonic(), load_policy("tiny")
    flags = {"seed": seed, "steps": steps, "show_every": 0} | FLAGS.get(name, {})
    variant = flags.pop("variant", "locus")
    task = VARIANTS[variant].task
    cfg, _ = resolve(variant_flags(variant, flags), policy.processor.family)
    folder.mkdir(exist_ok=True)
    if name != "base":
        policy = task.adapt(policy, cfg.lora_rank, seed)
    if name in PRETRAINING:
        pretrain(policy, PRETRAINING[name], cfg, folder)
    elif name != "base":
        cues = open_cues("scenes", "train", seed, CueConfig(cfg.source, cfg.tiny_ratio))
        with lock_run_folder(folder):
            train(policy, cues, cfg, folder, {key: str(value) for key, value in asdict(cfg).items()}, task)
    held = held_scenes(n) if name == "base" else replace(held_scenes(n), suppressed_prompts=[])  # see Table 1
    scores = evaluate(policy, held, cfg.max_new_tokens)
    if name in LOOKED_AT:
        analyse_questions(policy, held, scores, scores, {}, name, (cfg.max_new_tokens, BATCH))
    log = folder / "metrics.jsonl"  # of what locus_mini.py's loop has trained
    lines = [json.loads(line) for line in log.open(encoding="utf-8")] if log.exists() else []
    row = {"summary": scores.summary, "samples": scores.samples}
    row["curve"] = {key: [round(line[key], 4) for line in lines] for key in ("iou", "format", "kl")}
    write_json(folder / "row.json", row | {"seconds": {"all": round(time.monotonic() - start)}})
    return scores.summary["questions"]["accuracy"]


# ---------------------------------------------------------------- all rows


def folder_of(out: Path, name: str, seed: int) -> Path:
    """A row's folder: its name with a hyphen for all that a file name may not hold, and its seed."""
    return out / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"


def do_rows(out: Path, steps: int, n: int, jobs: int, rows: list[tuple[str, int]]) -> None:
    """The rows that are not done yet, `jobs` at a time."""
    path, settings = out / "settings.json", {"steps": steps, "n": n, "held_out": HELD_OUT}
    settings["weights"] = fingerprint(weight_samples(load_policy("tiny").base_model))
    if path.exists():
        require_same_settings(path, read_json(path), settings)
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    missing = [row for row in rows if not (folder_of(out, *row) / "row.json").exists()]
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # of the rows' processes
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, lock_run_folder(out):
        waiting = {pool.submit(do_row, *row, folder_of(out, *row), steps, n): row for row in missing}
        bar = tqdm(total=len(rows), initial=len(rows) - len(missing), desc="rows", unit="row")
        try:
            for done in as_completed(waiting):
                name, seed = waiting[done]
                bar.write(f"{name}, seed {seed}: questions {100 * done.result():.1f} %")
                bar.update()
        except (OSError, RuntimeError) as error:  # also of a process that was killed
            raise UserError(f"Row {name}, seed {seed}: {error!r}. The same command goes on.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 8 steps, 100 questions, runs/quick")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time, each on one core (default 2)")
    args = parser.parse_args()
    name, steps, n = ("quick", 8, 100) if args.quick else ("reproduce", 160, 1200)
    rows = [(row, seed) for row, seed in PLAN if seed == SEEDS[0] or not args.quick]
    out = report.HERE.parent / "runs" / name
    with exit_on_error():
        do_rows(out, steps, n, max(1, args.jobs), rows)
        results = out if args.quick else report.HERE
        write_json(results / "RESULTS.json", collect({row: folder_of(out, *row) for row in rows}))
        report.write(results)


if __name__ == "__main__":
    main()
