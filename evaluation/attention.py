"""Does the model attend to the evidence, can it find it, and does its answer depend on that (Figs. 2 and 4)?

Attention-in-Box reads the attention of one position: that which predicts the first token of the answer. So
all tokens of a prompt but the last run as usual, and only the last one runs with attention that returns its
weights: [heads, P] per layer, not [heads, P, P]. At 16,000 image tokens that is megabytes, not gigabytes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil, floor, isfinite
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from evaluation.heldout import HeldOutSet, encode_find, predicted_box, question_names
from evaluation.replies import box_of
from evaluation.reply_cache import Reply, cached_generate, cached_values, compute_in_halves
from evaluation.scores import Scores, kind_rows, mean, split, with_parts
from policy import Policy, collate, group_mask, run_text
from prompts import BoxFrame, EncodedPrompt, Processor
from reward import Box, iou
from tiny.scenes import Question

BANDS = ("IoU 0", "IoU < 0.5", "IoU ≥ 0.5")  # of predicted boxes, Fig. 2
ROWS = {f"answers at base's {band}": band for band in BANDS}  # row of the printed table: list of samples
ROWS |= {"found (IoU ≥ 0.5)": "found"} | kind_rows("  {} of {} objects, found", "found")
ROWS |= {"found but misread": "misread", "not found and wrong": "not found"}
ROWS |= {"Attention-in-Box": "aib", "  by chance": "chance", "Peak-in-Box": "peak"}
ROWS |= kind_rows("  {} of {} objects, in box", "aib")

# ---------------------------------------------------------------- attention to the evidence


def append_to_prompt(processor: Processor, prompt: EncodedPrompt, text: str) -> EncodedPrompt:
    """A prompt with the beginning of its reply, whose last token then predicts what comes next."""
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]  # [n]
    types = torch.cat([prompt.mm_token_type_ids, torch.zeros_like(ids)])  # [P + n]
    return replace(prompt, input_ids=torch.cat([prompt.input_ids, ids]), mm_token_type_ids=types)


def before_answer(processor: Processor, reply: str) -> tuple[str, str]:
    """The part of a reply before the first token of its answer, and that token's text.

    The answer is what <answer> holds, for a box its first digit, or without an answer block the whole reply.

    "<think>top left</think><answer>[12, 34, …]" gives ("<think>top left</think><answer>[", "1").
    """
    reply = reply.removeprefix(processor.family.opening)  # the prompt ends with it already
    before, tag, after = reply.partition("<answer>")
    start, answer = (before + tag, after) if tag else ("", reply)
    # Tokens are skipped, not characters: most words begin with their space, and are other tokens without it.
    token_ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    tokens = [processor.tokenizer.decode(token_id) for token_id in token_ids]
    num_skipped = next((i for i, text in enumerate(tokens) if text.strip() not in ("", "[")), len(tokens))
    return start + "".join(tokens[:num_skipped]), "".join(tokens[num_skipped:][:1]).strip()


@torch.no_grad()
def attention_maps(policy: Policy, prompts: list[EncodedPrompt]) -> list[Tensor]:
    """Attention of each prompt's last token to its full image, averaged over the heads.

    Returns [layers, rows, columns] for each prompt: one value per image token, on the grid of image_grid_thw
    divided by the merge size.
    """
    batch, cache = collate(policy, prompts), DynamicCache()
    # All tokens but the last fill the cache, in the usual fast attention.
    earlier = batch.input_ids[:, :-1], batch.segment_ids[:, :-1], batch.position_ids[..., :-1]
    run_text(policy, *earlier, prompts, cache)
    # SDPA returns no weights. Eager attention does, but adds its mask, so a bool mask would hide nothing.
    visible, dtype = group_mask(batch.segment_ids, 1), policy.base_model.dtype  # [B, 1, 1, P]
    mask = torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)
    kwargs = dict(attention_mask=mask, position_ids=batch.position_ids[..., -1:], past_key_values=cache)
    config = policy.base_model.config.get_text_config()
    previous, config._attn_implementation = config._attn_implementation, "eager"
    try:
        output = policy.base_model.model(batch.input_ids[:, -1:], output_attentions=True, **kwargs)
    finally:
        config._attn_implementation = previous
    rows = [layer[:, :, 0].float().mean(1) for layer in output.attentions]  # layers × [B, P]
    weights = torch.stack(rows, 1)  # [B, layers, P]
    maps, merge_size = [], policy.processor.image_processor.merge_size
    is_image = (batch.input_ids == policy.base_model.config.image_token_id).cpu()  # [B, P]
    for row, is_image_row, prompt in zip(weights.cpu(), is_image, prompts, strict=True):
        height, width = (int(n) // merge_size for n in prompt.images[0].grid_thw[1:])
        columns = is_image_row.nonzero()[: height * width, 0]  # the full image's tokens come first
        maps.append(row[:, columns].view(-1, height, width))  # [layers, rows, columns]
    return maps


def touched_cells(boxes: list[Box], size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Which image tokens [rows, columns] touch a box; boxes in pixels of an image of size (width, height)."""
    inside = torch.zeros(shape, dtype=torch.bool)
    x, y = shape[1] / size[0], shape[0] / size[1]  # tokens per pixel
    for x1, y1, x2, y2 in boxes:
        inside[max(0, floor(y1 * y)) : ceil(y2 * y), max(0, floor(x1 * x)) : ceil(x2 * x)] = True
    return inside


