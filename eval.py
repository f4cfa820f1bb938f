"""Before and after: what a model finds and answers on held-out pictures it was not trained on.

    python eval.py scenes [--model tiny] [--adapter runs/NAME/adapter] [--n 1000] [--card]

Four tasks on one set of scenes: cue search (with a crop, what LOCUS trains), finding by text, questions about
attributes and questions about places. The last three see one ordinary full image and no crop. Questions are
asked a second time with everything but their evidence blacked out (context suppression, the paper's Table 1).
"""

import argparse
import json
import math
import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import scenes
from data import Cue, CueConfig, Cues, SceneCues, UserError, encode_cue
from pictures import draw_cues
from policy import Policy, answer, load_adapter, load_policy, model_folder
from prompts import Encoded, encode, prompt_text
from reward import Box, answer_of, format_reward, iou, parse_box
from scenes import Question, Scene, Thing


@dataclass
class HeldOut:
    """Prompts with what decides them; the same objects are asked before and after training."""

    cues: list[Cue]
    cue_items: list[Encoded]
    find_items: list[Encoded]  # empty, as are the questions, where the cues have no scene to be right about
    asked: list[tuple[Scene, Question]]
    question_items: list[Encoded]
    suppressed_items: list[Encoded]  # the same questions, everything but the evidence black


def held_out(policy: Policy, cues: Cues, n: int, alone: bool = False) -> HeldOut:
    """n held-out cues; of scenes also n findings by text and 2·n questions, half of them about places.

    alone: only questions whose evidence shares none of its image tokens with another thing.
    """
    tools, out = policy.tools, HeldOut([], [], [], [], [], [])
    missing, index = {"attribute": n, "place": n}, 0
    bar = tqdm(total=n, desc="held-out samples", leave=False)
    while len(out.cues) < n or any(missing.values()):
        cue, rng = cues[index], random.Random(index)
        image = cue.image
        index += 1
        if len(out.cues) < n:
            bar.update()
            out.cues.append(cue)
            out.cue_items.append(item := encode_cue(tools, cue, "object"))
            image = item.pictures[0]  # processed and seen once for all that is asked about it
            if cue.scene is not None:
                find = prompt_text(tools.family, "text", text=cue.text)
                out.find_items.append(encode(tools, find, image))
        if cue.scene is None:
            missing = {}
            continue
        possible = [q for q in scenes.questions(cue.scene) if missing[q.kind]]
        if alone:
            possible = [q for q in possible if scenes.alone_in_its_cells(cue.scene, q.box)]
        rng.shuffle(possible)
        for q in {q.kind: q for q in possible}.values():
            out.asked.append((cue.scene, q))
            out.question_items.append(encode(tools, q.text, image))
            out.suppressed_items.append(encode(tools, q.text, scenes.keep_only(cue.image, q.box)))
            missing[q.kind] -= 1
    bar.close()
    return out


# ---------------------------------------------------------------- scores of samples, and their summaries


def thing_of(cue: Cue) -> Thing:
    """The thing that a scene's cue window is about."""
    return max(cue.scene.things, key=lambda thing: iou(thing.box, cue.box))


def box_score(text: str, item: Encoded, true_box: Box, cue: Cue) -> dict[str, float]:
    """IoU of an answered box with the true one, whether it parses and has the format, and whether it is on
    the right thing: the one of all the scene's things that it overlaps most."""
    score = {"iou": 0.0, "parsed": 0.0, "format": format_reward(text), "right": 0.0}
    answered = parse_box(text)
    if answered is not None:
        pixels = item.frame.to_pixels(answered)
        score |= {"iou": iou(pixels, true_box), "parsed": 1.0}
        if cue.scene is not None:
            overlap, thing = max(
                ((iou(t.box, pixels), t) for t in cue.scene.things), key=lambda pair: pair[0]
            )
            score["right"] = float(overlap > 0 and thing == thing_of(cue))
    return score


def cue_summary(rows: list[dict[str, float]]) -> dict[str, float]:
    means = {name: mean(row[name] for row in rows) for name in rows[0]}
    out = {"mean_iou": means["iou"], "mean_iou_parsed": mean(row["iou"] for row in rows if row["parsed"])}
    out |= {f"acc{t}": mean(row["iou"] >= t / 100 for row in rows) for t in (50, 75)}
    out |= {"right_object": means["right"], "parse_rate": means["parsed"], "format": means["format"]}
    return out | {"n": len(rows)}


