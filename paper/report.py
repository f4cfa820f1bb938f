"""RESULTS.md and its figures, from nothing but RESULTS.json (which paper/reproduce.py writes).

    python -m paper.report       writes both again

The text around the figures, and the paper's own figures, are in report_template.md: a name in braces there is
a field of `markdown`. What we think explains a verdict is in claims.json.
Drawing needs matplotlib, which is not one of the seven packages: pip install -r notebooks/requirements.txt
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import stdev
from typing import Any

from evaluation.attention import BANDS
from evaluation.scores import mean
from files.errors import FlagParser, exit_on_error
from paper.claims import CLAIMS, COLUMNS, read_json

HERE = Path(__file__).parent
FULL_STEPS = 160  # a row; of fewer, RESULTS.md says in its first line that it means nothing
BOX_COLUMNS = ("cue search", "acc50", "acc75")  # Table 10's
LINE_STYLES = {"base": "k:", "LOCUS": "k-", "text cue": "k--", "large crops": "k-."}

# ---------------------------------------------------------------- text


def figure(values: list[float]) -> str:
    """Mean ± standard error over the seeds."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{error}"


def cells(values: Iterable[float | list[float]]) -> str:
    """Cells of a table; a list has one number a seed."""
    return " | ".join(figure(value if isinstance(value, list) else [value]) for value in values)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    top, *lines = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([top, "|---" * len(header) + "|", *lines])


def claim_row(claim: dict[str, Any]) -> list[str]:
    """A claim as a row of the table of verdicts."""
    title = claim["title"] + (f" ({claim['other']})" if "control" in claim["title"] else "")
    verdict = f"not testable here (by the rule: {claim['verdict']})"
    verdict = verdict if claim["untestable"] else f"**{claim['verdict']}**"
    seeds = ", ".join(f"{change:+.1f}" for change in claim["seeds"])
    interval = f"{claim['low']:+.1f} to {claim['high']:+.1f}"
    return [title, f"{claim['change']:+.1f}", interval, seeds, verdict, claim["paper"]]


def reason_list(claims: list[dict[str, Any]]) -> str:
    """Why a claim cannot be tested, and what we think explains its verdict, where there is either."""
    reasons, lines = {claim.title: claim.reasons for claim in CLAIMS}, []
    for claim in claims:
        untestable = f"Not testable here: {claim['untestable']}." if claim["untestable"] else ""
        reason = reasons[claim["title"]].get(claim["verdict"], "")
        if untestable or reason:
            lines.append(" ".join(filter(None, [f"- *{claim['title']}.*", untestable, reason])))
    return "\n".join(lines)


