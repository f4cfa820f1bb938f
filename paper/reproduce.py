"""The paper's tables and figures in miniature, and the controls that the paper does not have, in one command.

    python -m paper.reproduce            every row, two at a time (1.5 hours on 2 cores), into paper/
    python -m paper.reproduce --quick    the same in 3 minutes, too short to mean anything, into runs/quick/

A row is one training run with one seed and the scores of its model: a folder of its own, on one thread. A row
that has a row.json is complete and is not run again: delete that file after a change to the row. After a
stop, the same command continues.

The rule, written down before the run: settings were chosen on the held-out scenes of seed 0. Everything here
is measured on those of HELDOUT_SEED and with the training seeds SEEDS, and nothing was chosen on either.
A claim has the *same direction* if the paired 95 % interval of its change excludes 0 and all seeds share the
sign, the *opposite direction* if that holds the other way round, and otherwise there is *no difference*.
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
from locus_mini import apply_gradients, learning_rate, train
from models import add_lora, load_policy
from paper import report
from paper.claims import collect, read_json
from paper.variants import VARIANTS, variant_flags
from policy import Policy
from tiny.build import OBJECT_COUNTS, Build
from training.run_folder import lock_run_folder, require_same_settings, weight_samples
from training.settings import Config, resolve

HELDOUT_SEED = 2026  # of the scenes that everything is measured on
SEEDS = (11, 12, 13)  # of training
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
    "SFT, a third of the rate": {"variant": "sft", "lr": 7e-4 / 3},
}
FLAGS = {"base": {}} | ROWS_OF_EVERY_SEED | ROWS_OF_FIRST_SEED
# Rows that continue the base's pretraining instead, and the stage of tiny/build.py whose scenes they see.
PRETRAINING = {"more pretraining": "few things", "more pretraining, 1 to 4 things": "language"}
ANALYSED_ROWS = ("base", "LOCUS", "text cue", "large crops")  # with attention and grounding: Figs. 2 and 4
BATCH = 128  # prompts at a time

# Every (row, seed). The rows that the claims need come first, seed by seed.
PLAN = [("base", SEEDS[0]), *((name, seed) for seed in SEEDS for name in ROWS_OF_EVERY_SEED)]
PLAN += [(name, SEEDS[0]) for name in ROWS_OF_FIRST_SEED]

# ---------------------------------------------------------------- one row


@cache
def heldout_scenes(n: int) -> HeldOutSet:
    """n questions of each kind and n / 2 cues, the same for every row; built once in each process."""
    held = build_heldout_set(load_policy("tiny"), scene_cues(CueConfig(), "heldout", HELDOUT_SEED), n)
    parts = ("cues", "cue_prompts", "find_prompts")
    return replace(held, **{part: getattr(held, part)[: n // 2] for part in parts})


def pretrain(policy: Policy, object_counts: tuple[int, ...], cfg: Config, folder: Path) -> None:
    """As many steps of the base model's own pretraining, on scenes of these counts, through the adapter."""
    build = Build(folder / "more", 0, cfg.seed)
    build.model = policy.base_model
    build.draw_examples(object_counts, max(100, cfg.steps * cfg.prompts // 100 * 100))
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params, weight_decay=cfg.weight_decay)
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        loss, _ = build.turns_loss(random.Random(f"{cfg.seed}/{step}"), step, crop_share=1 / 3)
        optimizer.zero_grad()
        loss.backward()
        apply_gradients(optimizer, 1.0, cfg.max_grad_norm, finite=True)


def run_row(name: str, seed: int, folder: Path, steps: int, n: int) -> float:
    """Trains and measures one row and writes its row.json; returns its accuracy on questions.

    row.json: summary and samples (as in results.json), curve (rewards and KL by step), seconds.
    """
    torch.set_num_threads(1)
    start, policy = time.monotonic(), load_policy("tiny")
    flags = {"seed": seed, "steps": steps, "show_every": 0} | FLAGS[name]
    variant = flags.pop("variant", "locus")
    task = VARIANTS[variant].task
    cfg, _ = resolve(variant_flags(variant, flags), policy.processor.family)
    folder.mkdir(exist_ok=True)
    if name != "base":
        policy = add_lora(policy, cfg.lora_rank, seed)
    if name in PRETRAINING:
        pretrain(policy, OBJECT_COUNTS[PRETRAINING[name]], cfg, folder)
    elif name != "base":
        cues = open_cues("scenes", "train", seed, CueConfig(cfg.source, cfg.tiny_ratio))
        state = {key: str(value) for key, value in asdict(cfg).items()}
        with lock_run_folder(folder):
            train(policy, cues, cfg, folder, state, task)
    # Context suppression (Table 1) is about the base alone.
    held = heldout_scenes(n) if name == "base" else replace(heldout_scenes(n), suppressed_prompts=[])
    scores = evaluate(policy, held, cfg.max_new_tokens)
    if name in ANALYSED_ROWS:
        analyse_questions(policy, held, scores, scores, {}, name, (cfg.max_new_tokens, BATCH))
    log = folder / "metrics.jsonl"  # only of rows that locus_mini.py's loop has trained
    lines = [json.loads(line) for line in log.open(encoding="utf-8")] if log.exists() else []
    curve = {key: [round(line[key], 4) for line in lines] for key in ("iou", "format", "kl")}
    row = {"summary": scores.summary, "samples": scores.samples, "curve": curve}
    write_json(folder / "row.json", row | {"seconds": {"all": round(time.monotonic() - start)}})
    return scores.summary["questions"]["accuracy"]


# ---------------------------------------------------------------- all rows


def folder_of(out: Path, name: str, seed: int) -> Path:
    """A row's folder: its name, with a hyphen for every character that may be illegal, and its seed."""
    return out / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"


def run_rows(out: Path, steps: int, n: int, jobs: int, rows: list[tuple[str, int]]) -> None:
    """Runs the rows that are not complete yet, `jobs` at a time; UserError if others have other settings."""
    path, settings = out / "settings.json", {"steps": steps, "n": n, "held_out": HELDOUT_SEED}
    settings["weights"] = fingerprint(weight_samples(load_policy("tiny").base_model))
    if path.exists():
        require_same_settings(path, read_json(path), settings)
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    missing = [row for row in rows if not (folder_of(out, *row) / "row.json").exists()]
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # for the rows' processes
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, lock_run_folder(out):
        futures = {pool.submit(run_row, *row, folder_of(out, *row), steps, n): row for row in missing}
        bar = tqdm(total=len(rows), initial=len(rows) - len(missing), desc="rows", unit="row")
        try:
            for future in as_completed(futures):
                name, seed = futures[future]
                bar.write(f"{name}, seed {seed}: questions {100 * future.result():.1f} %")
                bar.update()
        except (OSError, RuntimeError) as error:  # the latter also if a process was killed
            raise UserError(f"Row {name}, seed {seed}: {error!r}. The same command continues.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 8 steps, 100 questions, runs/quick")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time, each on one core (default 2)")
    args = parser.parse_args()
    name, steps, n = ("quick", 8, 100) if args.quick else ("reproduce", report.FULL_STEPS, 1200)
    rows = [(row, seed) for row, seed in PLAN if seed == SEEDS[0] or not args.quick]
    out = report.HERE.parent / "runs" / name
    with exit_on_error():
        if args.jobs < 1:
            raise UserError(f"--jobs {args.jobs} runs nothing: give 1 or more.")
        run_rows(out, steps, n, args.jobs, rows)
        results = out if args.quick else report.HERE
        write_json(results / "RESULTS.json", collect({row: folder_of(out, *row) for row in rows}))
        report.write(results)


if __name__ == "__main__":
    main()
