"""Every row of protocol.json, in one command: trains it, measures it, and writes RESULTS.md.

    python -m paper.reproduce --base-b FOLDER    all rows on both bases (3 hours on 2 cores), into paper/
    python -m paper.reproduce --quick            the same in minutes, too short to mean anything: runs/quick/
    python -m paper.reproduce --attempt "why" [--base-a FOLDER] [--variant NAME] [flags of locus_mini.py]
                                                 one training run, measured on development seeds and scenes

Base A is tiny/model, base B is of `python -m tiny.build --out FOLDER --seed 1`; protocol.json names both by
the SHA-256 of their weights (an AMD CPU makes others: docs/embedded_model.md). A row is one
training run with one seed on one base, on one thread. Its answers are kept in samples/, and a row that has
them is not run again. After a stop, the same command continues.
"""

import gzip
import json
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import CueConfig, open_cues, scene_cues
from evaluation.heldout import HeldOutSet, build_heldout_set, evaluate
from evaluation.scores import mean
from evaluation.twins import add_twins, measure_twins
from files.disk import continue_lines, fingerprint, read_lines, sha256, write_json
from files.errors import FlagParser, UserError, exit_on_error, model_folder, one_or_more
from locus_mini import train
from models import load_policy
from paper import report, verdicts
from paper.variants import VARIANTS, variant_flags
from policy import Policy, collate, rollout, run_text
from prompts import EncodedPrompt
from tiny.scenes import SIDES
from training.experiment import prepare
from training.run_folder import lock_run_folder, versions
from training.settings import PIXELS, read_flags

RUNS = verdicts.HERE.parent / "runs"
# No flags of an attempt: its model, and what would change how every row is measured, or nothing.
FIXED = {"model", "data", "annotations", "images", "exclude", "expressions", "out", "resume", "dry_run"}
FIXED |= {*PIXELS, "cue_prompt", "box_frame", "load_in_4bit", "temperature", "max_new_tokens", "eval_every"}

# ---------------------------------------------------------------- the KL of a row


@torch.no_grad()
def realised_kl(policy: Policy, prompts: list[EncodedPrompt], max_new_tokens: int) -> float:
    """Mean over tokens of KL(π ‖ π_ref) = Σ_v π(v) · log(π(v) / π_ref(v)), exact over the vocabulary.

    On completions that the reference samples with a fixed seed: the same for every row on a base.
    """
    batch, generator = collate(policy, prompts), torch.Generator(policy.device).manual_seed(0)
    with policy.reference():
        completions = rollout(policy, batch, 1, max_new_tokens, generator)
    tokens, mask = completions.tokens[:, 0], completions.mask[:, 0]  # [B, T]
    ids = torch.cat([batch.input_ids, tokens], 1)  # [B, P + T]
    segment_ids = torch.cat([batch.segment_ids, torch.where(mask, 1, -1)], 1)  # [B, P + T]
    positions = batch.completion_start[:, None] + torch.arange(mask.shape[1], device=mask.device)  # [B, T]
    position_ids = torch.cat([batch.position_ids, positions.expand(3, -1, -1)], 2)  # [3, B, P + T]

    def all_logps() -> torch.Tensor:
        hidden = run_text(policy, ids, segment_ids, position_ids, prompts)  # [B, P + T, H]
        # Each token is predicted one token earlier.
        hidden = hidden[:, batch.input_ids.shape[1] - 1 : -1][mask]  # [N, H]
        return policy.base_model.lm_head(hidden).float()[:, policy.logit_bias == 0].log_softmax(-1)  # [N, V]

    with policy.reference():
        reference = all_logps()
    trained = all_logps()
    return (trained.exp() * (trained - reference)).sum(-1).mean().item()


# ---------------------------------------------------------------- one row


@dataclass(frozen=True)
class Row:
    """A training run, and what it is measured on."""

    model: str  # folder of the base
    variant: str
    flags: dict[str, Any]  # of locus_mini.py; 0 steps: the base itself
    measured: dict[str, int]  # held_out: seed of the scenes; n: cues, questions of each kind and size; twins
    folder: Path  # of the training run
    out: Path  # the file of its answers
    protocol: str = ""  # hash of the protocol, if it is of one


@lru_cache(maxsize=1)  # a process measures the rows on one base after the other
def heldout_scenes(model: str, seed: int, n: int) -> HeldOutSet:
    """The same prompts for every row on a base."""
    return build_heldout_set(load_policy(model), scene_cues(CueConfig(), "heldout", seed), n, n)


