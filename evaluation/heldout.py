"""The held-out set: what a model does on images that it was not trained on, and how its replies are scored.

Four tasks on the same scenes: cue search (image and crop, what LOCUS trains), finding by text, questions on
attributes and questions on places. The last three show an ordinary full image and no crop. Each question
comes a second time with everything but its evidence black (context suppression, the paper's Table 1).
On photos there is cue search alone: we do not know their objects.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile
from typing import Any

from tqdm import tqdm

from data import Cue, Cues, encode_cue
from evaluation.reply_cache import Reply, cached_generate, default_batch_size
from evaluation.scores import Scores, mean
from policy import Policy, compute_image_features
from prompts import BoxFrame, EncodedPrompt, ProcessedImage, Processor, encode, prompt_text
from reward import Box, answer_of, format_reward, iou, parse_box
from tiny import scenes
from tiny.scenes import Question, Scene, SceneObject


class LazyList(Sequence):
    """Cues or prompts that are made at each access: a thousand photos at once would be gigabytes."""

    def __init__(self, make: Callable[[Any], Any], items: Sequence):
        self.make, self.items = make, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.items[index])


@dataclass
class HeldOutSet:
    """Prompts and what their replies are compared with; the same objects serve before and after training.

    Only scenes have more than cue search, so for photos the other lists are empty.
    """

    cues: Sequence[Cue]
    cue_prompts: Sequence[EncodedPrompt]
    find_prompts: list[EncodedPrompt] = field(default_factory=list)  # for the target object of each cue
    scene_questions: list[tuple[Scene, Question]] = field(default_factory=list)
    question_prompts: list[EncodedPrompt] = field(default_factory=list)
    suppressed_prompts: list[EncodedPrompt] = field(default_factory=list)  # all but the evidence is black


def encode_find(processor: Processor, text: str, image: ProcessedImage) -> EncodedPrompt:
    """The prompt for the box of what a text describes."""
    return encode(processor, prompt_text(processor.family, "text", text=text), image)


def build_heldout_set(policy: Policy, cues: Cues, n: int, alone: bool = False) -> HeldOutSet:
    """n held-out cues; of scenes also n prompts to find by text and 2·n questions, half of them about places.

    alone: only questions whose evidence shares none of its image tokens with another object.
    """
    processor = policy.processor
    if cues[0].scene is None:
        photo_cues = LazyList(cues.__getitem__, range(n))  # cue i is the same at each access
        return HeldOutSet(photo_cues, LazyList(partial(encode_cue, processor, source="object"), photo_cues))
    held, missing = HeldOutSet([], []), {"attribute": n, "place": n}
    # A scene has at most one question of each kind, so they may need more scenes than the cues.
    indices = takewhile(lambda index: index < n or any(missing.values()), count())
    for index in tqdm(indices, total=n, desc="held-out samples", leave=False):
        cue = cues[index]
        image = cue.image
        if index < n:
            held.cues.append(cue)
            held.cue_prompts.append(encode_cue(processor, cue, "object"))
            image = held.cue_prompts[-1].images[0]  # processed once for all prompts about it
            held.find_prompts.append(encode_find(processor, cue.text, image))
        possible = [q for q in scenes.questions(cue.scene) if missing[q.kind]]
        if alone:
            possible = [q for q in possible if scenes.alone_in_its_cells(cue.scene, q.box)]
        random.Random(index).shuffle(possible)
        for q in {q.kind: q for q in possible}.values():
            held.scene_questions.append((cue.scene, q))
            text = prompt_text(processor.family, "string", question=q.text)
            held.question_prompts.append(encode(processor, text, image))
            held.suppressed_prompts.append(encode(processor, text, scenes.keep_only(cue.image, q.box)))
            missing[q.kind] -= 1
        # In fixed batches, whatever runs first: in other batches the last digits of features would differ.
        if index % 32 == 31:
            recent = [*held.question_prompts[-64:], *held.suppressed_prompts[-64:]]
            compute_image_features(policy, [*held.cue_prompts[-32:], *recent])
    compute_image_features(policy, [*held.cue_prompts, *held.question_prompts, *held.suppressed_prompts])
    return held


# ---------------------------------------------------------------- scores of replies, and their summaries


def object_at(scene: Scene, box: Box) -> SceneObject:
    """The object of a scene that overlaps a box most."""
    return max(scene.objects, key=lambda scene_object: iou(scene_object.box, box))


def target_object(cue: Cue) -> SceneObject:
    """The object that a scene's cue window shows."""
    return object_at(cue.scene, cue.box)


def predicted_box(text: str | None, frame: BoxFrame, parse: Callable = parse_box) -> Box | None:
    """The box of a reply in pixels of the full image; None where it has no valid box, or no text."""
    box = parse(text or "")
    return frame.to_pixels(box) if box else None


def box_score(text: str | None, frame: BoxFrame, true_box: Box, cue: Cue) -> dict[str, float] | None:
    """Scores of a reply that should give a box; true_box: in pixels of the full image.

    Its IoU, whether it parses, its format reward, and whether the object that it overlaps most is the right
    one, the cue's target. None where there is no reply.
    """
    if text is None:
        return None
    box = predicted_box(text, frame)
    score = {"iou": iou(box, true_box) if box else 0.0, "parsed": float(box is not None)}
    found = object_at(cue.scene, box) if box and cue.scene else None
    right = found is not None and iou(found.box, box) > 0 and found == target_object(cue)
    return score | {"format": format_reward(text), "right": float(right)}


