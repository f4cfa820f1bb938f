"""Before and after: what a model finds, answers and attends to, on images that it was not trained on.

    python eval.py scenes [--adapter runs/NAME/adapter]              every table, on the embedded world
    python eval.py cues --data coco --annotations FILE --images DIR  cue search on held-out photos
    python eval.py vstar --data FOLDER --model … --adapter …         a published benchmark (evaluation/)
    python eval.py table --data FILE.tsv --model …                   your own multiple-choice questions
    python eval.py ask IMAGE QUESTION [--adapter …]                  both answers, and where each model looks
    python eval.py report runs/NAME                                  report.html: a page about a run

What differs from a typical evaluation script:
- Base and adapted model answer the same prompts in one load: the adapter is off, then on. So every change is
  a paired difference with a standard error.
- Replies are greedy, by the rollout's own loop: checkpoints ship sampling settings that generate() would use.
- Each reply is a line of answers.jsonl at once, so a killed run continues where it stopped.
- Where memory runs out, a sample is an error and not a wrong answer.
"""

import argparse
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from files.errors import FlagParser, UserError, exit_on_error, model_folder, one_or_more, require_file
from training import settings


def read_flags() -> argparse.Namespace:
    """What the command line asks for; UserError for a value or a combination that makes no sense."""
    from evaluation.benchmarks import BENCHMARKS

    parser, task_names = FlagParser(description=__doc__), ("scenes", "cues", "ask", "report", *BENCHMARKS)
    # The flags of cues are those of training: an adapter is measured as it was trained.
    parser.add_argument("task", choices=task_names, metavar="TASK", help=", ".join(task_names))
    parser.add_argument("image", type=Path, nargs="?", help="image of the task ask; run folder of report")
    parser.add_argument("question", nargs="?", help="question of the task ask")
    parser.add_argument("--model", default="tiny", help="tiny, a model folder or a hub id")
    parser.add_argument("--adapter", type=Path, help="adapter folder of a run: scores before and after")
    parser.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, help="default on CUDA")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, help="on the CPU, also a large model")
    parser.add_argument("--box-frame", choices=settings.FRAMES, help="of the model's boxes")
    parser.add_argument("--data", help="of cues: coco or a folder; of a benchmark: its file or folder")
    for name in ("annotations", "images", "exclude"):
        parser.add_argument(f"--{name}", type=Path, help="of COCO")
    parser.add_argument("--source", choices=settings.SOURCES[:3], default="object", help="of cues")
    parser.add_argument("--cue-prompt", type=settings.read_cue_prompt, metavar="FILE", help="of cues")
    for name in settings.PIXELS:
        parser.add_argument(settings.flag_of(name), type=one_or_more, help="of cues and scenes")
    parser.add_argument("--n", type=one_or_more, help="samples (default scenes 1000, cues 500, else all)")
    parser.add_argument("--seed", type=int, default=0, help="of held-out scenes; training uses 0")
    parser.add_argument("--max-new-tokens", type=one_or_more, help="of a reply")
    parser.add_argument("--batch", type=one_or_more, help="prompts at a time (default CPU 128, GPU 32)")
    parser.add_argument("--export-vlmevalkit", type=Path, metavar="FILE", help="its prediction table (TSV)")
    parser.add_argument("--out", type=Path, help="folder of results; default one beside the adapter")
    args = parser.parse_args()
    if args.task == "ask" and args.question is None:
        raise UserError('eval.py ask needs a picture and a question: eval.py ask photo.jpg "What is this?"')
    if args.task == "report":
        if args.image is None:
            raise UserError("eval.py report needs the folder of a run: eval.py report runs/first")
        require_file("The run", args.image / "config.json")
    elif args.image is not None and args.task != "ask":
        raise UserError(f"eval.py {args.task} takes no {args.image}: leave it out, or name it with a flag.")
    elif args.task == "scenes" and args.data not in ("scenes", None):
        raise UserError(f"eval.py scenes takes no --data {args.data}: leave it out, or give eval.py cues.")
    elif args.task not in ("scenes", "ask") and args.data is None:
        raise UserError(f"eval.py {args.task} needs --data: what to measure on.")
    require_file("The picture", args.image)
    for name in ("adapter", "annotations", "images", "exclude"):
        require_file(f"--{name}", getattr(args, name), folder=name in ("adapter", "images"))
    if args.data not in ("coco", "scenes", None):
        require_file("--data", Path(args.data))
    model_folder(args.model)
    return args


if __name__ == "__main__":  # --help, a wrong flag or a missing file: answer before torch takes its seconds
    with exit_on_error():
        read_flags()
        settings.prepare_torch()

from data import CueConfig, open_cues, scene_cues
from evaluation import attention, twins
from evaluation.heldout import HeldOutSet, LazyList, baselines, build_heldout_set, evaluate
from evaluation.scores import ROWS as HELDOUT_ROWS
from evaluation.scores import Scores, kind_rows, paired, summarize, table
from evaluation.session import TITLES, Session, open_session
from files.disk import write_json
from files.pictures import UnusableImage, load_image
from prompts import PROMPTS, EncodedPrompt, Processor, encode, prompt_text
from tiny.scenes import keep_only, render
from training.experiment import write_report
from training.pictures import draw_cues, draw_heat_maps

