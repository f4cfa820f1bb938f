"""Held-out pictures: what a model is asked about them, before and after training, and how answers are scored.

Four tasks on one set of scenes: cue search (with a crop, what LOCUS trains), finding by text, questions about
attributes and questions about places. The last three see one ordinary full image and no crop. Questions are
asked a second time with everything but their evidence blacked out (context suppression, the paper's Table 1).
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from data import Cue, Cues, encode_cue
from evaluation.reply_cache import cached_generate, default_batch_size
from evaluation.scores import Scores, mean
from policy import Policy, compute_image_features
from prompts import BoxFrame, EncodedPrompt, encode, prompt_text
from reward import Box, answer_of, format_reward, iou, parse_box
from tiny import scenes
from tiny.scenes import Question, Scene, SceneObject


class LazyList(Sequence):
    """Cues or prompts that are made when asked for: of a thousand photos at once they would be gigabytes."""

    def __init__(self, make: Callable[[Any], Any], items: Sequence):
        self.make, self.items = make, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.items[index])


@dataclass
class HeldOutSet:
    """Prompts with what decides them; the same objects are asked before and after training."""

    cues: Sequence[Cue]
    cue_prompts: Sequence[EncodedPrompt]
    find_prompts: list[
        EncodedPrompt
    ]  # empty, as are the questions, where the cues have no scene to be right about
    scene_questions: list[tuple[Scene, Question]]
    question_prompts: list[EncodedPrompt]
    suppressed_prompts: list[EncodedPrompt]  # the same questions, everything but the evidence black


def build_heldout_set(policy: Policy, cues: Cues, n: int, alone: bool = False) -> HeldOutSet:
    """n held-out cues; of scenes also n findings by text and 2·n questions, half of them about places.

    alone: only questions whose evidence shares none of its image tokens with another thing.
    """
    if cues[0].scene is None:
        drawn = LazyList(cues.__getitem__, range(n))  # the i-th cue is the same every time
        prompts = LazyList(partial(encode_cue, policy.processor, source="object"), drawn)
        return HeldOutSet(drawn, prompts, [], [], [], [])
    processor, out = policy.processor, HeldOutSet([], [], [], [], [], [])
    missing, index = {"attribute": n, "place": n}, 0
    bar = tqdm(total=n, desc="held-out samples", leave=False)
    while len(out.cues) < n or any(missing.values()):
        cue, rng = cues[index], random.Random(index)
        image = cue.image
        index += 1
        if len(out.cues) < n:
            bar.update()
            out.cues.append(cue)
            out.cue_prompts.append(item := encode_cue(processor, cue, "object"))
            image = item.images[0]  # processed and seen once for all that is asked about it
            out.find_prompts.append(
                encode(processor, prompt_text(processor.family, "text", text=cue.text), image)
            )
        possible = [q for q in scenes.questions(cue.scene) if missing[q.kind]]
        if alone:
            possible = [q for q in possible if scenes.alone_in_its_cells(cue.scene, q.box)]
        rng.shuffle(possible)
        for q in {q.kind: q for q in possible}.values():
            out.scene_questions.append((cue.scene, q))
            text = prompt_text(processor.family, "string", question=q.text)
            out.question_prompts.append(encode(processor, text, image))
            out.suppressed_prompts.append(encode(processor, text, scenes.keep_only(cue.image, q.box)))
            missing[q.kind] -= 1
        if index % 32 == 0:  # always in the same company, whatever will be asked first
            compute_image_features(
                policy, [*out.cue_prompts[-32:], *out.question_prompts[-64:], *out.suppressed_prompts[-64:]]
            )
    compute_image_features(policy, [*out.cue_prompts, *out.question_prompts, *out.suppressed_prompts])
    bar.close()
    return out


# ---------------------------------------------------------------- scores of samples, and their summaries


def target_object(cue: Cue) -> SceneObject:
    """The thing that a scene's cue window is about."""
    return max(cue.scene.objects, key=lambda scene_object: iou(scene_object.box, cue.box))


def box_score(text: str | None, frame: BoxFrame, true_box: Box, cue: Cue) -> dict[str, float] | None:
    """IoU of an answered box with the true one, whether it parses and has the format, and whether it is on
    the right thing, the one of the scene's that it overlaps most. None where memory ran out."""
    if text is None:
        return None
    score = {"iou": 0.0, "parsed": 0.0, "format": format_reward(text), "right": 0.0}
    answered = parse_box(text)
    if answered is not None:
        pixels = frame.to_pixels(answered)
        score |= {"iou": iou(pixels, true_box), "parsed": 1.0}
        if cue.scene is not None:
            overlap, scene_object = max(
                ((iou(t.box, pixels), t) for t in cue.scene.objects), key=lambda pair: pair[0]
            )
            score["right"] = float(overlap > 0 and scene_object == target_object(cue))
    return score


def cue_summary(rows: list[dict[str, float] | None]) -> dict[str, float]:
    """Means over the cues that were answered (Table 10); `errors` counts the others, if there are any."""
    there = [row for row in rows if row is not None]
    means = {name: mean(row[name] for row in there) for name in ("iou", "right", "parsed", "format")}
    out = {"mean_iou": means["iou"], "mean_iou_parsed": mean(row["iou"] for row in there if row["parsed"])}
    out |= {f"acc{t}": mean(row["iou"] >= t / 100 for row in there) for t in (50, 75)}
    out |= {"right_object": means["right"], "parse_rate": means["parsed"], "format": means["format"]}
    return out | {"n": len(there)} | ({"errors": len(rows) - len(there)} if len(rows) > len(there) else {})


