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
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import CueConfig, SceneCues, open_cues
from eval import beginning
from evaluation.attention import add_grounding, add_looking, begin_answer, box_ious, look
from evaluation.heldout import HeldOut, evaluate, held_out
from evaluation.reply_cache import recall
from evaluation.scores import Scores
from files.disk import fingerprint, write_json
from files.errors import FlagParser, UserError, exit_on_error
from locus_mini import learning_rate, train
from models import load_policy
from paper import report
from paper.variants import VARIANTS, variant_flags
from policy import Policy
from prompts import encode, prompt_text
from tiny import build as tiny_build
from training.run_folder import at_work, refuse_difference, weight_samples
from training.settings import Config, resolve

HELD_OUT = 2026  # seed of the scenes that everything is measured on
SEEDS = (11, 12, 13)
THREE: dict[str, dict[str, Any]] = {  # row: a variant, and flags of locus_mini.py; with every seed
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
    "tiny:small 100:0": {"tiny_ratio": 1.0},
    "tiny:small 60:40": {"tiny_ratio": 0.6},
    "tiny:small 80:20": {"tiny_ratio": 0.8},
    "tiny:small 90:10": {"tiny_ratio": 0.9},
}
ONE: dict[str, dict[str, Any]] = {  # with the first seed alone
    "more pretraining, 1 to 4 things": {},
    "KL 0": {"kl": 0.0},
    "KL 0.01": {"kl": 0.01},
    "KL 0.16": {"kl": 0.16},
    "G = 2": {"group": 2},
    "G = 4": {"group": 4},
    "G = 16": {"group": 16},
    "LoRA rank 4": {"lora_rank": 4},
    "LoRA rank 64": {"lora_rank": 64},
    "all weights, lr 1e-4": {"variant": "all_weights", "lr": 1e-4},
    "SFT, a third of the rate": {"variant": "sft", "lr": 7e-4 / 3},
}
PRETRAINING = {"more pretraining": 9 * (1,) + (2,), "more pretraining, 1 to 4 things": (1, 2, 3, 4)}
LOOKED = ("base", "LOCUS", "text cue", "large crops")  # whose attention and grounding is measured: Figs. 2, 4


# Every row and its seed: those that the claims need come first, seed by seed.
PLAN = [("base", SEEDS[0]), *((name, seed) for seed in SEEDS for name in THREE)]
PLAN += [(name, SEEDS[0]) for name in ONE]

# ---------------------------------------------------------------- one row


@cache
def held_scenes(n: int) -> HeldOut:
    """n questions of each kind and half as many cues, the same for every row; seen once by a process."""
    held = held_out(load_policy("tiny"), SceneCues(CueConfig(), "heldout", HELD_OUT), n)
    parts = ("cues", "cue_items", "find_items")
    return replace(held, **{part: getattr(held, part)[: n // 2] for part in parts})


def pretrain(policy: Policy, things: tuple[int, ...], cfg: Config, folder: Path) -> None:
    """As many steps of what the base model was built with, through the same adapter: eight turns a scene."""
    build = tiny_build.Build(folder / "more", 0, cfg.seed)
    build.model = policy.whole
    build.draw_examples(things, max(100, cfg.steps * cfg.prompts // 100 * 100))
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=cfg.weight_decay)
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        loss, _ = build.finding_loss(tiny_build.random.Random(f"{cfg.seed}/{step}"), step, crop_share=1 / 3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm)
        optimizer.step()


def look_too(policy: Policy, held: HeldOut, scores: Scores, longest: int) -> None:
    """Attention and grounding of every question, into the scores."""
    tools, asked = policy.tools, [q for _, q in held.asked]
    pairs = list(zip(held.question_items, asked, strict=True))
    finds = [encode(tools, prompt_text(tools.family, "text", text=q.name), i.pictures[0]) for i, q in pairs]
    said = recall(policy, {}, "grounding", finds, (longest, 128))
    add_grounding(scores, box_ious(said, [q.box for q in asked]), scores.samples["questions"], scores)
    begun = [begin_answer(tools, item, beginning(q)) for item, q in pairs]
    add_looking(scores, look(policy, {}, "looks", begun, [[q.box] for q in asked], 128))


def do_row(name: str, seed: int, folder: Path, steps: int, n: int) -> float:
    """Train, ask, and write row.json: summary, samples, training curve, seconds. Returns the accuracy."""
    torch.set_num_threads(1)
    began, policy = time.monotonic(), load_policy("tiny")
    flags = (THREE | ONE).get(name, {}) | dict(seed=seed, steps=steps, show_every=0)
    variant = flags.pop("variant", "locus")
    task = VARIANTS[variant].task
    cfg, _ = resolve(variant_flags(variant, flags), policy.tools.family)
    folder.mkdir(exist_ok=True)
    if name != "base":
        policy = task.adapt(policy, cfg.lora_rank, seed)
    if name in PRETRAINING:
        pretrain(policy, PRETRAINING[name], cfg, folder)
    elif name != "base":
        cues = open_cues("scenes", "train", seed, CueConfig(cfg.source, cfg.tiny_ratio))
        with at_work(folder):
            train(policy, cues, cfg, folder, {key: str(value) for key, value in asdict(cfg).items()}, task)
    held = held_scenes(n) if name == "base" else replace(held_scenes(n), suppressed_items=[])  # see Table 1
    scores = evaluate(policy, held, cfg.max_new_tokens)
    if name in LOOKED:
        look_too(policy, held, scores, cfg.max_new_tokens)
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.open(encoding="utf-8")] if log.exists() else []
    row = {"summary": scores.summary, "samples": scores.samples}
    row["curve"] = {key: [round(line[key], 4) for line in lines] for key in ("iou", "format", "kl")}
    write_json(folder / "row.json", row | {"seconds": {"all": round(time.monotonic() - began)}})
    return scores.summary["questions"]["accuracy"]


# ---------------------------------------------------------------- all rows


def folder_of(out: Path, name: str, seed: int) -> Path:
    return out / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"


def do_rows(out: Path, steps: int, n: int, jobs: int, some: list[tuple[str, int]]) -> None:
    """The rows that are not done yet, `jobs` at a time."""
    about, begun = {"steps": steps, "n": n, "held_out": HELD_OUT}, out / "settings.json"
    about["weights"] = fingerprint(weight_samples(load_policy("tiny").whole))
    if begun.exists():
        refuse_difference(begun, json.loads(begun.read_text(encoding="utf-8")), about)
    out.mkdir(parents=True, exist_ok=True)
    write_json(begun, about)
    missing = [row for row in some if not (folder_of(out, *row) / "row.json").exists()]
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # of the rows' processes
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, at_work(out):
        waiting = {pool.submit(do_row, *row, folder_of(out, *row), steps, n): row for row in missing}
        bar = tqdm(total=len(some), initial=len(some) - len(missing), desc="rows", unit="row")
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
    home, rows = Path(__file__).parents[1], [row for row in PLAN if not args.quick or row[1] == SEEDS[0]]
    out = home / "runs" / name
    with exit_on_error():
        do_rows(out, steps, n, max(1, args.jobs), rows)
        folders = {row: folder_of(out, *row) for row in rows}
        report.write(out if args.quick else Path(__file__).parent, folders)


if __name__ == "__main__":
    main()
