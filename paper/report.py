"""RESULTS.md and its pictures, from nothing but RESULTS.json (which paper/reproduce.py writes).

    python -m paper.report       both anew

The pictures need matplotlib, which is none of the seven packages: pip install -r notebooks/requirements.txt
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.attention import BANDS
from evaluation.scores import mean
from paper.claims import INFORMED, POINTLESS, SHOWN, collect
from training.run_folder import write_json

TABLES = {  # heading: (rows, the paper's columns, the paper's figures of each row)
    "Table 4: imitation or reward": (
        ("base", "SFT", "LOCUS"),
        ("V\\*", "HR-8K"),
        ("79.6 | 63.4", "80.1 | 65.8", "87.4 | 68.5"),
    ),
    "Table 5: text or visual cue": (
        ("text cue", "LOCUS"),
        ("V\\*", "HR-8K"),
        ("83.8 | 67.0", "87.4 | 68.5"),
    ),
    "Table 6: how large the cues are": (
        ("large crops", *(f"tiny:small {share}" for share in ("60:40", "70:30", "80:20", "90:10", "100:0"))),
        ("V\\*", "HR-8K", "RefCOCO"),
        (
            "81.2 | 66.4 | 87.2",
            "85.9 | 66.8 | 86.2",
            "87.4 | 68.5 | 86.5",
            "86.9 | 68.1 | 86.3",
            "87.4 | 67.4 | 86.1",
            "86.9 | 67.0 | 74.4",
        ),
    ),
    "Table 7: what the crops show": (
        ("random crop", "LOCUS"),
        ("V\\*", "HR-8K"),
        ("81.2 | 65.9", "87.4 | 68.5"),
    ),
    "Controls: what the same steps give without LOCUS's signal": (("base", *POINTLESS, "LOCUS"), (), ()),
    "Other ways to use answers or boxes": (("LOCUS", *INFORMED), (), ()),
    "What a teacher wants to turn": (
        ("LOCUS", "KL 0", "KL 0.01", "KL 0.16", "G = 2", "G = 4", "G = 16", "LoRA rank 4", "LoRA rank 64",
         "all weights, lr 1e-4", "SFT, a third of the rate"),
        (),
        (),
    ),
}  # fmt: skip
NOTES = {  # (claim, verdict): what we think the reason is, and the experiment that would tell
    ("RL over SFT", "no difference"): (
        "The thought that is imitated here is exact, the thing's name, and every token of it is right, "
        "where the paper's is a teacher's prose; SFT even ends with the better cue search, and LOCUS "
        "pays a KL that imitation goes without. Telling: both at KL 0 with three seeds, and SFT on "
        "empty, vague and wrong thoughts. (SFT on the best of G does as well on questions, less well "
        "on finding by text.)"
    ),
    ("visual over text cue", "same direction"): (
        "As it is, the text cue gives more to places and nothing to attributes, whose questions never "
        "name a thing in full. Telling: scenes with twins, for which tiny/ must be built anew."
    ),
    ("small over large crops", "same direction"): (
        "Far more than in the paper, and we think for another reason: a window of 10 to 30 % shows "
        "several things, which the base never saw in a crop, and what can be learned without reading "
        "it, large boxes, spoils the box that the base writes into its thought before it answers about "
        "places. Telling: a base that was built with such crops."
    ),
    ("mixture over tiny only", "no difference"): (
        "Things of 14 to 18 and of 20 to 42 pixels ask for the same skill, and nothing collapses as "
        "RefCOCO does in the paper. Telling: a world with questions about things of 5 to 30 % of the "
        "picture."
    ),
    ("object over random crop", "same direction"): (
        "Random windows are drawn until they show at least 5 % of some thing: a piece of plain "
        "background could be from anywhere."
    ),
    ("Attention-in-Box rises", "same direction"): (
        "A small rise: the base's highest attention is on the evidence already in nine of ten "
        "questions, so in this model it can hardly be the looking alone that fails in a crowd. "
        "Telling: the same by right and wrong answers."
    ),
    ("the same over the best pointless control: both", "same direction"): (
        "Labels do more than LOCUS, as they should: see GRPO on the questions and pretraining on scenes "
        "of 1 to 4 things, where the answers that LOCUS never sees are given."
    ),
}


def figure(values: list[float]) -> str:
    """Mean ± standard error over the seeds."""
    middle = mean(values)
    if len(values) < 2:
        return f"{middle:.1f}"
    error = math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{middle:.1f} ± {error:.1f}"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def claim_lines(claims: list[dict]) -> list[str]:
    lines = [line("claim", "change here", "95 %", "by seed", "verdict", "paper"), "|---" * 6 + "|"]
    for c in claims:
        title = c["title"] + (f" ({c['other']})" if "control" in c["title"] else "")
        said = (
            f"not testable here (by the rule: {c['verdict']})" if c["untestable"] else f"**{c['verdict']}**"
        )
        seeds = ", ".join(f"{s:+.1f}" for s in c["seeds"])
        lines.append(
            line(
                title, f"{c['change']:+.1f}", f"{c['low']:+.1f} to {c['high']:+.1f}", seeds, said, c["paper"]
            )
        )
    return lines


def table_lines(
    rows: dict[str, dict], names: Sequence[str], columns: Sequence[str], paper: Sequence[str]
) -> list[str]:
    """A table of rows that were run; beside them the paper's figures."""
    lines = [
        line("", *SHOWN, *(f"paper: {c}" for c in columns)),
        "|---" * (1 + len(SHOWN) + len(columns)) + "|",
    ]
    for i, name in enumerate(names):
        row = rows.get("LOCUS" if name == "tiny:small 70:30" else name)
        if row is not None:
            shown = f"**{name}**" if row is rows.get("LOCUS") else name
            lines.append(line(shown, *(figure(row[c]) for c in SHOWN), *paper[i : i + 1]))
    return lines


