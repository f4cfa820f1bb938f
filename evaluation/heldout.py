"""The held-out set: what a model does on images that it was not trained on, and how its replies are scored.

Three tasks on scenes: cue search (image and crop, what LOCUS trains), finding by text, and questions about
the detail, the shape or the place of a tiny, small or large object. The last two show an ordinary full image
and no crop. Each question comes a second time with everything but its evidence black (context suppression,
the paper's Table 1). On photos there is cue search alone: we do not know their objects.
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
from evaluation.scores import Scores, mean, paired, split
from policy import Policy, compute_image_features
from prompts import BoxFrame, EncodedPrompt, ProcessedImage, Processor, encode, prompt_text
from reward import Box, answer_of, format_reward, iou, parse_box
from tiny import scenes
from tiny.scenes import Question, Scene, SceneObject

# Key of a cue's box_score: its list of samples.
CUE_SAMPLES = {"iou": "cue", "right": "cue_right", "parsed": "cue_parsed", "format": "cue_format"}
CUE_SAMPLES |= {"detail": "named_detail"}


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


def build_heldout_set(policy: Policy, cues: Cues, n: int, num_questions: int | None = None) -> HeldOutSet:
    """n held-out cues; of scenes also n prompts to find by text, and questions.

    num_questions: of each kind and size (default: n / 3).
    """
    processor = policy.processor
    if cues[0].scene is None:
        photo_cues = LazyList(cues.__getitem__, range(n))  # cue i is the same at each access
        return HeldOutSet(photo_cues, LazyList(partial(encode_cue, processor, source="object"), photo_cues))
    held = HeldOutSet([], [])
    for index in tqdm(range(n), desc="held-out cues", leave=False):
        held.cues.append(cue := cues[index])
        held.cue_prompts.append(encode_cue(processor, cue, "object"))
        target = target_object(cue)
        text = target.name if cue.scene.is_unique(target) else target.description
        held.find_prompts.append(encode_find(processor, text, held.cue_prompts[-1].images[0]))
        # In fixed batches, whatever runs first: in other batches the last digits of features would differ.
        compute_image_features(policy, held.cue_prompts[-1:])
    num_questions = num_questions or -(-n // 3)
    missing = {(kind, size): num_questions for kind in scenes.KINDS for size in scenes.SIDES}
    for index in takewhile(lambda _: any(missing.values()), count()):
        # Scenes of their own, as crowded as those of the cues: drawn ten times as fast as cues.
        rng = random.Random(f"{cues.split}/{cues.seed}/questions/{index}")
        scene = scenes.draw_layout(rng, len(held.cues[index % n].scene.objects))
        possible = [q for q in scenes.questions(scene) if missing.get((q.kind, q.evidence.size))]
        # One of each kind: the last of them, which is of the size that lacks most.
        rng.shuffle(possible)
        possible.sort(key=lambda q: missing[q.kind, q.evidence.size])
        possible = list({q.kind: q for q in possible}.values())
        if possible:
            add_questions(policy, held, scene, possible)
        for q in possible:
            missing[q.kind, q.evidence.size] -= 1
    return held


def add_questions(policy: Policy, held: HeldOutSet, scene: Scene, questions: list[Question]) -> None:
    """Adds questions about a scene: on the full image, and with everything but their evidence black."""
    image = full_image = scenes.render(scene)
    for question in questions:
        text = prompt_text(policy.processor.family, "string", question=question.text)
        prompt = encode(policy.processor, text, full_image)
        full_image = prompt.images[0]  # processed once for all questions about it
        suppressed = scenes.keep_only(image, question.evidence.box)
        held.scene_questions.append((scene, question))
        held.question_prompts.append(prompt)
        held.suppressed_prompts.append(encode(policy.processor, text, suppressed))
    new = slice(-len(questions), None)
    compute_image_features(policy, held.question_prompts[new] + held.suppressed_prompts[new])


# ---------------------------------------------------------------- scores of replies, and their summaries


def object_at(scene: Scene, box: Box) -> SceneObject | None:
    """The object of a scene whose centre is nearest to the middle of a box; None where it is not touched."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    nearest = min(scene.objects, key=lambda o: math.dist(o.centre, (x, y)))
    return nearest if scenes.touches(nearest.box, box) else None