def question_summary(right: list[float | None], asked: list[tuple[Scene, Question]]) -> dict:
    """Accuracy in all, by number of things in the scene, by size of the evidence and by kind of question."""
    groups: dict[str, dict[str, list]] = {k: defaultdict(list) for k in ("objects", "size", "kind")}
    for hit, (scene, question) in zip(right, asked, strict=True):
        side = question.box[2] - question.box[0]
        groups["objects"][str(len(scene.objects))].append(hit)
        groups["size"]["tiny" if side <= scenes.TINY_SIDES[1] else "small"].append(hit)
        groups["kind"][question.kind].append(hit)
    by = {f"by_{name}": {k: mean(group[k]) for k in sorted(group)} for name, group in groups.items()}
    return {"accuracy": mean(right), "n": len(right)} | by


# ---------------------------------------------------------------- a model on the held-out set


def evaluate(
    policy: Policy, held: HeldOutSet, max_new_tokens: int, what: str = "evaluation", cache=None, batch=None
) -> Scores:
    """Greedy answers to all held-out prompts and their scores; `known` holds answers of an earlier try."""
    cache, batch = {} if cache is None else cache, batch or default_batch_size(policy)

    def ask(name: str, items: Sequence[EncodedPrompt]) -> list[tuple[str | None, BoxFrame]]:
        return cached_generate(policy, cache, f"{what}/{name}", items, (max_new_tokens, batch))

    said = ask("cue search", held.cue_prompts)
    rows = [box_score(*reply, cue.box, cue) for reply, cue in zip(said, held.cues, strict=True)]
    answered = [(text and parse_box(text), frame) for text, frame in said]
    boxes = [frame.to_pixels(box) if box else None for box, frame in answered]
    summary, samples = {"cue": cue_summary(rows)}, {"cue": [row and row["iou"] for row in rows]}
    sizes = {
        size: [row for row, cue in zip(rows, held.cues) if cue.size == size] for size in ("tiny", "small")
    }
    summary["cue_by_size"] = {size: cue_summary(some) for size, some in sizes.items() if some}
    if held.find_prompts:
        said = zip(ask("find", held.find_prompts), held.cues, strict=True)
        rows = [box_score(*reply, target_object(cue).box, cue) for reply, cue in said]
        samples |= {"find": [r and r["iou"] for r in rows], "find_right": [r and r["right"] for r in rows]}
        summary["find"] = {"mean_iou": mean(samples["find"]), "right_object": mean(samples["find_right"])}
        summary["find"]["n"] = len(rows)
    asked = {"questions": held.question_prompts, "suppressed": held.suppressed_prompts}
    for name, items in ((name, items) for name, items in asked.items() if items):
        samples[name] = [
            is_right(text, q) for (text, _), (_, q) in zip(ask(name, items), held.scene_questions)
        ]
        summary[name] = question_summary(samples[name], held.scene_questions)
        for kind in ("attribute", "place"):
            samples[f"{name}_{kind}"] = [
                h for h, (_, q) in zip(samples[name], held.scene_questions) if q.kind == kind
            ]
    return Scores(summary, samples, boxes)


def is_right(text: str | None, question: Question) -> float | None:
    """Whether a question on a scene is answered: by the very word or words, in the answer block."""
    return None if text is None else float((answer_of(text) or "").strip(" .").lower() == question.answer)


def baselines(policy: Policy, held: HeldOutSet, max_new_tokens: int, cache=None) -> dict[str, float]:
    """Mean IoU of cue search without searching: the whole image, a box in the centre of the mean cue's size,
    and the untrained model's own two steps: name the crop, then find by that name."""
    side = mean(math.sqrt((c.box[2] - c.box[0]) * (c.box[3] - c.box[1])) for c in held.cues) / 2
    whole, centre = [], []
    for cue in held.cues:
        w, h = cue.image.size
        whole.append(iou((0, 0, w, h), cue.box))
        centre.append(iou((w / 2 - side, h / 2 - side, w / 2 + side, h / 2 + side), cue.box))
    out = {"whole_image": mean(whole), "centre_box": mean(centre)}
    if not held.find_prompts:
        return out
    family, cache, ways = (
        policy.processor.family,
        {} if cache is None else cache,
        (max_new_tokens, default_batch_size(policy)),
    )
    naming = [
        encode(policy.processor, prompt_text(family, "name"), *item.images) for item in held.cue_prompts
    ]
    names = [
        (answer_of(text or "") or "").strip()
        for text, _ in cached_generate(policy, cache, "names", naming, ways)
    ]
    prompts = [prompt_text(family, "text", text=name) for name in names]
    images = [item.images[0] for item in held.cue_prompts]
    items = [encode(policy.processor, prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    found = zip(cached_generate(policy, cache, "named", items, ways), held.cues, strict=True)
    out["name_then_find"] = mean(
        row and row["iou"] for row in (box_score(*reply, cue.box, cue) for reply, cue in found)
    )
    out["crop_named_right"] = mean(
        n == target_object(cue).name for n, cue in zip(names, held.cues, strict=True)
    )
    return out