@dataclass
class AttentionStats:
    """The share of the attention to an image that is on tokens that touch a box."""

    aib: list[float]  # Attention-in-Box of each layer
    mean_aib: float  # of the map averaged over the layers
    peak: float  # Peak-in-Box: 1 if the highest token of that map touches a box
    chance: float  # the share of tokens that touch a box


def attention_in_box(maps: Tensor, boxes: list[Box], size: tuple[int, int]) -> AttentionStats:
    """Attention-in-Box of maps [layers, rows, columns]: mass on tokens that touch a box ÷ mass on the image.

    Boxes in pixels of an image of size (width, height).
    """
    inside = touched_cells(boxes, size, maps.shape[1:])  # [rows, columns]
    average = maps.mean(0)  # [rows, columns]
    aib = (maps * inside).sum((1, 2)) / maps.sum((1, 2))  # [layers]
    mean_aib = (average * inside).sum() / average.sum()
    peak, chance = inside.flatten()[average.argmax()], inside.float().mean()
    return AttentionStats(aib.tolist(), mean_aib.item(), float(peak), chance.item())


def measure_attention(
    policy: Policy, cache: dict, name: str, prompts: Sequence, boxes: list[list[Box]], batch: int
) -> list[dict | None]:
    """AttentionStats of each prompt as a dict, cached as `name/index`.

    None where memory ran out or float16 overflowed. boxes: for each prompt, in pixels of its full image.
    batch: prompts per batch.
    """

    def compute(indices: range) -> list[dict]:
        chunk = [prompts[i] for i in indices]
        rows = zip(attention_maps(policy, chunk), indices, chunk, strict=True)
        stats = (attention_in_box(maps, boxes[i], p.images[0].size) for maps, i, p in rows)
        return [asdict(sample) if isfinite(sample.mean_aib) else None for sample in stats]

    return cached_values(cache, name, range(len(prompts)), batch, partial(compute_in_halves, compute))


def attention_summary(stats: list[dict | None]) -> dict[str, Any]:
    """Means of the stats that there are, also layer by layer (Fig. 4)."""
    measured = [sample for sample in stats if sample is not None]
    by_layer = [mean(layer) for layer in zip(*(sample["aib"] for sample in measured), strict=True)]
    means = {key: mean(sample[key] for sample in measured) for key in ("mean_aib", "peak", "chance")}
    return {"n": len(measured), "aib_by_layer": by_layer} | means


def add_attention(scores: Scores, stats: list[dict | None], names: Sequence = ()) -> None:
    """Adds attention to a model's scores: samples and their means, also under each name of a sample."""
    for task, key in (("aib", "mean_aib"), ("chance", "chance"), ("peak", "peak")):
        scores.add(task, [sample and sample[key] for sample in stats], names)
    scores.summary["attention"] = with_parts(attention_summary, stats, names)


# ---------------------------------------------------------------- found evidence against right answers


def box_ious(replies: list[Reply], boxes: list[Box]) -> list[float | None]:
    """IoU of each reply's box with the true one, in pixels of the image.

    0 where a reply has no box, None where there is no reply.
    """
    predicted = [predicted_box(*reply, box_of) for reply in replies]
    ious = [iou(box, true_box) if box else 0.0 for box, true_box in zip(predicted, boxes, strict=True)]
    return [None if text is None else value for (text, _), value in zip(replies, ious, strict=True)]