def markdown(results: dict[str, Any]) -> str:
    """RESULTS.md, from nothing but the content of RESULTS.json."""
    rows, claims, s = results["rows"], {c["title"]: c for c in results["claims"]}, results["settings"]
    n, seeds = s["n"], rows["LOCUS"]["seeds"]
    places, attributes = (claims[f"full-image questions rise: {kind}"] for kind in ("places", "attributes"))
    both, sft = claims["the same over the best pointless control: both"], claims["RL over SFT"]
    hours = sum(sum(row["seconds"]) for row in rows.values()) / 3600
    out = [
        "# LOCUS in miniature",
        "",
        "<!-- written by paper/report.py from RESULTS.json: change that, not this -->",
    ]
    out += [
        "",
        "Trained on cue search alone, the embedded model's accuracy on full images, without any crop, "
        f"changes by {places['change']:+.1f} points on places ({places['verdict']}) and by "
        f"{attributes['change']:+.1f} on attributes ({attributes['verdict']}) against its base, and on both "
        f"by {both['change']:+.1f} against the best pointless control, {both['other']} ({both['verdict']}). "
        f"Against imitation of the same boxes it is {sft['change']:+.1f} ({sft['verdict']}).",
        "",
        f"Every row: {s['steps']} steps of 8 prompts, then {n:,} questions about places, {n:,} about "
        f"attributes and {n // 2:,} cues on held-out scenes of 12 to 16 things (seed {s['held_out']}, which "
        f"nothing was chosen on); training seeds {', '.join(map(str, seeds))}. Figures are points of 100: "
        "accuracy, and IoU for finding and cue search; ± is the standard error over the training seeds, "
        f"where there are several. `python -m paper.reproduce` makes them: {hours:.1f} hours of one core's "
        "time, two rows at a time.",
        "",
        "The rule, written down before the run: *same direction* means that the paired 95 % interval over "
        "the held-out samples excludes 0 and all seeds share the sign, *opposite direction* the reverse, and "
        "all else is *no difference*. Claims about the base alone have one seed. The rows were fixed before "
        "the run too; the list below, which is the paper's claims, was put into code while it ran.",
        "",
        "## Verdicts",
        "",
        *claim_lines(results["claims"]),
        "",
        "![questions by row](figures/rows.png)",
        "",
    ]
    for claim in results["claims"]:
        note = NOTES.get((claim["title"], claim["verdict"]), "")
        lacks = f"Not testable here: {claim['untestable']}. " if claim["untestable"] else ""
        out += [f"- *{claim['title']}.* {lacks}{note}"] if lacks or note else []
    for heading, (names, columns, paper) in TABLES.items():
        out += ["", f"## {heading}", "", *table_lines(rows, names, columns, paper)]
    return "\n".join([*out, "", *analysis_lines(results), ""])


