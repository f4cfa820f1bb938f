"""Every row of protocol.json, in one command: trains it, measures it, and writes RESULTS.md.

    python -m paper.reproduce --base-b FOLDER    all rows on both bases (4 hours on 2 cores), into paper/
    python -m paper.reproduce --quick            the same in minutes, too short to mean anything: runs/quick/

Base A is tiny/model, base B is what `python -m tiny.build --out FOLDER --seed 1` makes; protocol.json names
both by the SHA-256 of their weights. A row is one training run with one seed on one base, on one thread. Its
answers are kept in samples/, and a row that has them is not run again. After a stop, the same command
continues.
"""

import gzip
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data import CueConfig, open_cues, scene_cues
from evaluation.heldout import HeldOutSet, build_heldout_set, evaluate, object_at, predicted_box
from evaluation.scores import Scores, mean
from evaluation.twins import measure_twins
from files.disk import write_json
from files.errors import FlagParser, UserError, exit_on_error, model_folder
from locus_mini import train
from models import add_lora, load_policy
from paper import report, verdicts
from paper.variants import VARIANTS, variant_flags
from policy import Policy, collate, rollout, run_text
from prompts import BoxFrame, EncodedPrompt
from tiny.scenes import SIDES
from training.run_folder import lock_run_folder, versions
from training.settings import resolve

RUNS = verdicts.HERE.parent / "runs"
KL_PROMPTS = 100  # of each task, on which the KL of a row is measured
QUICK = {"steps": 4, "n": 18, "twins": 6}  # instead of the protocol's, with --quick


@dataclass(frozen=True)
class Row:
    """A training run, and what it is measured on."""

    model: str  # folder of the base
    variant: str
    flags: dict[str, Any]  # of locus_mini.py; 0 steps: the base itself
    held_out: int  # seed of the scenes that it is measured on
    n: int  # cues and, of each kind and size, a third as many questions
    twins: int  # pairs of twins, 0: not measured
    folder: Path  # of the training run
    out: Path  # the file of its answers
    note: dict[str, Any]  # what else that file says


@lru_cache(maxsize=1)  # a process measures its rows on one base after the other
def heldout_scenes(model: str, seed: int, n: int) -> HeldOutSet:
    """The same prompts for every row on a base."""
    return build_heldout_set(load_policy(model), scene_cues(CueConfig(), "heldout", seed), n)


@torch.no_grad()
def all_logps(policy: Policy, prompts: list[EncodedPrompt], tokens: Tensor, mask: Tensor) -> Tensor:
    """log π over the whole vocabulary at each token of one completion per prompt: [N, V] without what is −∞.

    tokens, mask: [B, 1, T], of which N are valid.
    """
    batch, tokens, mask = collate(policy, prompts), tokens[:, 0], mask[:, 0]  # [B, T]
    ids = torch.cat([batch.input_ids, tokens], 1)  # [B, P + T]
    segment_ids = torch.cat([batch.segment_ids, torch.where(mask, 1, -1)], 1)  # [B, P + T]
    positions = batch.completion_start[:, None] + torch.arange(
        tokens.shape[1], device=policy.device
    )  # [B, T]
    position_ids = torch.cat([batch.position_ids, positions.expand(3, -1, -1)], 2)  # [3, B, P + T]
    hidden = run_text(policy, ids, segment_ids, position_ids, prompts)  # [B, P + T, H]
    # Each token is predicted one token earlier.
    hidden = hidden[:, batch.input_ids.shape[1] - 1 : -1][mask]  # [N, H]
    logits = policy.base_model.lm_head(hidden).float() + policy.logit_bias  # [N, V]
    return logits.log_softmax(-1)[:, policy.logit_bias.isfinite()]