def band(value: float) -> str:
    return BANDS[0] if value == 0 else BANDS[1] if value < 0.5 else BANDS[2]


def grounding_summary(pairs: list[tuple[float | None, float | None]]) -> dict[str, Any]:
    """Are answers right where the evidence is found (Fig. 2)? Accuracy by band, IoU by answer, and counts.

    pairs: for each question the IoU of the box, and whether the answer is right (1 or 0).
    """
    pairs = [pair for pair in pairs if None not in pair]
    hits = {name: [hit for value, hit in pairs if band(value) == name] for name in BANDS}
    by_band = {name: {"accuracy": mean(part), "n": len(part)} for name, part in hits.items()}
    summary: dict[str, Any] = {"n": len(pairs), "accuracy": by_band}
    for name, answer in (("right", 1.0), ("wrong", 0.0)):
        values = [value for value, hit in pairs if hit == answer]
        found = mean(value >= 0.5 for value in values)
        summary[name] = {"mean_iou": mean(values), "found": found, "n": len(values)}
    outcomes = [(value >= 0.5, hit == 1) for value, hit in pairs]  # (the box is found, the answer is right)
    names = ("found and right", "found but misread", "not found but right", "not found and wrong")
    cells = ((True, True), (True, False), (False, True), (False, False))
    return summary | {"counts": {name: outcomes.count(cell) for name, cell in zip(names, cells)}}


def add_grounding(scores: Scores, ious: list, right: list, base: Scores, names: Sequence = ()) -> None:
    """Adds grounding to a model's scores: IoUs and right answers (1 or 0) of the same questions.

    base: the scores of the base model. Its IoUs choose the band of a sample, so before and after are paired.
    names: of each question; what is found counts under each of them too.
    """
    pairs = list(zip(ious, right, strict=True))
    scores.summary["grounding"] = with_parts(grounding_summary, pairs, names)
    scores.add("grounding", ious, names)
    by_band = split(right, [() if iou is None else (band(iou),) for iou in base.samples["grounding"]])
    scores.samples |= {name: by_band.get(name, []) for name in BANDS}
    pairs = [None if None in pair else pair for pair in pairs]
    scores.add("found", [pair and float(pair[0] >= 0.5) for pair in pairs], names)
    scores.samples["misread"] = [pair and float(pair[0] >= 0.5 and not pair[1]) for pair in pairs]
    scores.samples["not found"] = [pair and float(pair[0] < 0.5 and not pair[1]) for pair in pairs]


# ---------------------------------------------------------------- both, on the questions about scenes


def reply_prefix(question: Question, frame: BoxFrame) -> str:
    """What the embedded model writes before the first token of its answer, if its thought is right."""
    box = frame.to_text(question.evidence.box) if question.kind == "place" else ""
    return f"<think> {question.evidence.name}{box}</think><answer>"


def prefixed_questions(processor: Processor, held: HeldOutSet) -> list[EncodedPrompt]:
    """The prompts of the held-out questions, each with the beginning of a right reply."""
    pairs = zip(held.question_prompts, held.scene_questions, strict=True)
    return [append_to_prompt(processor, prompt, reply_prefix(q, prompt.frame)) for prompt, (_, q) in pairs]


def analyse_questions(
    policy: Policy, held: HeldOutSet, scores: Scores, base: Scores, cache: dict, name: str, limits: tuple
) -> None:
    """Adds grounding and attention of every held-out question to a model's scores, also by kind and size.

    base: those of the base model, which is analysed first. limits: the longest reply in tokens, and prompts
    per batch.
    """
    questions, right = [question for _, question in held.scene_questions], scores.samples["questions"]
    boxes, names = [q.evidence.box for q in questions], [question_names(q) for q in questions]
    # Found by what the question itself says of the object, which is never the answer: "the red object".
    texts = [question.text.rpartition(" the ")[2].rstrip("?") for question in questions]
    pairs = zip(texts, held.question_prompts, strict=True)
    find_prompts = [encode_find(policy.processor, text, prompt.images[0]) for text, prompt in pairs]
    ious = box_ious(cached_generate(policy, cache, f"{name}/grounding", find_prompts, limits), boxes)
    add_grounding(scores, ious, right, base, names)
    prompts = prefixed_questions(policy.processor, held)
    stats = measure_attention(policy, cache, f"{name}/looks", prompts, [[box] for box in boxes], limits[1])
    add_attention(scores, stats, names)