def question_summary(right: list[float], asked: list[tuple[Scene, Question]]) -> dict:
    """Accuracy in all, by number of things in the scene, by size of the evidence and by kind of question."""
    groups: dict[str, dict[str, list[float]]] = {k: defaultdict(list) for k in ("objects", "size", "kind")}
    for hit, (scene, question) in zip(right, asked, strict=True):
        side = question.box[2] - question.box[0]
        groups["objects"][str(len(scene.things))].append(hit)
        groups["size"]["tiny" if side <= scenes.TINY_SIDES[1] else "small"].append(hit)
        groups["kind"][question.kind].append(hit)
    by = {f"by_{name}": {k: mean(group[k]) for k in sorted(group)} for name, group in groups.items()}
    return {"accuracy": mean(right), "n": len(right)} | by


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def paired(before: list[float], after: list[float]) -> dict[str, float]:
    """Mean change of the same samples, and its standard error."""
    change = [b - a for a, b in zip(before, after, strict=True)]
    middle = mean(change)
    variance = sum((c - middle) ** 2 for c in change) / max(1, len(change) - 1)
    return {"change": middle, "standard_error": math.sqrt(variance / max(1, len(change)))}


# ---------------------------------------------------------------- a model on the held-out set


@dataclass
class Scores:
    """A model's scores: `summary` as in results.json, `samples` one by one, `boxes` of cues in pixels."""

    summary: dict
    samples: dict[str, list[float]]
    boxes: list[Box | None]


def evaluate(policy: Policy, held: HeldOut, max_new_tokens: int, what: str = "evaluation") -> Scores:
    """Greedy answers to all held-out prompts, by the rollout's own loop, and their scores."""
    total = len(held.cues) + len(held.find_items) + 2 * len(held.asked)
    bar = tqdm(total=total, desc=what, leave=False)

    def ask(items: list[Encoded]) -> list[str]:
        out = []
        for text in answer(policy, items, max_new_tokens):
            out.append(text)
            bar.update()
        return out

    texts = ask(held.cue_items)
    rows = [box_score(t, i, c.box, c) for t, i, c in zip(texts, held.cue_items, held.cues, strict=True)]
    summary, samples = {"cue": cue_summary(rows)}, {"cue": [row["iou"] for row in rows]}
    boxes = [parse_box(text) for text in texts]
    boxes = [b and item.frame.to_pixels(b) for b, item in zip(boxes, held.cue_items, strict=True)]
    if held.find_items:
        pairs = zip(ask(held.find_items), held.find_items, held.cues, strict=True)
        rows = [box_score(text, item, thing_of(cue).box, cue) for text, item, cue in pairs]
        samples |= {"find": [row["iou"] for row in rows], "find_right": [row["right"] for row in rows]}
        summary["find"] = {"mean_iou": mean(samples["find"]), "right_object": mean(samples["find_right"])}
        summary["find"]["n"] = len(rows)
    asked = {"questions": held.question_items, "suppressed": held.suppressed_items}
    for name, items in asked.items() if held.asked else ():
        pairs = zip(ask(items), held.asked, strict=True)
        samples[name] = [float((answer_of(text) or "").strip() == q.answer) for text, (_, q) in pairs]
        summary[name] = question_summary(samples[name], held.asked)
        for kind in ("attribute", "place"):
            samples[f"{name}_{kind}"] = [h for h, (_, q) in zip(samples[name], held.asked) if q.kind == kind]
    bar.close()
    return Scores(summary, samples, boxes)


