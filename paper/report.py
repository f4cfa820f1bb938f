"""RESULTS.md and its pictures, from nothing but RESULTS.json (which paper/reproduce.py writes).

    python -m paper.report       writes both again

What RESULTS.md says around its figures, and the paper's own figures, stand in report_template.md; a name in
braces there is a field of `markdown`. What we think a verdict's reason is stands in claims.json.
The pictures need matplotlib, which is none of the seven packages: pip install -r notebooks/requirements.txt
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import stdev
from typing import Any

from evaluation.attention import BANDS
from evaluation.scores import mean
from files.errors import exit_on_error
from paper.claims import CLAIMS, COLUMNS, read_json

HERE = Path(__file__).parent
NOTICE = "<!-- written by paper/report.py from RESULTS.json: change that, not this -->"
BOX_COLUMNS = ("cue search", "acc50", "acc75")  # Table 10's
LINE_STYLES = {"base": "k:", "LOCUS": "k-", "text cue": "k--", "large crops": "k-."}

# ---------------------------------------------------------------- text


def figure(values: list[float]) -> str:
    """Mean ± standard error over the seeds."""
    if len(values) < 2:
        return f"{mean(values):.1f}"
    return f"{mean(values):.1f} ± {stdev(values) / math.sqrt(len(values)):.1f}"


def cells(values: Iterable[float | list[float]]) -> str:
    """Cells of a table: a number as it is, a list of one number a seed as `figure` writes it."""
    return " | ".join(figure(value if isinstance(value, list) else [value]) for value in values)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    top, *lines = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([top, "|---" * len(header) + "|", *lines])


def claim_row(claim: dict[str, Any]) -> list[str]:
    """A claim as a row of the table of verdicts."""
    best_control = f" ({claim['other']})" if "control" in claim["title"] else ""
    verdict = f"**{claim['verdict']}**"
    if claim["untestable"]:
        verdict = f"not testable here (by the rule: {claim['verdict']})"
    return [
        claim["title"] + best_control,
        f"{claim['change']:+.1f}",
        f"{claim['low']:+.1f} to {claim['high']:+.1f}",
        ", ".join(f"{change:+.1f}" for change in claim["seeds"]),
        verdict,
        claim["paper"],
    ]


def reason_list(claims: list[dict[str, Any]]) -> str:
    """What this world lacks to tell, and what we think the reason of a verdict is, where there is either."""
    reasons = {claim.title: claim.reasons for claim in CLAIMS}
    lines = []
    for claim in claims:
        lack = f"Not testable here: {claim['untestable']}." if claim["untestable"] else ""
        sentences = [lack, reasons[claim["title"]].get(claim["verdict"], "")]
        if any(sentences):
            lines.append(" ".join([f"- *{claim['title']}.*", *filter(None, sentences)]))
    return "\n".join(lines)


def curve_table(curve: dict[str, list[float]]) -> str:
    """Rewards in a sixteenth of the run: at its beginning, after a quarter, after a half, and at its end."""
    steps = len(curve["iou"])
    length = max(1, steps // 16)
    parts = [slice(start, start + length) for start in (0, steps // 4, steps // 2, steps - length)]
    header = ["steps", *(f"{part.start} to {part.stop - 1}" for part in parts)]
    rows = ([key, *(f"{mean(curve[key][part]):.3f}" for part in parts)] for key in ("iou", "format"))
    return table(header, rows)


def markdown(results: dict[str, Any]) -> str:
    """RESULTS.md, from nothing but the content of RESULTS.json."""
    rows, claims, settings = results["rows"], results["claims"], results["settings"]
    looked_at = {name: row for name, row in rows.items() if "aib" in row}
    fields = {
        "notice": NOTICE,
        "claims": {claim["title"]: claim for claim in claims},
        "settings": settings,
        "cues": settings["n"] // 2,
        "seeds": ", ".join(map(str, rows["LOCUS"]["seeds"])),
        "hours": sum(sum(row["seconds"]) for row in rows.values()) / 3600,
        "verdicts": table(
            ["claim", "change here", "95 %", "by seed", "verdict", "paper"], map(claim_row, claims)
        ),
        "reasons": reason_list(claims),
        "columns": " | ".join(COLUMNS),
        "scores": {name: cells(row[column] for column in COLUMNS) for name, row in rows.items()},
        "boxes": {name: cells(row[column] for column in BOX_COLUMNS) for name, row in rows.items()},
        "curve": curve_table(rows["LOCUS"]["curve"]),
        "suppression": {part: cells(pair) for part, pair in rows["base"]["suppression"].items()},
        "grounding": {name: cells(row["grounding"].values()) for name, row in looked_at.items()},
        "attention": {
            name: cells([row["aib"], row["peak"], *row["aib by layer"]]) for name, row in looked_at.items()
        },
        "world": table(
            ["", ""], ([question, cells([value])] for question, value in results["world"].items())
        ),
    }
    return (HERE / "report_template.md").read_text(encoding="utf-8").format_map(fields)


# ---------------------------------------------------------------- pictures


@contextmanager
def picture(
    path: Path, size: tuple[float, float] = (6, 3.2), legend: str = "best", **labels: Any
) -> Iterator[Any]:
    """Axes to draw on; at the end, with labels and a legend, a PNG."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=size)
    axes = canvas.subplots()
    yield axes
    axes.set(**labels)
    axes.legend(loc=legend)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110, bbox_inches="tight")


