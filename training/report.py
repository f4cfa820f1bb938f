"""report.html of a run: settings, curve, scores, images and groups of completions on one page.

The page is report.html in this folder, with a name after a dollar sign for each field. It loads nothing: its
images are inside it. All text is escaped, because a model may write anything.
"""

import base64
import io
import json
from html import escape
from pathlib import Path
from string import Template

from data import Cues
from evaluation.scores import ROWS
from files.disk import read_lines
from files.errors import UserError
from training.experiment import open_run_cues
from training.learning import draw_run
from training.pictures import draw_numbered_boxes, line_name
from training.run_folder import UNREADABLE, first_change
from training.settings import Config, flag_of, stored_flags

# Field of the page: the files that it shows.
IMAGES = {"curve": "curve.png", "learning": "learning.gif", "cues": "before_after.png"}
IMAGES["attention"] = "*/attention.png"


def embed(content: bytes, kind: str) -> str:
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def missing(name: str) -> str:
    return f"<p>There is no {name} in the run folder: see docs/fault_tolerance.md for what writes it.</p>"


def html_table(rows: list[tuple]) -> str:
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def settings_table(config: dict) -> str:
    """Every setting with its value and where it comes from: first those that flags or a preset have set."""
    origin = config["origin"]
    names = sorted(origin, key=lambda name: origin[name] in ("default", "model family"))
    rows = [(flag_of(name), config[name], origin[name]) for name in names]
    return html_table(rows + [(name, version, "version") for name, version in config["versions"].items()])


def scores_table(results: dict) -> str:
    """The main score of each task in points of 100, and its change with the standard error."""
    rows, titles = [("held-out", "n", "before", "after", "change")], {name: row for row, name in ROWS.items()}
    for task in (task for task in results["before"] if task in results["change"]):
        key, part = "mean_iou" if task in ("cue", "find") else "accuracy", results["change"][task]
        points = [f"{100 * results[when][task][key]:.1f}" for when in ("before", "after")]
        change = f"{100 * part['change']:+.1f} ± {100 * part['standard_error']:.1f}"
        rows.append((titles[task], part["n"], *points, change))
    return html_table(rows)


def group_section(line: dict, cues: Cues | None) -> str:
    """A group of completions.jsonl, the best completion first, with its image if there are cues."""
    ranked, image, items = sorted(line["completions"], key=lambda row: -row["advantage"]), "", []
    if cues is not None:
        boxes, file = [(line_name(row["advantage"]), row["box"]) for row in ranked], io.BytesIO()
        draw_numbered_boxes(cues[line["cue"]], boxes, 480).save(file, "JPEG", quality=88, subsampling=0)
        image = embed(file.getvalue(), "jpeg")
    for row in ranked:
        values = "advantage {advantage:+.2f}, reward {total:.2f} (IoU {iou:.2f}, format {format:.0f})"
        style = "better" if row["advantage"] > 0 else ""
        items.append(f'<li class="{style}">{values.format(**row)}<pre>{escape(row["text"])}</pre></li>')
    texts = f"<h3>Step {line['step']}</h3><ol>{''.join(items)}</ol>"
    return f'<section id="step-{line["step"]}">{image}<article>{texts}</article></section>'


def page(folder: Path) -> str:
    """The page of a run folder; draws its curve.png and learning.gif again.

    Where the data of the run is missing or has changed, the page has no image of a cue.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    problem, results = "", folder / "results.json"
    try:
        cues, heldout_cues, files = open_run_cues(Config(**stored_flags(config)))
        if change := first_change((folder / "inputs.json").read_text(encoding="utf-8"), files):
            raise UserError(f"The data is not that of the run{change}: put it back.")
    except UserError as error:
        cues, heldout_cues = None, None
        problem = f"<p>Images are left out. {escape(str(error))}</p>"
    draw_run(folder, heldout_cues)
    parts = {"name": escape(folder.resolve().name), "settings": settings_table(config)}
    steps = len(read_lines(folder / "metrics.jsonl"))
    summary = f"{steps} of {config['steps']} steps of {config['task']}: {config['model']} on {config['data']}"
    scores = scores_table(json.loads(results.read_bytes())) if results.exists() else missing(results.name)
    parts |= {"summary": escape(summary), "scores": scores}
    for name, pattern in IMAGES.items():
        found = [embed(path.read_bytes(), path.suffix[1:]) for path in sorted(folder.glob(pattern))]
        parts[name] = "".join(found) or missing(pattern)
    groups = [group_section(line, cues) for line in read_lines(folder / "completions.jsonl")]
    parts["groups"] = problem + ("".join(groups) or missing("completions.jsonl"))
    return Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(parts)


def write_report(folder: Path) -> None:
    """Writes report.html into a run folder; UserError for a damaged file in it."""
    try:
        (folder / "report.html").write_text(page(folder), encoding="utf-8")
    except UNREADABLE as error:
        reason = f"{folder} holds a file that no run writes ({error!r:.99})"
        raise UserError(f"{reason}: give the folder of another run.") from None
    print(f"The report is {folder / 'report.html'}")