ROWS = {"right, direct prompt": "direct", "right, think prompt": "think", "right, rest black": "black"}
ROWS |= HELDOUT_ROWS | kind_rows("  {} of {} objects, rest black", "suppressed")
ROWS |= attention.ROWS | twins.ROWS  # table label: key in Scores.samples


def evaluate_models(session: Session, held: HeldOutSet, add_more: Any = None) -> list[Scores]:
    """Each model's scores on held-out cues; add_more(name, scores, base) adds to them."""
    model_scores, (longest, batch) = [], session.generation_limits()
    for name in session.each_model():
        model_scores.append(evaluate(session.policy, held, longest, name, session.cache, batch))
        if add_more:
            add_more(name, model_scores[-1], model_scores[0])
    boxes = [scores.boxes for scores in model_scores]
    draw_cues(held.cues, boxes[0], boxes[1] if len(boxes) > 1 else None, session.folder / "before_after.png")
    return model_scores


def finish(model_scores: list[Scores], more_results: dict[str, Any]) -> dict[str, Any]:
    """Prints the table; returns the results, for two models with the change of every list of samples."""
    print(table(*model_scores, rows=ROWS))
    return summarize(*model_scores) | more_results


def scenes_task(session: Session) -> dict[str, Any]:
    """Cue search, finding, questions, context suppression, grounding, attention and twins, on scenes."""
    policy, n, seed = session.policy, session.args.n or 1000, session.args.seed
    held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", seed), n)
    longest, batch = session.generation_limits()

    def analyse(name: str, scores: Scores, base: Scores) -> None:
        attention.analyse_questions(policy, held, scores, base, session.cache, name, (longest, batch))
        twins.add_twins(scores, twins.measure_twins(policy, n, seed, batch, session.cache, f"{name}/twins"))

    model_scores = evaluate_models(session, held, analyse)
    # To show: details, whose thought does not hold the answer, and of these what every model answers right.
    hits = enumerate(zip(*(scores.samples["questions"] for scores in model_scores), strict=True))
    indices = [i for i, hit in hits if all(hit) and held.scene_questions[i][1].kind == "detail"][:4]
    examples = [held.scene_questions[i] for i in indices]
    titles = [f"{q.text} {q.answer.capitalize()} ({q.evidence.size})" for _, q in examples]
    rows = [(title, render(scene), [q.evidence.box]) for title, (scene, q) in zip(titles, examples)]
    prompts = attention.prefixed_questions(policy.processor, held)
    prompts = [[prompts[i] for i in indices]] * len(model_scores)
    draw_heat_maps(session, rows, prompts, [*TITLES.values()][: len(model_scores)])
    with policy.reference():
        rules = baselines(policy, held, longest, session.cache, batch)
    return finish(model_scores, {"baselines": rules})


def cues_task(session: Session) -> dict[str, Any]:
    """Cue search on held-out photos (Table 10), in all and by size class."""
    args = session.args
    files = {name: getattr(args, name) for name in ("annotations", "images", "exclude")}
    cues = open_cues(args.data, "heldout", 0, CueConfig(args.source), **files)
    model_scores = evaluate_models(session, build_heldout_set(session.policy, cues, args.n or 500))
    return finish(model_scores, {"left_out": {part.what: dict(part.reasons) for part in cues.left_out}})


def benchmark_prompt(
    sample: Any, processor: Processor, think: bool = False, suppressed: bool = False
) -> EncodedPrompt:
    """The prompt of a benchmark's Sample; suppressed: with everything but the evidence black (Table 1)."""
    images = [keep_only(image, *sample.boxes) if suppressed else image for image in sample.images()]
    option_lines = "\n".join(f"{letter}. {text}" for letter, text in sample.options.items())
    task = "string" if sample.kind == "choice" and not option_lines else sample.kind
    fields = {"question": sample.question, "text": sample.question, "options": option_lines}
    text = prompt_text(processor.family, "text" if task == "box" else task, think, **fields)
    return encode(processor, text, *images)


def benchmark_task(session: Session) -> dict[str, Any]:
    """A published benchmark: the same prompts before and after, with and without the think instruction."""
    from evaluation.benchmarks import BENCHMARKS, read_samples

    task, args = session.args.task, session.args
    samples = list(read_samples(task, Path(args.data)))
    if args.n is not None and args.n < len(samples):  # a random subset covers all parts of the file
        samples = [samples[i] for i in sorted(random.Random(0).sample(range(len(samples)), args.n))]
    styles = ("direct", "think") if PROMPTS[session.processor.family.template]["think"] else ("direct",)
    model_scores, pairing = [], {}
    for name in session.each_model():
        model_scores.append(scores := Scores({}, {}, []))
        for style in styles:
            add_judged(session, scores, style, f"{name}/{style}", samples, think=style == "think")
        if samples[0].kind == "choice" and any(sample.boxes for sample in samples):
            add_evidence(session, name, samples, model_scores)
    for style in styles:
        figures = " → ".join(f"{scores.summary[style].get('score', 0.0):.1f}" for scores in model_scores)
        rule = " (rule score: officially a model judges)" if BENCHMARKS[task].judged else ""
        print(f"{task}, {style}: {figures}{rule}")
    # The paper's pairing: the instruction comes with training.
    if "think" in styles and len(model_scores) > 1:
        base, adapted = model_scores
        samples = (base.samples["direct"], adapted.samples["think"], base.groups.get("direct"))
        pairing["direct to think"] = paired(*samples)
    return finish(model_scores, pairing)