def target_object(cue: Cue) -> SceneObject:
    """The object that a scene's cue window shows: the one that it was drawn for, if there is one."""
    return cue.target or max(cue.scene.objects, key=lambda o: scenes.visible_area(o.box, cue.box))


def neighbour_fraction(cue: Cue) -> float:
    """How much of another object than its target a scene's cue window shows: the largest share of its box."""
    others = [o for o in cue.scene.objects if o != target_object(cue)]
    return max((scenes.visible_fraction(o.box, cue.box) for o in others), default=0.0)


def predicted_box(text: str | None, frame: BoxFrame, parse: Callable = parse_box) -> Box | None:
    """The box of a reply in pixels of the full image; None where it has no valid box, or no text."""
    box = parse(text or "")
    return frame.to_pixels(box) if box else None


def box_score(text: str | None, frame: BoxFrame, true_box: Box, cue: Cue) -> dict[str, float] | None:
    """Scores of a reply that should give a box; true_box: in pixels of the full image.

    Its IoU, whether it parses, its format reward; on scenes also whether the object nearest to its middle is
    the cue's target, and whether the thought names a detail: what is inside. None where there is no reply.
    """
    if text is None:
        return None
    box = predicted_box(text, frame)
    score = {"iou": iou(box, true_box) if box else 0.0, "parsed": float(box is not None)}
    score |= {"format": format_reward(text), "right": None, "detail": None}
    if cue.scene:
        score["right"] = float(box is not None and object_at(cue.scene, box) == target_object(cue))
        score["detail"] = float(" inside" in text.partition("</think>")[0])
    return score


def cue_summary(rows: list[dict[str, float] | None]) -> dict[str, float]:
    """Means of box scores (Table 10); `errors` counts the prompts without a reply, if any."""
    rows, num_rows = [row for row in rows if row is not None], len(rows)
    summary = {"mean_iou": mean(row["iou"] for row in rows)}
    summary["mean_iou_parsed"] = mean(row["iou"] for row in rows if row["parsed"])
    summary |= {f"acc{percent}": mean(row["iou"] >= percent / 100 for row in rows) for percent in (50, 75)}
    names = {"right_object": "right", "parse_rate": "parsed", "format": "format", "named_detail": "detail"}
    summary |= {key: mean(row[name] for row in rows) for key, name in names.items()} | {"n": len(rows)}
    return summary | ({"errors": num_rows - len(rows)} if len(rows) < num_rows else {})


def is_right(text: str | None, question: Question) -> float | None:
    """1 if a reply's answer block is exactly the answer to a scene's question, else 0; None: no reply."""
    return None if text is None else float((answer_of(text) or "").strip(" .").lower() == question.answer)


def question_names(question: Question) -> tuple[str, str]:
    """What a question counts under: its kind, and its kind with the size of its object."""
    return question.kind, f"{question.kind}_{question.evidence.size}"


