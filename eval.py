"""Before and after: what a model finds, answers and looks at, on pictures that it was not trained on.

    python eval.py scenes [--adapter runs/NAME/adapter]              every table, on the embedded world
    python eval.py cues --data coco --annotations FILE --images DIR  cue search on held-out photos
    python eval.py vstar --data FOLDER --model … --adapter …         a published benchmark (evaluation/)
    python eval.py ask IMAGE QUESTION [--adapter …]                  both answers, and where each model looks

With an adapter, base and adapted model answer the same prompts in one load: the adapter is off, then on. What
was answered stands in answers.jsonl, batch by batch, so a run that was killed goes on where it stopped.
"""

import argparse
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from files.errors import FlagParser, UserError, exit_on_error, model_folder, require_file
from training.settings import FRAMES, SOURCES


def read_flags() -> argparse.Namespace:
    """What the command line asks for; UserError for a value or a combination that makes no sense."""
    from evaluation.benchmarks import BENCHMARKS

    parser, tasks = FlagParser(description=__doc__), ("scenes", "cues", "ask", *BENCHMARKS)
    parser.add_argument("task", choices=tasks, metavar="TASK", help=", ".join(tasks))
    parser.add_argument("image", type=Path, nargs="?", help="of ask")
    parser.add_argument("question", nargs="?", help="of ask")
    parser.add_argument("--model", default="tiny", help="tiny, a model folder or a hub id")
    parser.add_argument("--adapter", type=Path, help="adapter folder of a run: scores before and after")
    four = "default where CUDA is"
    parser.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, help=four)
    parser.add_argument("--box-frame", choices=FRAMES, help="of the model's boxes")
    parser.add_argument("--data", help="of cues: coco or a folder; of a benchmark: its file or folder")
    for name in ("annotations", "images", "exclude"):
        parser.add_argument(f"--{name}", type=Path, help="of COCO, as for training")
    parser.add_argument("--source", choices=SOURCES[:3], default="object", help="of cues, as for training")
    parser.add_argument("--n", type=int, help="samples (default scenes 1000, cues 500, a benchmark: all)")
    seed = "of the held-out scenes; training measures on 0's"
    parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--max-new-tokens", type=int, help="longest answer")
    parser.add_argument("--batch", type=int, help="prompts at a time (default 128 on the CPU, 4 on a GPU)")
    parser.add_argument("--out", type=Path, help="folder of results; default one beside the adapter")
    args = parser.parse_args()
    for name in ("n", "max_new_tokens", "batch"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} cannot be: give 1 or more.")
    if args.task == "ask" and args.question is None:
        raise UserError('eval.py ask needs a picture and a question: eval.py ask photo.jpg "What is this?"')
    if args.task not in ("scenes", "ask") and args.data is None:
        raise UserError(f"eval.py {args.task} needs --data: what to measure on.")
    require_file("The picture", args.image)
    for name in ("adapter", "annotations", "images", "exclude"):
        require_file(f"--{name}", getattr(args, name), folder=name in ("adapter", "images"))
    if args.data not in ("coco", "scenes", None):
        require_file("--data", Path(args.data))
    model_folder(args.model)
    return args


if __name__ == "__main__":  # --help, a wrong flag and a missing file answer before torch takes its seconds
    with exit_on_error():
        read_flags()

import torch

from data import CueConfig, SceneCues, open_cues
from evaluation.attention import (
    BANDS,
    add_grounding,
    add_looking,
    attention_maps,
    begin_answer,
    box_ious,
    look,
)
from evaluation.heldout import Made, baselines, evaluate, held_out
from evaluation.scores import ROWS, Scores, compare, paired, table
from evaluation.session import Run, open_run
from files.disk import write_json
from files.pictures import Unfit, load_image
from models import load_adapter, load_policy
from prompts import PROMPTS, Encoded, Tools, encode, prompt_text
from tiny.scenes import Question, keep_only, render
from training.pictures import draw_cues, draw_looking

TABLE = {
    "right, asked directly": "direct",
    "right, asked to think": "think",
    "right, suppressed": "black",
} | ROWS
TABLE |= {f"answers at base's {band}": band for band in BANDS}
TABLE |= {"found (IoU ≥ 0.5)": "found", "found but misread": "misread", "not found and wrong": "not found"}
TABLE |= {"Attention-in-Box": "aib", "  by chance": "chance", "Peak-in-Box": "peak"}