def baselines(policy: Policy, held: HeldOut, max_new_tokens: int) -> dict[str, float]:
    """Mean IoU of cue search without searching: the whole image, a box in the centre of the mean cue's size,
    and the untrained model's own two steps: name the crop, then find by that name."""
    side = mean(math.sqrt((c.box[2] - c.box[0]) * (c.box[3] - c.box[1])) for c in held.cues) / 2
    whole, centre = [], []
    for cue in held.cues:
        w, h = cue.image.size
        whole.append(iou((0, 0, w, h), cue.box))
        centre.append(iou((w / 2 - side, h / 2 - side, w / 2 + side, h / 2 + side), cue.box))
    out = {"whole_image": mean(whole), "centre_box": mean(centre)}
    if not held.find_items:
        return out
    family = policy.tools.family
    naming = [encode(policy.tools, prompt_text(family, "name"), *item.pictures) for item in held.cue_items]
    names = [(answer_of(text) or "").strip() for text in answer(policy, naming, max_new_tokens)]
    prompts = [prompt_text(family, "text", text=name) for name in names]
    images = [item.pictures[0] for item in held.cue_items]
    items = [encode(policy.tools, prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    found = zip(answer(policy, items, max_new_tokens), items, held.cues, strict=True)
    out["name_then_find"] = mean(box_score(text, item, cue.box, cue)["iou"] for text, item, cue in found)
    out["crop_named_right"] = mean(n == thing_of(cue).name for n, cue in zip(names, held.cues, strict=True))
    return out


# ---------------------------------------------------------------- tables

ROWS = {  # row of the table: list of samples
    "cue search (IoU)": "cue",
    "find by text (IoU)": "find",
    "find by text (right thing)": "find_right",
    "questions": "questions",
    "  about attributes": "questions_attribute",
    "  about places": "questions_place",
    "questions, suppressed": "suppressed",
}


def compare(before: Scores, after: Scores) -> dict[str, dict[str, float]]:
    """Change and paired standard error of every list of samples."""
    return {name: paired(before.samples[name], after.samples[name]) for name in before.samples}


def table(before: Scores, after: Scores | None = None) -> str:
    """The before/after table, in points of 100 with the paired standard error."""
    lines = [f"{'held-out':28}{'n':>6}{'before':>9}" + f"{'after':>9}{'change':>16}" * bool(after)]
    for title, name in ROWS.items():
        if name in before.samples:
            values = before.samples[name]
            lines.append(f"{title:28}{len(values):6}{100 * mean(values):9.1f}")
            if after:
                change, error = (100 * v for v in paired(values, after.samples[name]).values())
                lines[-1] += f"{100 * mean(after.samples[name]):9.1f}{change:+10.1f} ± {error:.1f}"
    for key in ("right_object", "parse_rate", "format"):
        both = [scores.summary["cue"] for scores in (before, after) if scores]
        numbers = "".join(f"{100 * cue[key]:9.1f}" for cue in both)
        lines.append(f"{'cue search, ' + key.replace('_', ' '):28}{both[0]['n']:6}{numbers}")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line

CARD_SCENES = {  # row of the card: things in a scene, is the evidence alone in its cells
    "1 thing": ((1, 1), False),
    "2–3 things": ((2, 3), False),
    "4–8 things": ((4, 8), False),
    "12–16 things": ((12, 16), False),
    "16 things": ((16, 16), False),
    "16 things, evidence alone in its image tokens": ((16, 16), True),
}


def card(policy: Policy, folder: Path, n: int) -> None:
    """Visual context rot of the embedded model, measured and written into its model card."""
    lines = [
        "| scenes | attributes | suppressed | places | suppressed | find by text, IoU | cue search, IoU |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    measured = {}
    for name, (things, alone) in CARD_SCENES.items():
        cues = SceneCues(CueConfig(), "heldout", 1, things)
        held = held_out(policy, cues, n, alone=alone)
        scores = evaluate(policy, held, policy.tools.family.max_new_tokens, name)
        named = baselines(policy, held, policy.tools.family.max_new_tokens)["crop_named_right"]
        s = measured[name] = scores.summary | {"crop_named_right": named}
        kinds, black = s["questions"]["by_kind"], s["suppressed"]["by_kind"]
        shown = (kinds["attribute"], black["attribute"], kinds["place"], black["place"])
        shown += (s["find"]["mean_iou"], s["cue"]["mean_iou"])
        lines.append(f"| {name} | " + " | ".join(f"{100 * v:.1f}" for v in shown) + " |")
        print(lines[-1])
    named = measured["4–8 things"]["crop_named_right"]
    lines.append(
        f"\nCrops named right (4–8 things): {100 * named:.1f} %. Every cell: n = {n:,}; held-out scenes."
    )
    (folder / "card.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    readme = folder / "README.md"
    head, start, rest = readme.read_text(encoding="utf-8").partition("<!-- measured -->")
    tail = rest.partition("<!-- /measured -->")[2]
    body = "\n".join(["", *lines, "<!-- /measured -->"])
    readme.write_text(head + start + body + tail, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=["scenes"])
    parser.add_argument("--model", default="tiny", help="tiny, a model folder or a hub id")
    parser.add_argument("--adapter", type=Path, help="adapter folder of a run: scores before and after")
    parser.add_argument("--n", type=int, default=1000, help="held-out cues; twice as many questions")
    parser.add_argument("--out", type=Path, help="folder for results.json and before_after.png")
    parser.add_argument("--card", action="store_true", help="measure the embedded model and write its card")
    args = parser.parse_args()
    try:
        run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    if args.n < 1:
        raise UserError(f"--n {args.n} is no number of samples; give 1 or more.")
    policy = load_policy(args.model)
    if args.card:
        card(policy, Path(model_folder(args.model)), args.n)
        return
    held = held_out(policy, SceneCues(CueConfig(), "heldout", 0), args.n)
    longest = policy.tools.family.max_new_tokens
    before, after = evaluate(policy, held, longest, "before"), None
    results = {"before": before.summary, "baselines": baselines(policy, held, longest)}
    if args.adapter is not None:
        after = evaluate(load_adapter(policy, args.adapter), held, longest, "after")
        results |= {"after": after.summary, "change": compare(before, after)}
    print(table(before, after))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        draw_cues(held.cues, before.boxes, after and after.boxes, args.out / "before_after.png")


if __name__ == "__main__":
    main()