def run_row(row: Row) -> dict[str, Any]:
    """Trains and measures a row, unless its file has the answers already; returns the content of that file.

    samples: lists by name, kind and size: 1 or 0 for each answer, of boxes the IoU to two places. kl: to the
    base, by task. curve: the IoU reward by step. Also seconds, versions and the protocol's hash.
    """
    if row.out.exists():
        return verdicts.read_row(row.out, row.protocol)
    torch.set_num_threads(1)
    start, task = time.monotonic(), VARIANTS[row.variant].task
    policy, cfg, _ = prepare(variant_flags(row.variant, {"model": row.model, "show_every": 0} | row.flags))
    cues = open_cues("scenes", "train", cfg.seed, CueConfig(cfg.source, cfg.tiny_ratio))
    row.folder.mkdir(parents=True, exist_ok=True)
    state = {"task": row.variant, "protocol": row.protocol} | {k: str(v) for k, v in asdict(cfg).items()}
    train(policy, cues, cfg, row.folder, state, task)
    # Measure. Context suppression (Table 1) is about the base alone.
    held_out, n, twins = (row.measured[name] for name in ("held_out", "n", "twins"))
    held, longest = heldout_scenes(row.model, held_out, n), cfg.max_new_tokens
    held = replace(held, suppressed_prompts=[]) if cfg.steps else held
    scores = evaluate(policy, held, longest)
    if twins:
        add_twins(scores, measure_twins(policy, twins, held_out, batch=64))
    by_size = {name: part for name, part in scores.samples.items() if name.rpartition("_")[2] in SIDES}
    samples = {name: [round(value, 2) for value in part] for name, part in by_size.items()}
    prompts = {"cue": held.cue_prompts, "find": held.find_prompts, "questions": held.question_prompts}
    kl = {name: realised_kl(policy, part[:100], longest) for name, part in prompts.items()}
    # Write it down.
    lines = read_lines(row.folder / "metrics.jsonl")
    content = {"samples": samples, "kl": kl | {"all": mean(kl.values())}, "versions": versions()}
    content |= {"curve": [round(line["iou"], 4) for line in lines], "protocol": row.protocol}
    content["seconds"] = round(time.monotonic() - start)
    row.out.parent.mkdir(parents=True, exist_ok=True)
    new = row.out.with_suffix(".new")  # a kill leaves no half of a file
    new.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    new.replace(row.out)
    return content


# ---------------------------------------------------------------- one attempt


def attempt(note: str, model: str, variant: str, flags: dict[str, Any]) -> dict[str, Any]:
    """One attempt at moving questions, measured on development seeds and scenes: a line of attempts.jsonl.

    With another variant than LOCUS it is a trial of a control's settings. Every attempt is kept, good or
    bad, and RESULTS.md shows them all. None sees the seeds and scenes that protocol.json keeps for the run
    that decides. Its figures are in points: before, and the change with its standard error.
    """
    protocol = verdicts.read_json(verdicts.HERE / "protocol.json")
    development, weights = protocol["development"], sha256(Path(model) / "model.safetensors")
    if foreign := sorted(flags.keys() & FIXED):
        raise UserError(f"--{foreign[0].replace('_', '-')} is no flag of an attempt: leave it out.")
    seeds = [flags.pop("seed")] if "seed" in flags else development["seeds"]
    if taken := {*seeds} & {*protocol["seeds"]}:
        raise UserError(f"--seed {taken.pop()} is kept for the run that decides: give another.")
    settings, contents = {"steps": protocol["steps"]} | flags, []
    for name, run_flags in (("locus", {"steps": 0}), *((variant, settings | {"seed": s}) for s in seeds)):
        # Its folder is named by all that a run depends on (its code by the commit), so none is made twice.
        parts = (weights, name, run_flags, development["measured"], versions())
        folder = RUNS / "attempts" / fingerprint([json.dumps(parts, sort_keys=True).encode()])
        row = Row(model, name, run_flags, development["measured"], folder, folder / "row.json.gz")
        contents.append(run_row(row))
    base, *runs = contents
    line = {"note": note, "commit": runs[0]["versions"]["commit"], "base": weights, "variant": variant}
    line |= {"settings": settings, "seeds": seeds, "seconds": sum(run["seconds"] for run in runs)}
    line |= {"kl": round(mean(run["kl"]["all"] for run in runs), 4), "figures": {}}
    for key in runs[0]["samples"]:
        before = [base["samples"][key]] * len(runs)
        entry = verdicts.contrast([run["samples"][key] for run in runs], before)
        entry["before"] = 100 * mean(before[0])
        line["figures"][key] = {part: round(entry[part], 2) for part in ("before", "change", "error", "n")}
    with continue_lines(verdicts.ATTEMPTS, len(read_lines(verdicts.ATTEMPTS))) as file:
        file.write(json.dumps(line) + "\n")
    return line


