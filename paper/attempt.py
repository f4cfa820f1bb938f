"""An attempt at moving questions: trains and measures on development seeds and scenes, and writes it down.

    python -m paper.attempt --note "why" [--base FOLDER] [--variant NAME] [flags of locus_mini.py]

Every attempt is a line of docs/attempts.jsonl, good or bad, and RESULTS.md shows them all. It never sees the
seeds and scenes that paper/protocol.json keeps for the run that decides.
"""

import json
from pathlib import Path
from typing import Any

from evaluation.scores import mean
from files.disk import fingerprint, sha256
from files.errors import FlagParser, UserError, exit_on_error, model_folder
from paper import verdicts
from paper.reproduce import RUNS, Row, run_row
from paper.variants import VARIANTS
from training.settings import read_flags


def attempt(note: str, model: str, variant: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The line of one attempt. Its figures are in points: before, and the change with its standard error."""
    protocol = verdicts.read_json(verdicts.HERE / "protocol.json")
    development, weights = protocol["development"], sha256(Path(model) / "model.safetensors")
    seeds = [flags.pop("seed")] if "seed" in flags else development["seeds"]
    if taken := {*seeds} & {*protocol["seeds"]}:
        raise UserError(f"--seed {taken.pop()} is kept for the run that decides: give another.")
    settings, contents = {"steps": protocol["steps"]} | flags, []
    for name, run_flags in [("locus", {"steps": 0}), *((variant, settings | {"seed": s}) for s in seeds)]:
        # Its folder is named by all that a run depends on, so no run is made twice.
        parts = (weights, name, str(sorted(run_flags.items())), str(development["measured"]))
        folder = RUNS / "attempts" / fingerprint(map(str.encode, parts))
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
    return line


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--note", required=True, help="what is tried and why, in a sentence")
    parser.add_argument("--base", default="tiny", help="folder of the base (default tiny/model)")
    parser.add_argument("--variant", choices=VARIANTS, default="locus")
    with exit_on_error():
        args, rest = parser.parse_known_args()
        flags = read_flags(__doc__, rest)
        if foreign := flags.keys() & {"model", "data", "out", "resume", "dry_run"}:
            raise UserError(f"--{foreign.pop().replace('_', '-')} is no flag of an attempt: leave it out.")
        line = attempt(args.note, model_folder(args.base), args.variant, flags)
        with verdicts.ATTEMPTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line, indent=2))


if __name__ == "__main__":
    main()
