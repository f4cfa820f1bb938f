"""RESULTS.json, RESULTS.md and its figures, from protocol.json and samples/ (see paper/reproduce.py).

    python -m paper.report [FOLDER]       writes them again (default: in paper/)

The text around the figures is in report_template.md: a name in braces there is a field of `markdown`.
Drawing needs matplotlib, which is not one of the seven packages: pip install -r notebooks/requirements.txt
"""

from pathlib import Path
from typing import Any

from evaluation.scores import markdown_table, mean, paired
from files.disk import read_json, write_json
from files.errors import exit_on_error
from paper.verdicts import BASE, HERE, TWIN_TESTS, change_cell, claim_row, collect, folder_flag
from tiny.scenes import KINDS, SIDES

# Column of the table of rows: list of samples, or the KL.
COLUMNS = {f"{kind}, {size}": f"questions_{kind}_{size}" for kind in KINDS for size in SIDES}
COLUMNS |= {f"{task}, {size}": f"{task}_{size}" for task in ("find", "cue") for size in ("tiny", "small")}
COLUMNS |= {"IoU, first steps": "reward_first", "last steps": "reward_last", "KL": "kl_all"}

# ---------------------------------------------------------------- text


def figure(values: list[float], places: int) -> str:
    """Mean ± standard error over the seeds."""
    part = paired([0.0] * len(values), values)  # the change from 0 is the mean itself
    error = f" ± {part['standard_error']:.{places}f}" if len(values) > 1 else ""
    return f"{part['change']:.{places}f}{error}" if values else "–"


def twin_text(twins: dict[str, dict]) -> tuple[str, str]:
    """What the first paragraph says of every base, and the table of every base, row and seed."""
    sentences, lines = [], []
    for base, rows in twins.items():
        for test in ("forced", "swap"):
            before, after = (change_cell(rows[name][test][0], "") for name in (BASE, "LOCUS"))
            sentences.append(f"{TWIN_TESTS[test]} on base {base}: {before} before and {after} after")
        for name, tests in rows.items():
            for parts in zip(*(tests[test][1:] for test in TWIN_TESTS), strict=True):  # of each seed
                lines.append([base, name, f"{parts[0]['n']:,}", *(change_cell(part, "") for part in parts)])
    titles = [f"{title} (95 %)" for title in TWIN_TESTS.values()]
    header = ["base", "row, a line for each seed", "pairs", *titles]
    return "; ".join(sentences), markdown_table(header, lines)


def row_table(base: str, rows: dict[str, dict], notes: dict[str, dict]) -> str:
    """Every row on one base: what its steps get, and its figures."""
    lines = []
    for name, row in rows.items():
        cells = [figure(row[key], 3 if key == "kl_all" else 1) for key in COLUMNS.values()]
        lines.append([name, notes[name]["note"], *cells])
    return f"### Base {base}\n\n{markdown_table(['row', 'what its steps get', *COLUMNS], lines)}"


def attempt_table(attempts: list[dict[str, Any]]) -> str:
    """The lines of docs/attempts.jsonl: what was tried, and changes on tiny objects ± one standard error."""
    names, lines = [f"questions_{kind}_tiny" for kind in KINDS] + ["cue_tiny"], []
    for line in attempts:
        settings = ", ".join([line["variant"], *(f"{k} {v}" for k, v in line["settings"].items())])
        cells = ["{change:+.1f} ± {error:.1f}".format_map(line["figures"][name]) for name in names]
        cells += [f"{line['kl']:.3f}", str(line["seconds"])]
        lines.append([line["note"], line["base"][:8], settings, *cells])
    return markdown_table(["attempt", "base", "settings", *names, "KL", "seconds"], lines)


def markdown(results: dict[str, Any], full_steps: int) -> str:
    """RESULTS.md, from nothing but the content of RESULTS.json. full_steps: below them it means nothing."""
    rows, protocol, claims = results["rows"], results["protocol"], results["claims"]
    changes = [f"change on base {base} (95 %)" for base in rows]
    header = markdown_table(["claim", *changes, "p (Holm)", "KL of both rows", "verdict", "paper"], [])
    steps = f"{protocol['steps']} steps a row, not {full_steps}"
    notice = f"**This run is too short to mean anything ({steps}): its figures and verdicts are noise.**\n\n"
    fields = results | dict(zip(("twin_sentences", "twin_table"), twin_text(results["twins"])))
    fields |= {"rules": "\n".join(f"- {rule}" for rule in protocol["rules"])}
    fields |= {"verdicts": "\n".join([header, *(claim_row(claim, protocol) for claim in claims)])}
    fields |= {"reasons": "\n".join(f"- *{c['title']}.* {c['reason']}" for c in protocol["not_testable"])}
    fields |= {"tables": "\n\n".join(row_table(base, rows[base], protocol["rows"]) for base in rows)}
    fields |= {"attempt_table": attempt_table(results["attempts"])}
    fields["hours"] = sum(sum(row["seconds"]) for by_row in rows.values() for row in by_row.values()) / 3600
    template = (HERE / "report_template.md").read_text(encoding="utf-8")
    return notice * (protocol["steps"] < full_steps) + template.format_map(fields)


# ---------------------------------------------------------------- a figure, legible in black and white


def draw_rows(results: dict[str, Any], path: Path) -> None:
    """Every row's change to its base on questions about tiny objects: a column a kind, a marker a base."""
    from matplotlib.figure import Figure

    names = list(reversed(results["protocol"]["rows"]))
    columns = Figure((10, 6), layout="constrained").subplots(1, len(KINDS), sharey=True)
    for column, kind in zip(columns, KINDS, strict=True):
        column.set(title=f"{kind}, tiny objects", xlabel="change, points", yticks=range(len(names)))
        column.set_yticklabels(names)
        column.axvline(0, color="k", linestyle=":")
        for marker, (base, rows) in zip("o^", results["rows"].items()):
            means = {name: mean(row[f"questions_{kind}_tiny"]) for name, row in rows.items()}
            changes = [means[name] - means[BASE] for name in names]
            column.plot(changes, range(len(names)), f"k{marker}", fillstyle="none", label=f"base {base}")
    columns[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    columns[0].figure.savefig(path, dpi=110)


def write(folder: Path) -> None:
    """Writes RESULTS.json, RESULTS.md and, with matplotlib, figures/rows.png of a folder's samples."""
    results, full_steps = collect(folder), read_json(HERE / "protocol.json")["steps"]
    write_json(folder / "RESULTS.json", results)
    (folder / "RESULTS.md").write_text(markdown(results, full_steps), encoding="utf-8")
    print(f"The report is {folder / 'RESULTS.md'}")
    try:
        draw_rows(results, folder / "figures" / "rows.png")
    except ImportError:
        print("No figure: pip install -r notebooks/requirements.txt, then python -m paper.report")


def main() -> None:
    with exit_on_error("run python -m paper.reproduce first"):
        write(folder_flag(__doc__))


if __name__ == "__main__":
    main()