def add_judged(session: Session, scores: Scores, name: str, key: str, samples: list, **style: bool) -> None:
    """Generates replies to samples, judges them, and adds them to a model's scores under `name`.

    key: of the replies in the cache. style: `think` or `suppressed` of benchmark_prompt.
    """
    from evaluation.benchmarks import BENCHMARKS, aggregate, export_predictions, judge

    prompts = LazyList(partial(benchmark_prompt, processor=session.processor, **style), samples)
    rows, replies = [], session.generate(key, prompts, [sample.id for sample in samples], benchmark=True)
    for sample, (text, frame) in zip(samples, replies, strict=True):
        sample.left_out = text is False  # its image cannot be read: the reply is wrong, as an empty one
        rows.append(None if text is None else judge(sample, text or "", frame))
    if (path := session.args.export_vlmevalkit) and name != "black":
        suffix = "" if key == ("after/direct" if session.args.adapter else "before/direct") else f"_{key}"
        export_predictions(path.with_stem(path.stem + suffix.replace("/", "_")), samples, replies)
    judged_rows = [row for row in rows if row is not None]
    scores.samples[name] = [row and row["right"] for row in rows]
    if "cycle_category" in BENCHMARKS[session.args.task].over:  # HR-Bench asks a question in several orders
        scores.groups[name] = [sample.question for sample in samples]
    figures = aggregate(session.args.task, judged_rows) if judged_rows else {}
    counts = {"errors": rows.count(None), "left_out": sum(sample.left_out for sample in samples)}
    scores.summary[name] = figures | counts


def add_evidence(session: Session, name: str, samples: list, model_scores: list[Scores]) -> None:
    """Where a benchmark has boxes of its evidence: suppression, attention, grounding of single objects."""
    scores, make = model_scores[-1], partial(benchmark_prompt, processor=session.processor)
    right = dict(zip((sample.id for sample in samples), scores.samples["direct"], strict=True))
    boxed_samples = [sample for sample in samples if sample.boxes and not sample.left_out]
    add_judged(session, scores, "black", f"{name}/suppressed", boxed_samples, suppressed=True)
    boxes, prompts = [sample.boxes for sample in boxed_samples], LazyList(make, boxed_samples)
    looks = attention.measure_attention(session.policy, session.cache, f"{name}/looks", prompts, boxes, 1)
    attention.add_attention(scores, looks)
    single_boxed = [sample for sample in boxed_samples if len(sample.boxes) == 1 and sample.row.get("target")]
    # The prompt for a box is that of RefCOCO.
    prompts = LazyList(make, [replace(s, kind="box", question=s.row["target"]) for s in single_boxed])
    replies = session.generate(f"{name}/grounding", prompts, [sample.id for sample in single_boxed])
    ious = attention.box_ious(replies, [sample.boxes[0] for sample in single_boxed])
    attention.add_grounding(scores, ious, [right[sample.id] for sample in single_boxed], model_scores[0])


def ask_task(session: Session) -> dict[str, Any]:
    """A question about an image: each model's reply, and where it looks when it predicts its answer."""
    try:
        image = load_image(session.args.image)
    except UnusableImage as error:
        raise UserError(f"{session.args.image} cannot be used: it is {error}. Give another image.") from None
    prompt, results = encode(session.processor, session.args.question, image), {}
    prompts, names = [], []
    for name in session.each_model():
        ((reply, _),) = session.generate(name, [prompt], benchmark=True)
        results[name] = reply
        print(f"{name:>8}: {'(no reply: see the reason above)' if reply is None else reply or '(empty)'}")
        reply_prefix, answer_token = attention.before_answer(session.processor, reply or "")
        prompts.append([attention.append_to_prompt(session.processor, prompt, reply_prefix)])
        names.append(f"{TITLES[name]}, predicting {answer_token!r}")
    draw_heat_maps(session, [(session.args.question, image, [])], prompts, names)
    return results


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # older Windows consoles cannot print ≥
    tasks = {"scenes": scenes_task, "cues": cues_task, "ask": ask_task}
    with exit_on_error():
        if (args := read_flags()).task == "report":
            return write_report(args.image)
        given = {name: value for name in settings.PIXELS if (value := getattr(args, name))}
        session = open_session(args, partial(settings.fit_family, flags=given))
        write_json(session.folder / "results.json", tasks.get(args.task, benchmark_task)(session))
        print(f"results are in {session.folder}")


if __name__ == "__main__":
    main()