def analysis_lines(results: dict[str, Any]) -> list[str]:
    """Tables 1 and 10, Figures 2, 4 and 9, and what the world can tell."""
    rows, out = results["rows"], []
    base, locus = rows["base"], rows["LOCUS"]
    out += [
        "## Table 10: held-out cue search",
        "",
        line("", "mean IoU", "Acc@0.5", "Acc@0.75"),
        "|---" * 4 + "|",
    ]
    for name, row in (("base", base), ("LOCUS", locus)):
        out.append(line(name, *(figure(row[key]) for key in ("cue search", "acc50", "acc75"))))
    out += [line("paper, Qwen2.5-VL", "16.4 → 43.0", "16.4 → 48.8", "9.4 → 25.0")]
    curve, last = locus["curve"], len(locus["curve"]["iou"])
    spots = [
        (0, last // 16),
        (last // 4, 5 * last // 16),
        (last // 2, 9 * last // 16),
        (15 * last // 16, last),
    ]
    spots = [(a, max(a + 1, b)) for a, b in spots]
    out += ["", "## Figure 9: the training curve", "", "![training curve](figures/curve.png)", ""]
    out += [line("steps", *(f"{a} to {b - 1}" for a, b in spots)), "|---" * 5 + "|"]
    for key in ("iou", "format"):
        out.append(line(key, *(f"{mean(curve[key][a:b]):.3f}" for a, b in spots)))
    out += ["", "The paper: IoU 0.1 at first, 0.5 at step 300; format 0.88 to 1.0 within 50 steps."]
    out += [
        "",
        "## Table 1: all but the evidence black (base)",
        "",
        line("", "full", "black", "paper"),
        "|---" * 4 + "|",
    ]
    paper = {"overall": "79.6 → 85.9", "attributes": "80.0 → 84.4", "places": "79.0 → 88.2"}
    for part, (full, black) in base["suppression"].items():
        out.append(line(part, f"{full:.1f}", f"{black:.1f}", paper[part]))
    out += [
        "",
        "## Figure 2: answers by grounding",
        "",
        "![accuracy by grounding](figures/grounding.png)",
        "",
    ]
    names = list(base["grounding"])
    out += [line("", *names), "|---" * (1 + len(names)) + "|"]
    out += [line(name, *(f"{v:.1f}" for v in rows[name]["grounding"].values())) for name in ("base", "LOCUS")]
    out += [line("paper, attributes alone", "48.1", "78.1", "91.1", "50", "23")]
    out += ["", "## Figure 4: Attention-in-Box", "", "![attention by layer](figures/attention.png)", ""]
    layers = range(1, 1 + len(base["aib by layer"]))
    out += [
        line("", "mean", "peak in box", *(f"layer {i}" for i in layers), "paper"),
        "|---" * (4 + len(layers)) + "|",
    ]
    for name, theirs in {"base": "7.9", "text cue": "6.8", "large crops": "8.9", "LOCUS": "10.0"}.items():
        row = rows[name]
        by_layer = (f"{v:.1f}" for v in row["aib by layer"])
        out.append(line(name, figure(row["aib"]), figure(row["peak"]), *by_layer, theirs))
    out += ["", "## What this world can tell", "", line("", ""), "|---|---|"]
    return out + [line(what, f"{value:.1f}") for what, value in results["world"].items()]


# ---------------------------------------------------------------- pictures


def draw(results: dict[str, Any], folder: Path) -> None:
    """The figures as PNG, legible in black and white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, ways = results["rows"], dict(dpi=110, bbox_inches="tight")
    styles = {"base": "k:", "LOCUS": "k-", "text cue": "k--", "large crops": "k-."}
    folder.mkdir(parents=True, exist_ok=True)

    _, axes = plt.subplots(figsize=(6, 3.2))
    for key, style in (("iou", "k-"), ("format", "k--")):
        values = rows["LOCUS"]["curve"][key]
        smooth = [mean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
        axes.plot(smooth, style, label=f"{key}, mean of the last 10 steps")
    axes.set(xlabel="step", ylabel="reward", ylim=(0, 1.05))
    axes.legend()
    plt.savefig(folder / "curve.png", **ways)

    _, axes = plt.subplots(figsize=(6, 3.2))
    for i, (name, hatch, color) in enumerate((("base", "//", "0.85"), ("LOCUS", "", "0.45"))):
        values = [rows[name]["grounding"][band] for band in BANDS]
        bars = axes.bar(
            [b + 0.4 * i for b in range(3)], values, 0.38, label=name, color=color, hatch=hatch, edgecolor="k"
        )
        axes.bar_label(bars, fmt="%.0f")
    axes.set(xticks=[b + 0.2 for b in range(3)], xticklabels=BANDS, ylabel="right answers, %", ylim=(0, 110))
    axes.legend(loc="lower right")
    plt.savefig(folder / "grounding.png", **ways)

    _, axes = plt.subplots(figsize=(6, 3.2))
    for name, style in styles.items():
        values = rows[name]["aib by layer"]
        axes.plot(range(1, 1 + len(values)), values, style, marker="o", label=name)
    axes.set(xlabel="layer", ylabel="Attention-in-Box, %", xticks=range(1, 1 + len(values)))
    axes.legend()
    plt.savefig(folder / "attention.png", **ways)

    names = [name for name in rows if name != "base"][::-1]
    _, axes = plt.subplots(figsize=(7, 0.28 * len(names) + 0.8))
    for i, name in enumerate(names):
        axes.plot(rows[name]["questions"], [i] * len(rows[name]["questions"]), "o", color="0.6")
        axes.plot(mean(rows[name]["questions"]), i, "kD")
    axes.axvline(mean(rows["base"]["questions"]), color="k", linestyle=":", label="base")
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="questions on full images, % right")
    axes.legend()
    plt.savefig(folder / "rows.png", **ways)


def write(folder: Path, rows: dict[tuple[str, int], Path]) -> None:
    """RESULTS.json, RESULTS.md and, with matplotlib, figures/*.png in a folder."""
    write_json(folder / "RESULTS.json", collect(rows))
    again(folder)


def again(folder: Path) -> None:
    """RESULTS.md and the pictures from the RESULTS.json in a folder."""
    results = json.loads((folder / "RESULTS.json").read_text(encoding="utf-8"))
    (folder / "RESULTS.md").write_text(markdown(results), encoding="utf-8")
    print(f"{folder / 'RESULTS.md'} is written")
    try:
        draw(results, folder / "figures")
    except ImportError:
        what = "pip install -r notebooks/requirements.txt, then python -m paper.report"
        print(f"The pictures need matplotlib: {what}")


if __name__ == "__main__":
    try:
        again(Path(__file__).parent)
    except OSError as error:
        what = f"{error.filename} cannot be read or written ({error.strerror})"
        print(f"{what}: run python -m paper.reproduce first.")
        sys.exit(2)
