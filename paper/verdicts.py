"""From every row's answers to RESULTS.json: figures, and a verdict on each claim by protocol.json's rules.

    python -m paper.verdicts [FOLDER]     computes all again from FOLDER/samples (default paper/samples)

Exit code 1 where RESULTS.json, or a verdict's line in RESULTS.md, says otherwise. It needs no torch.

What differs from a typical comparison of runs:
- A change varies with the scenes and with the training seeds, so its standard error has both parts.
- The bases are fixed, and each has an interval of its own: a claim has to hold on all of them.
"""

import gzip
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.scores import mean
from files.disk import read_json, read_lines, sha256
from files.errors import FlagParser, UserError, exit_on_error

HERE = Path(__file__).parent
ATTEMPTS = HERE.parent / "docs" / "attempts.jsonl"
BASE = "base"  # the row of a base itself: one seed, no steps
TWIN_TESTS = {"forced": "forced choice", "forced_described": "told the detail", "swap": "both crops found"}
Rows = dict[str, dict[str, list[dict]]]  # base: row: the content of the files of its seeds


def plan(protocol: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Every (base, row, seed): base by base, then seed by seed, so the rows with a claim come first."""
    runs = product(protocol["bases"], enumerate(protocol["seeds"]), protocol["rows"].items())
    return [(base, name, seed) for base, (i, seed), (name, row) in runs if i < row["seeds"]]


def sample_file(folder: Path, base: str, name: str, seed: int) -> Path:
    """The file of a row's answers: a hyphen for every character that may be illegal in a file name."""
    words = "".join(c if c.isalnum() else "-" for c in name)
    return folder / "samples" / f"{words}-{base}-{seed}.json.gz"


def read_row(path: Path, protocol_sha256: str) -> dict[str, Any]:
    """The content of a row's file (see `reproduce.run_row`); UserError if another protocol made it."""
    row = json.loads(gzip.decompress(path.read_bytes()))
    if row["protocol"] != protocol_sha256:
        raise UserError(f"{path} was made under another protocol.json: delete it and run its row again.")
    return row


# ---------------------------------------------------------------- Student's t, a change and its interval


def t_tail(t: float, df: float) -> float:
    """P(|T| > t) under Student's distribution with df ≥ 1 degrees of freedom.

    With T = √df · tan θ, the density of θ is cos^(df − 1) θ up to a constant: the midpoint rule.

    >>> round(t_tail(1.0, 1.0), 6)  # Cauchy: 1 − 2/π · atan t
    0.5
    """
    angles = math.atan(abs(t) / math.sqrt(df)) * (np.arange(2000) + 0.5) / 2000  # [2000]
    area = 2 * angles.mean() * (np.cos(angles) ** (df - 1)).mean()  # twice the mean angle is the last one
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


def contrast(after: list[list[float]], before: list[list[float]] | float = 0) -> dict[str, Any]:
    """The change of the same samples in points of 100, with its intervals and its p-value.

    after, before: a list for each of S seeds, of n samples each, paired seed by seed and sample by sample.
    A base has one run, which every seed is compared with. Without `before` it is the mean itself.
    SE² = s²(scene means) / n + s²(seed means) / S, with Satterthwaite's degrees of freedom
    df = SE⁴ / Σ part² / (number − 1).
    """
    changes = 100 * (np.array(after) - np.array(before))  # [S, n]
    means = [m for m in (changes.mean(0), changes.mean(1)) if len(m) > 1]  # of each sample [n], each seed [S]
    parts = [(float(m.var(ddof=1)) / len(m), len(m) - 1) for m in means]
    variance, change = sum(part for part, _ in parts), float(changes.mean())
    error = math.sqrt(variance)
    # Equal changes everywhere have no variance: the interval is a point.
    df = variance**2 / sum(part**2 / number for part, number in parts) if error else 1.0
    entry: dict[str, Any] = {"change": change, "error": error, "df": df, "n": changes.shape[1]}
    for tail, name in ((0.05, "95"), (0.1, "90")):
        half = t_quantile(tail, df) * error
        entry[name] = [change - half, change + half]
    p = t_tail(change / error, df) if error else float(change == 0)
    return entry | {"p": p, "seeds": changes.mean(1).tolist()}


# ---------------------------------------------------------------- verdicts


def samples_of(runs: list[dict], metric: str, sizes: list[str]) -> list[list[float]]:
    """The samples of a row for each seed: those of the metric on objects of these sizes."""
    return [[v for size in sizes for v in run["samples"][f"{metric}_{size}"]] for run in runs]


def estimate(claim: dict[str, Any], rows: dict[str, list[dict]]) -> dict[str, Any]:
    """The change of a claim on one base, and the KL of both its rows; rows: those of the base."""
    row, other, metric = rows[claim["row"]], rows[claim["other"]], claim["metric"]
    after = samples_of(row, metric, claim["sizes"])
    before = samples_of(other, claim.get("other_metric", metric), claim["sizes"])
    return contrast(after, before) | {"kl": [mean(run["kl"]["all"] for run in runs) for runs in (row, other)]}


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values: the k-th smallest of m times m − k + 1, and never below one before it.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    scaled = [(p, (len(p_values) - k) * p) for k, p in enumerate(sorted(p_values))]
    return [min(1.0, max(product for p, product in scaled if p <= own)) for own in p_values]


def verdict(estimates: list[dict[str, Any]], adjusted_p: float, margin: float) -> str:
    """The rules of protocol.json; estimates: one for each base."""
    if adjusted_p < 0.05:
        return "holds" if estimates[0]["change"] > 0 else "opposite"
    is_small = all(-margin < entry["90"][0] and entry["90"][1] < margin for entry in estimates)
    return "no difference" if is_small else "undecided"


def judge(protocol: dict[str, Any], rows: Rows) -> list[dict[str, Any]]:
    """Every claim with its change on each base, its adjusted p-value and its verdict."""
    claims, p_values = [], []
    for claim in protocol["claims"]:
        by_base = {base: estimate(claim, rows[base]) for base in rows}
        claims.append(claim | {"bases": by_base})
        # That all bases change in one direction is as unlikely as the least clear of them.
        one_direction = len({entry["change"] > 0 for entry in by_base.values()}) == 1
        p_values.append(max(entry["p"] for entry in by_base.values()) if one_direction else 1.0)
    for claim, p in zip(claims, holm(p_values), strict=True):
        claim |= {"p": p, "verdict": verdict([*claim["bases"].values()], p, protocol["margin"])}
    return claims + [claim | {"verdict": "not testable"} for claim in protocol["not_testable"]]


# ---------------------------------------------------------------- RESULTS.json


def row_figures(runs: list[dict]) -> dict[str, list[float]]:
    """What RESULTS.json records of a row on one base, a number for each seed: its samples in points, its KL.

    Also the mean IoU reward in the first and the last 20 steps (Fig. 9).
    """
    figures = {name: [100 * mean(run["samples"][name]) for run in runs] for name in runs[0]["samples"]}
    figures |= {f"kl_{task}": [run["kl"][task] for run in runs] for task in runs[0]["kl"]}
    for name, part in (("first", slice(20)), ("last", slice(-20, None))):
        figures[f"reward_{name}"] = [100 * mean(run["curve"][part]) for run in runs if run["curve"]]
    return figures | {"seconds": [run["seconds"] for run in runs]}


def twin_figures(runs: list[dict]) -> dict[str, list[dict]]:
    """Shares of TWIN_TESTS on held-out twins: those of all seeds together, then of each."""
    hits = {test: samples_of(runs, f"twins_{test}", ["tiny", "small"]) for test in TWIN_TESTS}
    return {test: [contrast(part), *(contrast([of_seed]) for of_seed in part)] for test, part in hits.items()}


def collect(folder: Path) -> dict[str, Any]:
    """The content of RESULTS.json, from protocol.json and samples/ in a folder and from the attempts.

    Numbers have four decimal places.
    """
    protocol, protocol_sha256 = read_json(folder / "protocol.json"), sha256(folder / "protocol.json")
    rows: Rows = {}
    for base, name, seed in plan(protocol):
        row = read_row(sample_file(folder, base, name, seed), protocol_sha256)
        rows.setdefault(base, {}).setdefault(name, []).append(row)
    results = {"protocol_sha256": protocol_sha256, "protocol": protocol}
    results |= {"attempts": read_lines(ATTEMPTS), "claims": judge(protocol, rows)}
    results |= {"rows": {}, "twins": {}, "versions": rows["A"][BASE][0]["versions"]}
    for base, by_row in rows.items():
        results["rows"][base] = {name: row_figures(runs) for name, runs in by_row.items()}
        with_twins = [name for name in by_row if protocol["rows"][name].get("twins")]
        results["twins"][base] = {name: twin_figures(by_row[name]) for name in with_twins}
    return json.loads(json.dumps(results), parse_float=lambda digits: round(float(digits), 4))


# ---------------------------------------------------------------- does RESULTS.md say the same?


def change_cell(entry: dict[str, Any], sign: str = "+") -> str:
    """A change (without its sign: a share) with its 95 % interval, as in RESULTS.md."""
    low, high = entry["95"]
    return f"{entry['change']:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def claim_row(claim: dict[str, Any], protocol: dict[str, Any]) -> str:
    """A claim as a line of the table of verdicts: title, change on each base, p, KL, verdict, paper.

    A "!" follows the KL of both rows on a base where they differ by more than the protocol's factor.
    """
    cells, p, pairs = ["–"] * len(protocol["bases"]), "–", []
    if "bases" in claim:
        cells, p = [change_cell(entry) for entry in claim["bases"].values()], f"{claim['p']:.3f}"
        for kl in (entry["kl"] for entry in claim["bases"].values()):
            matched = claim["other"] == BASE or max(kl) <= protocol["kl_factor"] * min(kl)
            pairs.append(f"{kl[0]:.3f}, {kl[1]:.3f}" + " !" * (not matched))
    cells = [claim["title"], *cells, p, "; ".join(pairs) or "–", f"**{claim['verdict']}**", claim["paper"]]
    return f"| {' | '.join(cells)} |"


def check(folder: Path) -> str:
    """Where RESULTS.json or RESULTS.md says otherwise than the samples, as one sentence; "" if nowhere."""
    results, stored = collect(folder), read_json(folder / "RESULTS.json")
    lines = (folder / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    for claim in results["claims"]:
        if claim_row(claim, results["protocol"]) not in lines:
            return f"RESULTS.md has another line for {claim['title']!r} than the samples give."
    parts = [part for part, content in results.items() if content != stored.get(part)]
    return f"RESULTS.json has other {parts[0]} than the samples give." if parts else ""


def folder_flag(description: str) -> Path:
    """The folder that the command line names, by default paper/."""
    parser = FlagParser(description=description)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE, help="with protocol.json and samples/")
    return parser.parse_args().folder


def main() -> None:
    folder = folder_flag(__doc__)
    with exit_on_error("run python -m paper.reproduce first"):
        if problem := check(folder):
            raise SystemExit(f"{problem} To write both again: python -m paper.report")
        print(f"{folder / 'RESULTS.md'} says what the samples give.")


if __name__ == "__main__":
    main()