def question_summary(right: list[float | None], scene_questions: list[tuple[Scene, Question]]) -> dict:
    """Accuracy over all questions; by their kind, also with the size of its object; and where it falls.

    That is by number of objects in a scene, by size, and by number of image tokens that the object touches.
    """
    summary = {"accuracy": mean(right), "n": len(right), "by_kind": {}}
    for name, hits in split(right, [question_names(q) for _, q in scene_questions]).items():
        part = paired([0.0] * len(hits), hits)  # the change from 0 is the mean itself
        summary["by_kind"][name] = {"accuracy": part.pop("change")} | part
    facts = [(len(s.objects), q.evidence.size, scenes.num_cells(q.evidence.box)) for s, q in scene_questions]
    for key, column in zip(("by_objects", "by_size", "by_tokens"), zip(*facts, strict=True), strict=True):
        summary[key] = {str(value): mean(hits) for value, hits in sorted(split(right, zip(column)).items())}
    return summary


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
    replies = generate("cue search", held.cue_prompts)
    pairs = zip(replies, held.cues, strict=True)
    rows, sizes, photos = zip(*((box_score(*reply, c.box, c), [c.size], c.name) for reply, c in pairs))
    by_size = {size: cue_summary(part) for size, part in split(rows, sizes).items()}
    boxes = [predicted_box(*reply) for reply in replies]
    scores = Scores({"cue": cue_summary(rows), "cue_by_size": by_size}, {}, boxes)
    for key, task in CUE_SAMPLES.items():
        # Cues of one photo are not independent. The scenes, which have no names, have one cue each.
        scores.add(task, [row and row[key] for row in rows], sizes, photos)
    if held.find_prompts:
        replies = zip(generate("find", held.find_prompts), held.cues, strict=True)
        rows = [box_score(*reply, target_object(cue).box, cue) for reply, cue in replies]
        for key, task in (("iou", "find"), ("right", "find_right")):
            scores.add(task, [row and row[key] for row in rows], sizes)
        figures = cue_summary(rows)
        scores.summary["find"] = {key: figures[key] for key in ("mean_iou", "right_object", "n")}
    for task, prompts in (("questions", held.question_prompts), ("suppressed", held.suppressed_prompts)):
        if prompts:
            replies = zip(generate(task, prompts), held.scene_questions, strict=True)
            right = [is_right(text, question) for (text, _), (_, question) in replies]
            scores.add(task, right, [question_names(question) for _, question in held.scene_questions])
            scores.summary[task] = question_summary(right, held.scene_questions)
    return scores


def baselines(
    policy: Policy, held: HeldOutSet, max_new_tokens: int, cache=None, batch=None
) -> dict[str, float]:
    """Mean IoU of cue search by rules that need no visual search.

    The whole image as the box; a centred box of the mean cue's size; and on scenes, where the model can name
    the crop and then find that name, those two steps. On scenes also the share of crops named right, and of
    windows that show more than 10 % of another object.
    """
    windows = [(*cue.image.size, cue.box) for cue in held.cues]  # one access per cue: it opens a photo again
    half = mean(math.sqrt((x2 - x1) * (y2 - y1)) for _, _, (x1, y1, x2, y2) in windows) / 2
    centred = [((w / 2 - half, h / 2 - half, w / 2 + half, h / 2 + half), box) for w, h, box in windows]
    summary = {"whole_image": mean(iou((0, 0, w, h), box) for w, h, box in windows)}
    summary["centre_box"] = mean(iou(*boxes) for boxes in centred)
    if not held.find_prompts:
        return summary
    processor, limits = policy.processor, (max_new_tokens, batch or default_batch_size(policy))
    generate = partial(cached_generate, policy, {} if cache is None else cache, limits=limits)
    text, images = prompt_text(processor.family, "name"), [prompt.images for prompt in held.cue_prompts]
    replies = generate("names", [encode(processor, text, *pair) for pair in images])
    names = [(answer_of(text or "") or "").strip() for text, _ in replies]
    find_prompts = [encode_find(processor, name, full) for name, (full, _) in zip(names, images, strict=True)]
    found = zip(generate("named", find_prompts), held.cues, strict=True)
    rows = [box_score(*reply, cue.box, cue) for reply, cue in found]
    summary["name_then_find"] = mean(row and row["iou"] for row in rows)
    targets = [target_object(cue) for cue in held.cues]
    right = (name in (o.name, o.description) for name, o in zip(names, targets, strict=True))
    crowded = mean(neighbour_fraction(cue) > 0.1 for cue in held.cues)
    return summary | {"crop_named_right": mean(right), "windows_with_another_object": crowded}