def heat_map(run: Run, titles: list, images: list, items: list, boxes: list) -> None:
    """Where each model looks, base beside adapted, as attention.png."""
    maps = []
    try:
        for _, switch in run.sides:
            with switch():
                maps.append([attention_maps(run.policy, [item])[0].mean(0) for item in items])
    except torch.OutOfMemoryError:
        print("The memory is too small for attention.png: give a smaller picture.", file=sys.stderr)
        return
    draw_looking(list(zip(titles, images, boxes, zip(*maps), strict=True)), run.folder / "attention.png")


# ---------------------------------------------------------------- the embedded world


def beginning(question: Question) -> str:
    """What the embedded model writes before the first token of its answer that hangs on the evidence."""
    color, shape = question.name.split()
    given = {"What shape": color, "What color": shape}.get(question.text[:10], f"{question.name}[")
    return f"<think> {given}"


def scenes_task(run: Run) -> dict[str, Any]:
    """Cue search, finding, questions, suppression, grounding and attention on scenes."""
    policy, tools = run.policy, run.policy.tools
    held = held_out(policy, SceneCues(CueConfig(), "heldout", run.args.seed), run.args.n or 1000)
    asked, boxes = [q for _, q in held.asked], [[q.box] for _, q in held.asked]
    finds, begun = [], []
    for item, q in zip(held.question_items, asked, strict=True):
        finds.append(encode(tools, prompt_text(tools.family, "text", text=q.name), item.pictures[0]))
        begun.append(begin_answer(tools, item, beginning(q)))
    scored, results, (longest, batch) = [], {}, run.ways()
    for side, switch in run.sides:
        with switch():
            scored.append(scores := evaluate(policy, held, longest, side, run.known, batch))
            ious = box_ious(run.ask(f"{side}/grounding", finds), [b for (b,) in boxes])
            add_grounding(scores, ious, scores.samples["questions"], scored[0])
            add_looking(scores, look(policy, run.known, f"{side}/looks", begun, boxes, batch))
        results[side] = scores.summary
    draw_cues(held.cues, *([s.boxes for s in scored] + [None])[:2], run.folder / "before_after.png")
    images = [render(scene) for scene, _ in held.asked[:4]]
    heat_map(run, [q.text for q in asked[:4]], images, begun[:4], boxes[:4])
    with policy.reference():
        results["baselines"] = baselines(policy, held, longest, run.known)
    return finish(run, scored, results)


def finish(run: Run, scored: list[Scores], results: dict[str, Any]) -> dict[str, Any]:
    """The table on the screen, and for two models the change of every list of samples."""
    print(table(*scored, rows=TABLE))
    return results | ({"change": compare(*scored)} if len(scored) > 1 else {})


# ---------------------------------------------------------------- photos: cue search, benchmarks, one's own


def cues_task(run: Run) -> dict[str, Any]:
    """Cue search on held-out photos (Table 10), in all and by size class."""
    files = {name: getattr(run.args, name) for name in ("annotations", "images", "exclude")}
    cues = open_cues(run.args.data, "heldout", 0, CueConfig(run.args.source), **files)
    held, results, scored = held_out(run.policy, cues, run.args.n or 500), {}, []
    longest, batch = run.ways()
    for side, switch in run.sides:
        with switch():
            scored.append(evaluate(run.policy, held, longest, side, run.known, batch))
        results[side] = scored[-1].summary
    draw_cues(held.cues, *([s.boxes for s in scored] + [None])[:2], run.folder / "before_after.png")
    results["left_out"] = {part.what: dict(part.reasons) for part in cues.left_out}
    return finish(run, scored, results)


def benchmark_prompt(sample: Any, tools: Tools, think: bool = False, suppressed: bool = False) -> Encoded:
    """The prompt of a benchmark's Sample; suppressed: with everything but the evidence black (Table 1)."""
    images = [keep_only(im, *sample.boxes) if suppressed else im for im in sample.images()]
    if sample.kind == "box":
        return encode(tools, prompt_text(tools.family, "text", think, text=sample.question), *images)
    options = "\n".join(f"{letter}. {text}" for letter, text in sample.options.items())
    kind = "string" if sample.kind == "choice" and not options else sample.kind
    text = prompt_text(tools.family, kind, think, question=sample.question, options=options)
    return encode(tools, text, *images)