# ---------------------------------------------------------------- all rows


def rows_of(protocol: dict[str, Any], models: dict[str, str], out: Path) -> list[Row]:
    """Every row of the protocol in the folder `out`; models: the folder of each base."""
    rows, protocol_sha256 = [], sha256(out / "protocol.json")
    for base, name, seed in verdicts.plan(protocol):
        entry, path = protocol["rows"][name], verdicts.sample_file(out, base, name, seed)
        flags = {"seed": seed, "steps": protocol["steps"]} | entry["flags"]
        measured = protocol["measured"] | ({} if entry.get("twins") else {"twins": 0})
        folder = RUNS / f"rows-{protocol_sha256[:8]}" / path.name.partition(".")[0]
        rows.append(Row(models[base], entry["variant"], flags, measured, folder, path, protocol_sha256))
    return rows


def run_rows(rows: list[Row], jobs: int) -> None:
    """Runs rows, `jobs` at a time, each on one thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # for the rows' processes
    RUNS.mkdir(exist_ok=True)
    # A process of the pool ends at Ctrl-C: otherwise it would take the next row.
    at_start = signal.signal, (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(jobs, get_context("spawn"), *at_start) as pool, lock_run_folder(RUNS):
        try:
            for row, content in zip(rows, tqdm(pool.map(run_row, rows), "rows", len(rows), unit="row")):
                tqdm.write(f"{row.folder.name}: {content['seconds']} seconds")
        except RuntimeError as error:  # also if a process was killed
            raise UserError(f"A row has failed ({error!r}). The same command continues.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def open_protocol(models: dict[str, str], quick: bool) -> tuple[dict[str, Any], Path]:
    """The protocol and the folder that holds it; UserError where a base is not the one that it names."""
    protocol, out = verdicts.read_json(verdicts.HERE / "protocol.json"), verdicts.HERE
    hashes = {base: sha256(Path(model) / "model.safetensors") for base, model in models.items()}
    if quick:
        out = RUNS / "quick"
        out.mkdir(parents=True, exist_ok=True)
        protocol |= {"bases": hashes, "seeds": protocol["seeds"][:1], "steps": 4}
        protocol["measured"] |= {"n": 6, "twins": 12}
        write_json(out / "protocol.json", protocol)
    for base, wanted in protocol["bases"].items():
        if hashes.get(base) != wanted:
            raise UserError(f"Base {base} is not that of protocol.json: give --base-{base.lower()} FOLDER.")
    return protocol, out


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--base-a", default="tiny", help="folder of base A (default tiny/model)")
    parser.add_argument("--base-b", help="folder of base B; --quick can do without")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps and samples, any base")
    parser.add_argument("--jobs", type=one_or_more, default=2, help="rows at a time, a core each (default 2)")
    parser.add_argument("--attempt", metavar="WHY", help="what is tried and why, in a sentence")
    parser.add_argument("--variant", choices=VARIANTS, help="of an attempt (default locus)")
    args, rest = parser.parse_known_args()
    with exit_on_error():
        if args.attempt is not None:
            if args.quick or args.base_b:
                parser.error("--attempt makes one run on --base-a: leave --quick and --base-b out")
            variant, flags = args.variant or "locus", read_flags(__doc__, rest)
            line = attempt(args.attempt, model_folder(args.base_a), variant, flags)
            return print(json.dumps(line, indent=2))
        if rest or args.variant:
            parser.error(f"without --attempt, unrecognized arguments: {' '.join(rest or ['--variant'])}")
        models = {base: model_folder(m) for base, m in (("A", args.base_a), ("B", args.base_b)) if m}
        protocol, out = open_protocol(models, args.quick)
        run_rows(rows_of(protocol, models, out), args.jobs)
        report.write(out)


if __name__ == "__main__":
    main()