def curve_table(curve: dict[str, list[float]]) -> str:
    """Mean rewards in a sixteenth of the steps: the first, those after a quarter and a half, and the last."""
    steps = len(curve["iou"])
    length = max(1, steps // 16)
    parts = [slice(start, start + length) for start in (0, steps // 4, steps // 2, steps - length)]
    header = ["steps", *(f"{part.start} to {part.stop - 1}" for part in parts)]
    rows = ([key, *(f"{mean(curve[key][part]):.3f}" for part in parts)] for key in ("iou", "format"))
    return table(header, rows)


def too_short(settings: dict[str, Any]) -> str:
    """The first line of RESULTS.md after a run of fewer steps than the full one's; empty after a full one."""
    steps = f"{settings['steps']} steps a row instead of {FULL_STEPS}"
    note = f"**This run is too short to mean anything ({steps}): its figures and verdicts are noise.**\n\n"
    return note if settings["steps"] < FULL_STEPS else ""


def markdown(results: dict[str, Any]) -> str:
    """RESULTS.md, from nothing but the content of RESULTS.json."""
    rows, claims, settings = results["rows"], results["claims"], results["settings"]
    verdict_header = ["claim", "change here", "95 %", "by seed", "verdict", "paper"]
    attended = {name: row for name, row in rows.items() if "aib" in row}
    attention = {name: [row["aib"], row["peak"], *row["aib by layer"]] for name, row in attended.items()}
    fields = {
        "notice": "<!-- written by paper/report.py from RESULTS.json: change that, not this -->",
        "claims": {claim["title"]: claim for claim in claims},
        "settings": settings,
        "cues": settings["n"] // 2,
        "seeds": ", ".join(map(str, rows["LOCUS"]["seeds"])),
        "hours": sum(sum(row["seconds"]) for row in rows.values()) / 3600,
        "verdicts": table(verdict_header, map(claim_row, claims)),
        "reasons": reason_list(claims),
        "columns": " | ".join(COLUMNS),
        "scores": {name: cells(row[column] for column in COLUMNS) for name, row in rows.items()},
        "boxes": {name: cells(row[column] for column in BOX_COLUMNS) for name, row in rows.items()},
        "curve": curve_table(rows["LOCUS"]["curve"]),
        "suppression": {part: cells(pair) for part, pair in rows["base"]["suppression"].items()},
        "grounding": {name: cells(row["grounding"].values()) for name, row in attended.items()},
        "attention": {name: cells(values) for name, values in attention.items()},
        "world": table(["", ""], ([check, cells([share])] for check, share in results["world"].items())),
    }
    template = (HERE / "report_template.md").read_text(encoding="utf-8")
    return too_short(settings) + template.format_map(fields)


# ---------------------------------------------------------------- figures, legible in black and white


@contextmanager
def save_figure(path: Path, size: tuple = (6, 3.2), legend: str = "best", **labels: Any) -> Iterator[Any]:
    """Axes to draw on, inside the context; then they get labels and a legend, and are saved as PNG."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=size)
    axes = canvas.subplots()
    yield axes
    axes.set(**labels)
    axes.legend(loc=legend)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110, bbox_inches="tight")


def draw_curve(rows: dict[str, dict], folder: Path) -> None:
    """Figure 9: the rewards by step."""
    with save_figure(folder / "curve.png", xlabel="step", ylabel="reward", ylim=(0, 1.05)) as axes:
        for key, style in (("iou", "k-"), ("format", "k--")):
            values = rows["LOCUS"]["curve"][key]
            smooth = [mean(values[max(0, step - 9) : step + 1]) for step in range(len(values))]
            axes.plot(smooth, style, label=f"{key}, mean of the last 10 steps")


def draw_grounding(rows: dict[str, dict], folder: Path) -> None:
    """Figure 2: accuracy by how well the evidence was found."""
    labels = dict(xticks=range(3), xticklabels=BANDS, ylabel="right answers, %", ylim=(0, 110))
    with save_figure(folder / "grounding.png", legend="lower right", **labels) as axes:
        for name, shift, hatch, color in (("base", -0.2, "//", "0.85"), ("LOCUS", 0.2, "", "0.45")):
            x, heights = [index + shift for index in range(3)], [rows[name]["grounding"][b] for b in BANDS]
            bars = axes.bar(x, heights, 0.38, label=name, color=color, hatch=hatch, edgecolor="k")
            axes.bar_label(bars, fmt="%.0f")


def draw_attention(rows: dict[str, dict], folder: Path) -> None:
    """Figure 4: the share of the attention that is in the box, by layer."""
    layers = range(1, 1 + len(rows["base"]["aib by layer"]))
    labels = dict(xlabel="layer", ylabel="Attention-in-Box, %", xticks=layers)
    with save_figure(folder / "attention.png", **labels) as axes:
        for name, style in LINE_STYLES.items():
            axes.plot(layers, rows[name]["aib by layer"], style, marker="o", label=name)


def draw_rows(rows: dict[str, dict], folder: Path) -> None:
    """Every row's accuracy on full images: each seed (grey), and their mean (black)."""
    names = [name for name in reversed(rows) if name != "base"]
    labels = dict(yticks=range(len(names)), yticklabels=names, xlabel="questions on full images, % right")
    with save_figure(folder / "rows.png", (7, 0.28 * len(names) + 0.8), **labels) as axes:
        for height, name in enumerate(names):
            values = rows[name]["questions"]
            axes.plot(values, [height] * len(values), "o", color="0.6")
            axes.plot(mean(values), height, "kD")
        axes.axvline(mean(rows["base"]["questions"]), color="k", linestyle=":", label="base")


def write(folder: Path) -> None:
    """Writes RESULTS.md and, with matplotlib, figures/*.png from the RESULTS.json in a folder."""
    results = read_json(folder / "RESULTS.json")
    (folder / "RESULTS.md").write_text(markdown(results), encoding="utf-8")
    print(f"The report is {folder / 'RESULTS.md'}")
    try:
        for draw in (draw_curve, draw_grounding, draw_attention, draw_rows):
            draw(results["rows"], folder / "figures")
    except ImportError:
        print("No figures: pip install -r notebooks/requirements.txt, then python -m paper.report")


def main() -> None:
    FlagParser(description=__doc__).parse_args()
    with exit_on_error("run python -m paper.reproduce first"):
        write(HERE)


if __name__ == "__main__":
    main()