def realised_kl(policy: Policy, prompts: list[EncodedPrompt], max_new_tokens: int) -> float:
    """Mean over tokens of KL(π ‖ π_ref) = Σ_v π(v) · log(π(v) / π_ref(v)), exact over the vocabulary.

    On completions that the reference samples with a fixed seed: the same for every row on a base.
    """
    with policy.reference():
        generator = torch.Generator(policy.device).manual_seed(0)
        completions = rollout(policy, collate(policy, prompts), 1, max_new_tokens, generator)
        reference = all_logps(policy, prompts, completions.tokens, completions.mask)  # [N, V]
    trained = all_logps(policy, prompts, completions.tokens, completions.mask)  # [N, V]
    return (trained.exp() * (trained - reference)).sum(-1).mean().item()


def samples_by_size(scores: Scores, held: HeldOutSet, replies: dict[str, list]) -> dict[str, list[float]]:
    """The answers of a row by kind and size: 1 or 0, of boxes the IoU to two places.

    replies: those to cue search, by their index. Of cues of twins also whether a box is on either of the two,
    and on the right one; and whether the thought names the detail that tells twins apart.
    """
    samples = {name: row for name, row in scores.samples.items() if name.rpartition("_")[2] in SIDES}
    samples |= {f"{task}_{size}": [] for task in ("cue", "find") for size in ("tiny", "small")}
    samples |= {"names_detail": [], "on_twins": [], "on_right_twin": []}
    for index, cue in enumerate(held.cues):
        for task in ("cue", "find"):
            samples[f"{task}_{cue.size}"].append(round(scores.samples[task][index], 2))
        text, *frame = replies[f"row/cue search/{index}"]
        samples["names_detail"].append(float("inside" in text.partition("</think>")[0]))
        if not cue.scene.is_unique(cue.target):
            box = predicted_box(text, BoxFrame(*frame))
            found = object_at(cue.scene, box) if box else None
            samples["on_twins"].append(float(found is not None and found.name == cue.target.name))
            samples["on_right_twin"].append(float(found == cue.target))
    return samples


def run_row(row: Row) -> dict[str, Any]:
    """Trains and measures a row, unless its file has the answers already; returns the content of that file.

    samples: lists by name; kl: by task, and their mean (all); parse_rate, format: of cue search; curve:
    rewards by step; seconds; and the row's note.
    """
    if row.out.exists():
        return verdicts.read_row(row.out)
    torch.set_num_threads(1)
    start, policy, task = time.monotonic(), load_policy(row.model), VARIANTS[row.variant].task
    cfg, _ = resolve(variant_flags(row.variant, {"show_every": 0} | row.flags), policy.processor.family)
    policy = add_lora(policy, cfg.lora_rank, cfg.seed)
    cues = open_cues("scenes", "train", cfg.seed, CueConfig(cfg.source, cfg.tiny_ratio))
    row.folder.mkdir(parents=True, exist_ok=True)
    with lock_run_folder(row.folder):
        state = {"task": row.variant} | row.note | {name: str(value) for name, value in asdict(cfg).items()}
        train(policy, cues, cfg, row.folder, state, task)
    held, replies = heldout_scenes(row.model, row.held_out, row.n), {}
    # Context suppression (Table 1) is about the base alone.
    held = held if cfg.steps == 0 else HeldOutSet(**(vars(held) | {"suppressed_prompts": []}))
    scores = evaluate(policy, held, cfg.max_new_tokens, "row", replies)
    samples = samples_by_size(scores, held, replies)
    twins = measure_twins(policy, row.twins) if row.twins else {}
    samples |= {f"twins_{name}": [float(hit) for hit in hits] for name, hits in twins.items()}
    prompts = {"cue": held.cue_prompts, "find": held.find_prompts, "questions": held.question_prompts}
    kl = {name: realised_kl(policy, part[:KL_PROMPTS], cfg.max_new_tokens) for name, part in prompts.items()}
    lines = [json.loads(line) for line in (row.folder / "metrics.jsonl").open(encoding="utf-8")]
    content = {"samples": samples, "kl": kl | {"all": mean(kl.values())}}
    content |= {key: scores.summary["cue"][key] for key in ("parse_rate", "format")}
    content["curve"] = {key: [round(line[key], 4) for line in lines] for key in ("iou", "format")}
    content |= {"seconds": round(time.monotonic() - start), "versions": versions()} | row.note
    row.out.parent.mkdir(parents=True, exist_ok=True)
    new = row.out.with_suffix(".new")
    new.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    new.replace(row.out)
    return content