def cue_summary(rows: list[dict[str, float] | None]) -> dict[str, float]:
    """Means of box scores (Table 10); `errors` counts the prompts without a reply, if any."""
    rows, num_rows = [row for row in rows if row is not None], len(rows)
    summary = {"mean_iou": mean(row["iou"] for row in rows)}
    summary["mean_iou_parsed"] = mean(row["iou"] for row in rows if row["parsed"])
    summary |= {f"acc{percent}": mean(row["iou"] >= percent / 100 for row in rows) for percent in (50, 75)}
    names = {"right_object": "right", "parse_rate": "parsed", "format": "format"}
    summary |= {key: mean(row[name] for row in rows) for key, name in names.items()} | {"n": len(rows)}
    return summary | ({"errors": num_rows - len(rows)} if len(rows) < num_rows else {})


def is_right(text: str | None, question: Question) -> float | None:
    """1 if a reply's answer block is exactly the answer to a scene's question, else 0; None: no reply."""
    return None if text is None else float((answer_of(text) or "").strip(" .").lower() == question.answer)


def question_summary(right: list[float | None], scene_questions: list[tuple[Scene, Question]]) -> dict:
    """Accuracy overall, by number of objects in a scene, by size of its evidence, by kind of question."""
    summary, sides = {}, [question.box[2] - question.box[0] for _, question in scene_questions]
    columns = {
        "objects": [str(len(scene.objects)) for scene, _ in scene_questions],
        "size": ["tiny" if side <= scenes.TINY_SIDES[1] else "small" for side in sides],
        "kind": [question.kind for _, question in scene_questions],
    }
    for name, keys in columns.items():
        samples = list(zip(keys, right, strict=True))
        summary[f"by_{name}"] = {k: mean(hit for key, hit in samples if key == k) for k in sorted(set(keys))}
    return {"accuracy": mean(right), "n": len(right)} | summary


# ---------------------------------------------------------------- a model on the held-out set


def evaluate(
    policy: Policy, held: HeldOutSet, max_new_tokens: int, name: str = "evaluation", cache=None, batch=None
) -> Scores:
    """Greedy replies to all held-out prompts, and their scores.

    name: of the model, with which its keys in the cache begin. cache: replies of an earlier, killed run, to
    which new ones are added. batch: prompts per batch.
    """
    cache, limits = {} if cache is None else cache, (max_new_tokens, batch or default_batch_size(policy))

    def generate(task: str, prompts: Sequence[EncodedPrompt]) -> list[Reply]:
        return cached_generate(policy, cache, f"{name}/{task}", prompts, limits)

    # One access per cue: it opens a photo again.
    cue_replies = generate("cue search", held.cue_prompts)
    scored = [(box_score(*reply, c.box, c), c.size) for reply, c in zip(cue_replies, held.cues, strict=True)]
    rows = [row for row, _ in scored]
    by_size = {s: [row for row, size in scored if size == s] for s in ("tiny", "small")}
    summary, samples = {"cue": cue_summary(rows)}, {"cue": [row and row["iou"] for row in rows]}
    summary["cue_by_size"] = {size: cue_summary(part) for size, part in by_size.items() if part}
    if held.find_prompts:
        replies = zip(generate("find", held.find_prompts), held.cues, strict=True)
        rows = [box_score(*reply, target_object(cue).box, cue) for reply, cue in replies]
        ious, right = ([row and row[key] for row in rows] for key in ("iou", "right"))
        samples |= {"find": ious, "find_right": right}
        summary["find"] = {"mean_iou": mean(ious), "right_object": mean(right), "n": len(rows)}
    kinds = [question.kind for _, question in held.scene_questions]
    for task, prompts in (("questions", held.question_prompts), ("suppressed", held.suppressed_prompts)):
        if prompts:
            replies = zip(generate(task, prompts), held.scene_questions, strict=True)
            samples[task] = right = [is_right(text, question) for (text, _), (_, question) in replies]
            summary[task] = question_summary(right, held.scene_questions)
            for kind in ("attribute", "place"):
                samples[f"{task}_{kind}"] = [hit for hit, k in zip(right, kinds) if k == kind]
    return Scores(summary, samples, [predicted_box(*reply) for reply in cue_replies])


def baselines(policy: Policy, held: HeldOutSet, max_new_tokens: int, cache=None) -> dict[str, float]:
    """Mean IoU of cue search by rules that need no visual search.

    The whole image as the box; a centred box of the mean cue's size; and on scenes, where the model can name
    the crop and then find that name, those two steps.
    """
    windows = [(*cue.image.size, cue.box) for cue in held.cues]  # one access per cue: it opens a photo again
    half = mean(math.sqrt((x2 - x1) * (y2 - y1)) for _, _, (x1, y1, x2, y2) in windows) / 2
    centred = [((w / 2 - half, h / 2 - half, w / 2 + half, h / 2 + half), box) for w, h, box in windows]
    summary = {"whole_image": mean(iou((0, 0, w, h), box) for w, h, box in windows)}
    summary["centre_box"] = mean(iou(*boxes) for boxes in centred)
    if not held.find_prompts:
        return summary
    processor, limits = policy.processor, (max_new_tokens, default_batch_size(policy))
    generate = partial(cached_generate, policy, {} if cache is None else cache, limits=limits)
    text, images = prompt_text(processor.family, "name"), [prompt.images for prompt in held.cue_prompts]
    replies = generate("names", [encode(processor, text, *pair) for pair in images])
    names = [(answer_of(text or "") or "").strip() for text, _ in replies]
    find_prompts = [encode_find(processor, name, full) for name, (full, _) in zip(names, images, strict=True)]
    found = zip(generate("named", find_prompts), held.cues, strict=True)
    rows = [box_score(*reply, cue.box, cue) for reply, cue in found]
    summary["name_then_find"] = mean(row and row["iou"] for row in rows)
    right = (name == target_object(cue).name for name, cue in zip(names, held.cues, strict=True))
    return summary | {"crop_named_right": mean(right)}