def draw_curve(rows: dict[str, dict], folder: Path) -> None:
    """Figure 9: the rewards step by step."""
    with picture(folder / "curve.png", xlabel="step", ylabel="reward", ylim=(0, 1.05)) as axes:
        for key, style in (("iou", "k-"), ("format", "k--")):
            values = rows["LOCUS"]["curve"][key]
            smooth = [mean(values[max(0, step - 9) : step + 1]) for step in range(len(values))]
            axes.plot(smooth, style, label=f"{key}, mean of the last 10 steps")


def draw_grounding(rows: dict[str, dict], folder: Path) -> None:
    """Figure 2: right answers by how well the evidence was found."""
    labels = {"xticks": range(3), "xticklabels": BANDS, "ylabel": "right answers, %", "ylim": (0, 110)}
    with picture(folder / "grounding.png", legend="lower right", **labels) as axes:
        for name, shift, hatch, color in (("base", -0.2, "//", "0.85"), ("LOCUS", 0.2, "", "0.45")):
            places = [index + shift for index in range(3)]
            values = [rows[name]["grounding"][band] for band in BANDS]
            bars = axes.bar(places, values, 0.38, label=name, color=color, hatch=hatch, edgecolor="k")
            axes.bar_label(bars, fmt="%.0f")


def draw_attention(rows: dict[str, dict], folder: Path) -> None:
    """Figure 4: how much of the attention is in the box, layer by layer."""
    layers = range(1, 1 + len(rows["base"]["aib by layer"]))
    labels = {"xlabel": "layer", "ylabel": "Attention-in-Box, %", "xticks": layers}
    with picture(folder / "attention.png", **labels) as axes:
        for name, style in LINE_STYLES.items():
            axes.plot(layers, rows[name]["aib by layer"], style, marker="o", label=name)


def draw_rows(rows: dict[str, dict], folder: Path) -> None:
    """Every row's accuracy on full images, seed by seed and on average."""
    names = [name for name in reversed(rows) if name != "base"]
    labels = {
        "yticks": range(len(names)),
        "yticklabels": names,
        "xlabel": "questions on full images, % right",
    }
    with picture(folder / "rows.png", (7, 0.28 * len(names) + 0.8), **labels) as axes:
        for height, name in enumerate(names):
            values = rows[name]["questions"]
            axes.plot(values, [height] * len(values), "o", color="0.6")
            axes.plot(mean(values), height, "kD")
        axes.axvline(mean(rows["base"]["questions"]), color="k", linestyle=":", label="base")


def draw(results: dict[str, Any], folder: Path) -> None:
    """The figures as PNG, legible in black and white."""
    for draw_figure in (draw_curve, draw_grounding, draw_attention, draw_rows):
        draw_figure(results["rows"], folder)


def write(folder: Path) -> None:
    """RESULTS.md and, with matplotlib, figures/*.png from the RESULTS.json in a folder."""
    results = read_json(folder / "RESULTS.json")
    (folder / "RESULTS.md").write_text(markdown(results), encoding="utf-8")
    print(f"{folder / 'RESULTS.md'} is written")
    try:
        draw(results, folder / "figures")
    except ImportError:
        remedy = "pip install -r notebooks/requirements.txt, then python -m paper.report"
        print(f"The pictures need matplotlib: {remedy}")


if __name__ == "__main__":
    with exit_on_error("run python -m paper.reproduce first"):
        write(HERE)
