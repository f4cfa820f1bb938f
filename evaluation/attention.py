"""Does the model look at the evidence, does it find it, and do its answers hang on that (Figs. 2 and 4)?

Attention-in-Box: the attention of one position counts, the one that predicts the first token of the answer.
So all of a prompt but its last token is read as ever, and only that token goes through attention that can be
looked at: weights [heads, P] a layer, not [heads, P, P]; at 16,000 image tokens megabytes, not gigabytes.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, floor
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from evaluation.heldout import HeldOutSet
from evaluation.replies import box_of
from evaluation.reply_cache import cached_generate
from evaluation.scores import Scores, mean
from policy import Policy, collate, group_mask, run_text
from prompts import BoxFrame, EncodedPrompt, Processor, encode, prompt_text
from reward import Box, iou
from tiny.scenes import Question

BANDS = ("IoU 0", "IoU < 0.5", "IoU ≥ 0.5")  # Fig. 2's

# ---------------------------------------------------------------- where it looks


def append_to_prompt(processor: Processor, item: EncodedPrompt, text: str) -> EncodedPrompt:
    """A prompt with the first words of its answer: what comes next is then the token to look at."""
    more = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]  # [n]
    return replace(
        item,
        input_ids=torch.cat([item.input_ids, more]),
        mm_token_type_ids=torch.cat([item.mm_token_type_ids, torch.zeros_like(more)]),
    )


def before_answer(processor: Processor, reply: str) -> tuple[str, str]:
    """The part of a reply that precedes the first token of its answer, and that token's text.

    The answer is what <answer> holds, for a box its first digit; without such a block it is the whole reply.
    """
    reply = reply.removeprefix(processor.family.opening)
    _, opened, answer = reply.partition("<answer>")
    answer = answer if opened else reply
    answer = answer.lstrip().removeprefix("[")
    prefix = reply[: len(reply) - len(answer)]
    token_ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    return prefix, processor.tokenizer.decode(token_ids[:1]).strip()


@torch.no_grad()
def attention_maps(policy: Policy, items: list[EncodedPrompt]) -> list[Tensor]:
    """Attention from each prompt's last token to its full image: [layers, rows, columns] of image tokens.

    Averaged over the heads. The rows and columns are those of image_grid_thw divided by the merge size.
    """
    batch, cache = collate(policy, items), DynamicCache()
    run_text(
        policy, batch.input_ids[:, :-1], batch.segment_ids[:, :-1], batch.position_ids[..., :-1], items, cache
    )
    # sdpa gives no weights, and eager attention adds its mask: a boolean one would hide nothing.
    seen = group_mask(batch.segment_ids, num_queries=1)  # [B, 1, 1, P]
    mask = torch.zeros(seen.shape, dtype=policy.base_model.dtype, device=policy.device)
    mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    ways = dict(attention_mask=mask, position_ids=batch.position_ids[..., -1:], past_key_values=cache)
    config = policy.base_model.config.get_text_config()
    usual, config._attn_implementation = config._attn_implementation, "eager"
    try:
        run = policy.base_model.model(batch.input_ids[:, -1:], use_cache=True, output_attentions=True, **ways)
    finally:
        config._attn_implementation = usual
    rows = torch.stack([layer[:, :, 0].float().mean(1) for layer in run.attentions], 1)  # [B, layers, P]
    maps, merge = [], policy.processor.image_processor.merge_size
    image = policy.base_model.config.image_token_id
    for row, ids, item in zip(rows.cpu(), batch.input_ids.cpu(), items, strict=True):
        height, width = (int(n) // merge for n in item.images[0].grid_thw[1:])
        cells = (ids == image).nonzero()[: height * width, 0]  # the full image's tokens come first
        maps.append(row[:, cells].view(-1, height, width))  # [layers, rows, columns]
    return maps


def touched_cells(boxes: list[Box], size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Image tokens [rows, columns] that touch a box; boxes in pixels of an image of size (width, height)."""
    inside = torch.zeros(shape, dtype=torch.bool)
    x, y = shape[1] / size[0], shape[0] / size[1]  # tokens a pixel
    for x1, y1, x2, y2 in boxes:
        inside[max(0, floor(y1 * y)) : ceil(y2 * y), max(0, floor(x1 * x)) : ceil(x2 * x)] = True
    return inside


@dataclass
class AttentionStats:
    """How much of the attention to an image is in the boxes; `chance`: the share of tokens that touch one."""

    aib: list[float]  # a layer each
    mean_aib: float  # of the map averaged over the layers
    peak: float  # 1 if that map's highest token touches a box
    chance: float


def attention_in_box(layers: Tensor, boxes: list[Box], size: tuple[int, int]) -> AttentionStats:
    """Attention-in-Box of maps [layers, rows, columns]: the mass on tokens that touch a box over all mass."""
    inside = touched_cells(boxes, size, layers.shape[1:])  # [rows, columns]
    mean = layers.mean(0)  # [rows, columns]
    aib = (layers * inside).sum((1, 2)) / layers.sum((1, 2))  # [layers]
    peak = inside.flatten()[mean.argmax()]
    mean_aib = (mean * inside).sum() / mean.sum()
    return AttentionStats(aib.tolist(), mean_aib.item(), float(peak), inside.float().mean().item())