def benchmark_task(run: Run) -> dict[str, Any]:
    """A published benchmark, by the same prompts before and after, with and without the think instruction."""
    from evaluation.benchmarks import BENCHMARKS, read_samples

    task, samples = run.args.task, list(read_samples(run.args.task, Path(run.args.data)))
    if run.args.n is not None and run.args.n < len(samples):  # of all parts of the file alike
        samples = [samples[i] for i in sorted(random.Random(0).sample(range(len(samples)), run.args.n))]
    thinks = PROMPTS[run.tools.family.template]["think"] != ""
    scored, results = [], {}
    for side, switch in run.sides:
        scored.append(scores := Scores({}, {}, []))
        with switch():
            for style in ("direct", "think") if thinks else ("direct",):
                prompts = Made(partial(benchmark_prompt, tools=run.tools, think=style == "think"), samples)
                said = run.ask(f"{side}/{style}", prompts, [s.id for s in samples], benchmark=True)
                add_judged(scores, style, task, samples, said)
            if any(sample.boxes for sample in samples) and samples[0].kind == "choice":
                add_evidence(run, side, samples, scored)
        results[side] = scores.summary
    for style in ("direct", "think") if thinks else ("direct",):
        figures = " → ".join(f"{scores.summary[style].get('score', 0.0):.1f}" for scores in scored)
        rule = " (rule score: officially a model judges)" if BENCHMARKS[task].judged else ""
        print(f"{task}, {style}: {figures}{rule}")
    if thinks and len(scored) > 1:  # the paper's pairing: the instruction comes with training
        pairing = (scored[0].samples["direct"], scored[1].samples["think"], scored[0].groups.get("direct"))
        results["direct to think"] = paired(*pairing)
    return finish(run, scored, results)


def add_judged(scores: Scores, name: str, task: str, samples: list, said: list) -> None:
    """Judged replies into a model's scores; where memory ran out is an error, not a wrong answer."""
    from evaluation.benchmarks import BENCHMARKS, aggregate, judge

    rows = []
    for sample, (text, frame) in zip(samples, said, strict=True):
        about = {"fields": sample.fields, "answer": sample.answer}
        rows.append(None if text is None else judge(sample, text, frame) | about)
    there = [row for row in rows if row is not None]
    scores.samples[name] = [row and row["right"] for row in rows]
    if "cycle_category" in BENCHMARKS[task].over:  # HR-Bench asks each question in several orders
        scores.groups[name] = [sample.question for sample in samples]
    scores.summary[name] = (aggregate(task, there) if there else {}) | {"errors": len(rows) - len(there)}


def add_evidence(run: Run, side: str, samples: list, scored: list[Scores]) -> None:
    """Where a benchmark has the boxes of its evidence: suppression, attention, grounding of one object."""
    scores, tools, shown = scored[-1], run.tools, [sample for sample in samples if sample.boxes]
    right = dict(zip((sample.id for sample in samples), scores.samples["direct"], strict=True))
    black = Made(partial(benchmark_prompt, tools=tools, suppressed=True), shown)
    said = run.ask(f"{side}/suppressed", black, [s.id for s in shown], benchmark=True)
    add_judged(scores, "black", run.args.task, shown, said)
    direct = Made(partial(benchmark_prompt, tools=tools), shown)
    boxes = [sample.boxes for sample in shown]
    add_looking(scores, look(run.policy, run.known, f"{side}/looks", direct, boxes, 1))
    single = [sample for sample in shown if len(sample.boxes) == 1 and sample.target]
    find = partial(prompt_text, tools.family, "text", False)
    finds = Made(lambda sample: encode(tools, find(text=sample.target), *sample.images()), single)
    said = run.ask(f"{side}/grounding", finds, [s.id for s in single])
    add_grounding(
        scores, box_ious(said, [s.boxes[0] for s in single]), [right[s.id] for s in single], scored[0]
    )


def ask_task(run: Run) -> dict[str, Any]:
    """A question on a picture of one's own: both answers, and a heat-map of where each model looks."""
    try:
        image = load_image(run.args.image)
    except Unfit as why:
        raise UserError(f"{run.args.image} cannot be asked about, being {why}: give another.") from None
    item, results = encode(run.tools, run.args.question, image), {}
    for side, switch in run.sides:
        with switch():
            ((results[side], _),) = run.ask(side, [item], benchmark=True)
        print(f"{side:>8}: {results[side] or 'the memory is too small for this picture'}")
    heat_map(run, [run.args.question], [image], [item], [[]])
    return results


# ---------------------------------------------------------------- command line


def run_task(args: argparse.Namespace) -> None:
    tasks: dict[str, Callable[[Run], dict]] = {"scenes": scenes_task, "cues": cues_task, "ask": ask_task}
    policy = load_policy(args.model, args.load_in_4bit, args.box_frame)
    run = open_run(load_adapter(policy, args.adapter) if args.adapter is not None else policy, args)
    results = tasks.get(args.task, benchmark_task)(run)
    write_json(run.folder / "results.json", results)
    print(f"results are in {run.folder}")


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # a Windows file of old has no ≥
    with exit_on_error():
        run_task(read_flags())


if __name__ == "__main__":
    main()
