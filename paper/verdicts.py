"""From every row's answers to RESULTS.json: figures, and a verdict on each claim by protocol.json's rules.

    python -m paper.verdicts [FOLDER]     computes all again from FOLDER/samples (default paper/samples)

Exit code 1 where RESULTS.json or RESULTS.md says otherwise. It needs no torch, and takes seconds.

What differs from a typical comparison of runs:
- A change varies with the scenes and with the training seeds, so its standard error has both parts.
- The bases are fixed, and each has an interval of its own: a claim has to hold on all of them.
"""

import gzip
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.scores import mean
from files.errors import FlagParser, UserError, exit_on_error

HERE = Path(__file__).parent
ATTEMPTS = HERE.parent / "docs" / "attempts.jsonl"
BASE = "base"  # the row of a base itself: one run of no steps
Rows = dict[str, dict[str, list[dict]]]  # base: row: the content of the files of its seeds


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plan(protocol: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Every (base, row, seed): a base first, then its rows seed by seed, those with a claim first."""
    runs = []
    for base in protocol["bases"]:
        numbered = [(i, name) for name, row in protocol["rows"].items() for i in range(row["seeds"])]
        runs.append((base, BASE, protocol["seeds"][0]))
        runs += [(base, name, protocol["seeds"][i]) for i, name in sorted(numbered, key=lambda run: run[0])]
    return runs


def sample_file(folder: Path, base: str, name: str, seed: int) -> Path:
    """The file of a row's answers: a hyphen for every character that may be illegal in a file name."""
    words = "".join(c if c.isalnum() else "-" for c in name)
    return folder / "samples" / f"{words}-{base}-{seed}.json.gz"


def read_row(path: Path) -> dict[str, Any]:
    """The content of a row's file; see `reproduce.run_row`."""
    return json.loads(gzip.decompress(path.read_bytes()))


def read_rows(folder: Path, protocol: dict[str, Any]) -> Rows:
    """The files of every row; UserError where one is missing or was made under another protocol."""
    rows: Rows = {}
    for base, name, seed in plan(protocol):
        path = sample_file(folder, base, name, seed)
        if not path.exists():
            raise UserError(f"{path} does not exist: run python -m paper.reproduce.")
        row = read_row(path)
        if row["protocol"] != sha256(folder / "protocol.json"):
            raise UserError(f"{path} was made under another protocol.json: delete it and run its row again.")
        rows.setdefault(base, {}).setdefault(name, []).append(row)
    return rows


# ---------------------------------------------------------------- Student's t, a change and its interval


def t_tail(t: float, df: float) -> float:
    """P(|T| > t) under Student's distribution with df ≥ 1 degrees of freedom.

    With T = √df · tan θ, the density of θ is cos^(df − 1) θ up to a constant: Simpson's rule integrates it.

    >>> round(t_tail(1.0, 1.0), 6)  # Cauchy: 1 − 2/π · atan t
    0.5
    """
    intervals, end = 1000, math.atan(abs(t) / math.sqrt(df))
    heights = np.cos(np.linspace(0, end, intervals + 1)) ** (df - 1)  # [1001]
    area = (
        (heights[0] + heights[-1] + 4 * heights[1::2].sum() + 2 * heights[2:-1:2].sum()) * end / intervals / 3
    )
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return max(0.0, 1 - 2 * constant * float(area))


def t_quantile(tail: float, df: float) -> float:
    """The t with P(|T| > t) = tail, by bisection.

    >>> round(t_quantile(0.05, 10), 3)
    2.228
    """
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail else (low, middle)
    return high


def contrast(after: Sequence[Sequence[float]], before: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The change of the same samples in points of 100, with its intervals and its p-value.

    after, before: a list for each of S seeds, of n samples each, paired seed by seed and sample by sample.
    SE² = s²(scene means) / n + s²(seed means) / S, with Satterthwaite's degrees of freedom
    df = SE⁴ / Σ part² / (number − 1).
    """
    changes = 100 * (np.array(after) - np.array(before))  # [S, n]
    means = [m for m in (changes.mean(0), changes.mean(1)) if len(m) > 1]  # of each sample [n], each seed [S]
    parts = [(float(m.var(ddof=1)) / len(m), len(m) - 1) for m in means]
    variance, change = sum(part for part, _ in parts), float(changes.mean())
    # Equal answers everywhere have no variance: their change is exactly 0.
    df = variance**2 / sum(part**2 / number for part, number in parts) if variance else 1.0
    error = math.sqrt(variance)
    entry: dict[str, Any] = {"change": change, "error": error, "df": df, "n": changes.shape[1]}
    for tail, name in ((0.05, "95"), (0.1, "90")):
        half = t_quantile(tail, df) * error if error else 0.0
        entry[name] = [change - half, change + half]
    p = t_tail(change / error, df) if error else float(change == 0)
    return entry | {"p": p, "seeds": changes.mean(1).tolist()}


# ---------------------------------------------------------------- verdicts


def samples_of(runs: list[dict], metric: str, sizes: Sequence[str]) -> list[list[float]]:
    """The samples of a row for each seed: those of the metric on objects of these sizes."""
    return [[v for size in sizes for v in run["samples"][f"{metric}_{size}"]] for run in runs]


def estimate(claim: dict[str, Any], rows: dict[str, list[dict]]) -> dict[str, Any]:
    """The change of a claim on one base, and the KL of both its rows; rows: those of the base."""
    row, other, metric = rows[claim["row"]], rows[claim["other"]], claim["metric"]
    after = samples_of(row, metric, claim["sizes"])
    before = samples_of(other, claim.get("other_metric", metric), claim["sizes"])
    # A base has one run, which every seed is compared with.
    entry = contrast(after, before * (len(after) // len(before)))
    return entry | {"kl": [mean(run["kl"]["all"] for run in runs) for runs in (row, other)]}


def p_of_all(estimates: list[dict[str, Any]]) -> float:
    """The p-value of "on every base a change, in one direction": the largest one, or 1."""
    directions = {math.copysign(1, entry["change"]) for entry in estimates}
    return max(entry["p"] for entry in estimates) if len(directions) == 1 else 1.0


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values: the k-th smallest of m times m − k + 1, and never below one before it.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for k, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - k) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def verdict(estimates: list[dict[str, Any]], adjusted_p: float, margin: float) -> str:
    """The rules of protocol.json; estimates: one for each base."""
    if adjusted_p < 0.05:
        return "holds" if estimates[0]["change"] > 0 else "opposite"
    is_small = all(-margin < entry["90"][0] and entry["90"][1] < margin for entry in estimates)
    return "no difference" if is_small else "undecided"


def judge(protocol: dict[str, Any], rows: Rows) -> list[dict[str, Any]]:
    """Every claim with its change on each base, its adjusted p-value and its verdict."""
    testable = [claim for claim in protocol["claims"] if not claim.get("untestable")]
    estimates = [{base: estimate(claim, rows[base]) for base in rows} for claim in testable]
    adjusted = holm([p_of_all(list(by_base.values())) for by_base in estimates])
    judged = []
    for claim, by_base, p in zip(testable, estimates, adjusted, strict=True):
        word = verdict(list(by_base.values()), p, protocol["margin"])
        judged.append(claim | {"bases": by_base, "p": p, "verdict": word})
    untestable = [claim for claim in protocol["claims"] if claim.get("untestable")]
    return judged + [claim | {"verdict": "not testable"} for claim in untestable]


# ---------------------------------------------------------------- RESULTS.json


def row_figures(runs: list[dict]) -> dict[str, Any]:
    """What RESULTS.json records of a row on one base: one number for each seed, of samples in points."""
    names = runs[0]["samples"]
    figures = {name: [100 * mean(run["samples"][name]) for run in runs] for name in names}
    figures |= {f"kl_{task}": [run["kl"][task] for run in runs] for task in runs[0]["kl"]}
    return figures | {key: [run[key] for run in runs] for key in ("parse_rate", "format", "seconds")}


def twin_figures(runs: list[dict]) -> dict[str, Any]:
    """Forced choice and swap on held-out twins: points of 100, for all seeds and for each."""
    figures = {}
    for test in ("forced", "swap"):
        lists = [run["samples"][f"twins_{test}"] for run in runs]
        each = [contrast([hits], [[0.0] * len(hits)]) for hits in lists]
        figures[test] = {"all": contrast(lists, [[0.0] * len(hits) for hits in lists]), "seeds": each}
    return figures


def mean_curve(runs: list[dict]) -> dict[str, list[float]]:
    """A row's training curve: for each step, the mean over the seeds."""
    return {
        key: [mean(values) for values in zip(*(run["curve"][key] for run in runs))]
        for key in ("iou", "format")
    }


def rounded(content: Any) -> Any:
    """JSON content with every number rounded to four places."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return round(content, 4) if isinstance(content, float) else content


def collect(folder: Path) -> dict[str, Any]:
    """The content of RESULTS.json, from protocol.json and samples/ in a folder and the attempts before it."""
    protocol = read_json(folder / "protocol.json")
    rows = read_rows(folder, protocol)
    lines = ATTEMPTS.read_text(encoding="utf-8").splitlines() if ATTEMPTS.exists() else []
    results = {
        "protocol_sha256": sha256(folder / "protocol.json"),
        "protocol": protocol,
        "versions": rows[next(iter(rows))][BASE][0]["versions"],
        "claims": judge(protocol, rows),
        "rows": {
            base: {name: row_figures(runs) for name, runs in by_row.items()} for base, by_row in rows.items()
        },
        "twins": {
            base: {
                name: twin_figures(runs)
                for name, runs in by_row.items()
                if "twins_swap" in runs[0]["samples"]
            }
            for base, by_row in rows.items()
        },
        "curves": {base: mean_curve(by_row["LOCUS"]) for base, by_row in rows.items()},
        "attempts": [json.loads(line) for line in lines],
    }
    return rounded(results)


def change_cell(entry: dict[str, Any]) -> str:
    """A change with its 95 % interval, as in RESULTS.md."""
    low, high = entry["95"]
    return f"{entry['change']:+.1f} ({low:+.1f} to {high:+.1f})"


def claim_row(claim: dict[str, Any], protocol: dict[str, Any]) -> str:
    """A claim as a line of the table of verdicts: title, change on each base, p, KL, verdict, paper.

    A "!" follows the KL of both rows on a base where they differ by more than the protocol's factor.
    """
    factor, cells, pairs = protocol["kl_factor"], ["–"] * len(protocol["bases"]), []
    for index, entry in enumerate(claim.get("bases", {}).values()):
        cells[index] = change_cell(entry)
        row_kl, other_kl = entry["kl"]
        matched = claim["other"] == BASE or 1 / factor <= other_kl / max(row_kl, 1e-9) <= factor
        pairs.append(f"{row_kl:.3f}, {other_kl:.3f}" + " !" * (not matched))
    cells += [f"{claim['p']:.3f}" if pairs else "–", "; ".join(pairs) or "–"]
    return f"| {' | '.join([claim['title'], *cells])} | **{claim['verdict']}** | {claim['paper']} |"


def check(folder: Path) -> str:
    """Where RESULTS.json or RESULTS.md says otherwise than the samples, as one sentence; "" if nowhere."""
    results, stored = collect(folder), read_json(folder / "RESULTS.json")
    text = (folder / "RESULTS.md").read_text(encoding="utf-8")
    for claim in results["claims"]:
        if claim_row(claim, results["protocol"]) not in text.splitlines():
            return (
                f"{folder / 'RESULTS.md'} has another line for {claim['title']!r}: {claim['verdict']} it is."
            )
    parts = [part for part, content in results.items() if content != stored.get(part)]
    return f"{folder / 'RESULTS.json'} has other {parts[0]} than the samples give." if parts else ""


def folder_flag(description: str) -> Path:
    """The folder that the command line names, by default paper/."""
    parser = FlagParser(description=description)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE, help="with protocol.json and samples/")
    return parser.parse_args().folder


def main() -> None:
    folder = folder_flag(__doc__)
    with exit_on_error("run python -m paper.reproduce first"):
        if problem := check(folder):
            sys.exit(f"{problem} To write both again: python -m paper.report")
        print(f"{folder / 'RESULTS.md'} says what the samples give.")


if __name__ == "__main__":
    main()