def measure_attention(
    policy: Policy,
    cache: MutableMapping,
    name: str,
    items: Sequence[EncodedPrompt],
    boxes: list[list[Box]],
    batch: int,
) -> list[dict | None]:
    """Attention-in-Box and Peak-in-Box of each prompt, boxes in pixels of its image; None: memory ran out."""
    for start in tqdm(range(0, len(items), batch), desc=name, leave=False):
        some = range(start, min(start + batch, len(items)))
        if all(f"{name}/{i}" in cache for i in some):
            continue
        chunk = [items[i] for i in some]
        try:
            seen = zip(some, chunk, attention_maps(policy, chunk), strict=True)
            looks = {
                i: asdict(attention_in_box(maps, boxes[i], item.images[0].size)) for i, item, maps in seen
            }
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            looks = dict.fromkeys(some)
        for i in (i for i in some if f"{name}/{i}" not in cache):
            cache[f"{name}/{i}"] = looks[i]
    return [cache[f"{name}/{i}"] for i in range(len(items))]


def add_attention(scores: Scores, looks: list[dict | None]) -> None:
    """Attention into a model's scores: the means over the samples, layer by layer too."""
    there = [seen for seen in looks if seen is not None]
    for name, key in (("aib", "mean_aib"), ("chance", "chance"), ("peak", "peak")):
        scores.samples[name] = [seen and seen[key] for seen in looks]
    layers = [mean(column) for column in zip(*(seen["aib"] for seen in there), strict=True)]
    scores.summary["attention"] = {"n": len(there), "aib_by_layer": layers}
    scores.summary["attention"] |= {
        k: mean(seen[k] for seen in there) for k in ("mean_aib", "peak", "chance")
    }


# ---------------------------------------------------------------- grounding against answers


def box_ious(said: list[tuple[str | None, BoxFrame]], boxes: list[Box]) -> list[float | None]:
    """IoU of answered boxes with the true ones, in pixels; 0 where none parses, None where memory ran out."""
    out: list[float | None] = []
    for (text, frame), true_box in zip(said, boxes, strict=True):
        box = text and box_of(text)
        out.append(None if text is None else iou(frame.to_pixels(box), true_box) if box else 0.0)
    return out


def band(value: float) -> str:
    return BANDS[0] if value == 0 else BANDS[1] if value < 0.5 else BANDS[2]


def grounding_summary(ious: list[float | None], right: list[float | None]) -> dict[str, Any]:
    """Do found evidence and right answers go together (Fig. 2)? And the 2 × 2 of found and answered."""
    both = [(box, hit) for box, hit in zip(ious, right, strict=True) if None not in (box, hit)]
    out: dict[str, Any] = {"n": len(both), "accuracy": {}}
    for name in BANDS:
        hits = [hit for box, hit in both if band(box) == name]
        out["accuracy"][name] = {"accuracy": mean(hits), "n": len(hits)}
    for name, wanted in (("right", 1.0), ("wrong", 0.0)):
        some = [box for box, hit in both if hit == wanted]
        out[name] = {"mean_iou": mean(some), "found": mean(box >= 0.5 for box in some), "n": len(some)}
    cells = [(box >= 0.5, hit == 1) for box, hit in both]
    out["counts"] = {"found and right": cells.count((True, True))}
    out["counts"] |= {"found but misread": cells.count((True, False))}
    out["counts"] |= {"not found but right": cells.count((False, True))}
    return out | {"counts": out["counts"] | {"not found and wrong": cells.count((False, False))}}


def add_grounding(scores: Scores, ious: list, right: list, base: Scores) -> None:
    """Grounding into a model's scores; samples go into the bands of the base, so before and after pair."""
    scores.summary["grounding"] = grounding_summary(ious, right)
    scores.samples["grounding"] = ious
    for name in BANDS:
        pairs = zip(right, base.samples["grounding"], strict=True)
        scores.samples[name] = [hit for hit, box in pairs if box is not None and band(box) == name]
    both = [None if None in pair else pair for pair in zip(ious, right, strict=True)]
    scores.samples["found"] = [pair and float(pair[0] >= 0.5) for pair in both]
    scores.samples["misread"] = [pair and float(pair[0] >= 0.5 and not pair[1]) for pair in both]
    scores.samples["not found"] = [pair and float(pair[0] < 0.5 and not pair[1]) for pair in both]


# ---------------------------------------------------------------- both, on the questions about scenes


def reply_prefix(question: Question) -> str:
    """What the embedded model writes before the first token of its reply that depends on the evidence."""
    color, shape = question.name.split()
    given = {"What shape": color, "What color": shape}.get(question.text[:10], f"{question.name}[")
    return f"<think> {given}"


def prefixed_questions(processor: Processor, held: HeldOutSet, n: int | None = None) -> list[EncodedPrompt]:
    """The prompts of the (first n) held-out questions with the beginning of a reply, for `attention_maps`."""
    pairs = list(zip(held.question_prompts, held.scene_questions, strict=True))[:n]
    return [append_to_prompt(processor, prompt, reply_prefix(q)) for prompt, (_, q) in pairs]


def analyse_questions(
    policy: Policy,
    held: HeldOutSet,
    scores: Scores,
    base: Scores,
    cache: MutableMapping,
    name: str,
    limits: tuple,
) -> None:
    """Grounding and attention of every held-out question, into a model's scores.

    limits: the longest reply in tokens, and prompts per batch.
    """
    processor, find_prompts = policy.processor, []
    for prompt, (_, question) in zip(held.question_prompts, held.scene_questions, strict=True):
        text = prompt_text(processor.family, "text", text=question.name)
        find_prompts.append(encode(processor, text, prompt.images[0]))
    boxes = [question.box for _, question in held.scene_questions]
    ious = box_ious(cached_generate(policy, cache, f"{name}/grounding", find_prompts, limits), boxes)
    add_grounding(scores, ious, scores.samples["questions"], base)
    prompts = prefixed_questions(processor, held)
    stats = measure_attention(policy, cache, f"{name}/looks", prompts, [[box] for box in boxes], limits[1])
    add_attention(scores, stats)