# ---------------------------------------------------------------- all rows


def row_of(protocol: dict, models: dict[str, str], out: Path, work: Path, run: tuple[str, str, int]) -> Row:
    """A run of `verdicts.plan`. models: the folder of each base; out: of samples/; work: of training runs."""
    base, name, seed = run
    entry = protocol["rows"].get(name, {"flags": {"steps": 0}})  # else the base itself
    flags = {"seed": seed, "steps": protocol["steps"]} | entry["flags"]
    twins = protocol["twins"] if entry.get("twins", name == verdicts.BASE) else 0
    path = verdicts.sample_file(out, base, name, seed)
    note = {"protocol": verdicts.sha256(out / "protocol.json")}
    measured = (protocol["held_out"], protocol["n"], twins)
    folder = work / path.name.removesuffix(".json.gz")
    return Row(models[base], entry.get("variant", "locus"), flags, *measured, folder, path, note)


def run_rows(rows: list[Row], jobs: int) -> None:
    """Runs the rows that have no answers yet, `jobs` at a time; the first ones first."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # for the rows' processes
    missing = [row for row in rows if not row.out.exists()]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = {pool.submit(run_row, row): row for row in missing}
        bar = tqdm(total=len(rows), initial=len(rows) - len(missing), desc="rows", unit="row")
        try:
            for future in as_completed(futures):
                seconds = future.result()["seconds"]
                bar.write(f"{futures[future].folder.name}: {seconds} seconds")
                bar.update()
        except (OSError, RuntimeError) as error:  # the latter also if a process was killed
            name = futures[future].folder.name
            raise UserError(f"Row {name}: {error!r}. The same command continues.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def check_bases(protocol: dict[str, Any], models: dict[str, str]) -> None:
    """UserError where the weights in a folder are not those of the protocol's base."""
    for base, model in models.items():
        found, wanted = verdicts.sha256(Path(model) / "model.safetensors"), protocol["bases"][base]
        if found != wanted:
            raise UserError(
                f"{model} has weights {found[:12]}, but protocol.json has {wanted[:12]} as base {base}."
            )


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--base-a", default="tiny", help="folder of base A (default tiny/model)")
    parser.add_argument("--base-b", help="folder of base B")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps and samples, any bases")
    parser.add_argument("--out", type=Path, help="of --quick; default runs/quick")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time, each on one core (default 2)")
    args = parser.parse_args()
    with exit_on_error():
        if args.jobs < 1:
            raise UserError(f"--jobs {args.jobs} runs nothing: give 1 or more.")
        if not (args.base_b or args.quick):
            raise UserError("--base-b is missing: give what python -m tiny.build --out FOLDER --seed 1 made.")
        given = {"A": args.base_a, "B": args.base_b}
        models = {base: model_folder(model) for base, model in given.items() if model}
        protocol, out, work = (
            verdicts.read_json(verdicts.HERE / "protocol.json"),
            verdicts.HERE,
            RUNS / "reproduce",
        )
        if args.quick:
            out = args.out or RUNS / "quick"
            work = out / "runs"
            hashes = {
                base: verdicts.sha256(Path(model) / "model.safetensors") for base, model in models.items()
            }
            rows = {name: row | {"seeds": 1} for name, row in protocol["rows"].items()}
            protocol |= QUICK | {"bases": hashes, "rows": rows}
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "protocol.json", protocol)
        check_bases(protocol, models)
        run_rows([row_of(protocol, models, out, work, run) for run in verdicts.plan(protocol)], args.jobs)
        report.write(out)


if __name__ == "__main__":
    main()
