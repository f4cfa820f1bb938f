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

from evaluation.replies import box_of
from evaluation.scores import Scores, mean
from policy import Policy, collate, group_mask, run_text
from prompts import BoxFrame, Encoded, Tools
from reward import Box, iou

BANDS = ("IoU 0", "IoU < 0.5", "IoU ≥ 0.5")  # Fig. 2's

# ---------------------------------------------------------------- where it looks


def begin_answer(tools: Tools, item: Encoded, text: str) -> Encoded:
    """A prompt with the first words of its answer: what comes next is then the token to look at."""
    more = tools.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]  # [n]
    return replace(
        item, ids=torch.cat([item.ids, more]), kinds=torch.cat([item.kinds, torch.zeros_like(more)])
    )


@torch.no_grad()
def attention_maps(policy: Policy, items: list[Encoded]) -> list[Tensor]:
    """Attention from each prompt's last token to its full image: [layers, rows, columns] of image tokens.

    Averaged over the heads. The rows and columns are those of image_grid_thw divided by the merge size.
    """
    batch, cache = collate(policy, items), DynamicCache()
    run_text(policy, batch.ids[:, :-1], batch.segments[:, :-1], batch.positions[..., :-1], items, cache)
    # sdpa gives no weights, and eager attention adds its mask: a boolean one would hide nothing.
    seen = group_mask(batch.segments, queries=1)  # [B, 1, 1, P]
    mask = torch.zeros(seen.shape, dtype=policy.whole.dtype, device=policy.device)
    mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    ways = dict(attention_mask=mask, position_ids=batch.positions[..., -1:], past_key_values=cache)
    config = policy.whole.config.get_text_config()
    usual, config._attn_implementation = config._attn_implementation, "eager"
    try:
        run = policy.whole.model(batch.ids[:, -1:], use_cache=True, output_attentions=True, **ways)
    finally:
        config._attn_implementation = usual
    rows = torch.stack([layer[:, :, 0].float().mean(1) for layer in run.attentions], 1)  # [B, layers, P]
    maps, merge = [], policy.tools.image_processor.merge_size
    image = policy.whole.config.image_token_id
    for row, ids, item in zip(rows.cpu(), batch.ids.cpu(), items, strict=True):
        height, width = (int(n) // merge for n in item.pictures[0].grid[1:])
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
class Looking:
    """How much of the attention to an image is in the boxes; `chance`: the share of tokens that touch one."""

    aib: list[float]  # a layer each
    mean_aib: float  # of the map averaged over the layers
    peak: float  # 1 if that map's highest token touches a box
    chance: float


def looking(layers: Tensor, boxes: list[Box], size: tuple[int, int]) -> Looking:
    """Attention-in-Box of maps [layers, rows, columns]: the mass on tokens that touch a box over all mass."""
    inside = touched_cells(boxes, size, layers.shape[1:])  # [rows, columns]
    mean = layers.mean(0)  # [rows, columns]
    aib = (layers * inside).sum((1, 2)) / layers.sum((1, 2))  # [layers]
    peak = inside.flatten()[mean.argmax()]
    mean_aib = (mean * inside).sum() / mean.sum()
    return Looking(aib.tolist(), mean_aib.item(), float(peak), inside.float().mean().item())


def look(
    policy: Policy,
    known: MutableMapping,
    name: str,
    items: Sequence[Encoded],
    boxes: list[list[Box]],
    batch: int,
) -> list[dict | None]:
    """Attention-in-Box and Peak-in-Box of each prompt, boxes in pixels of its image; None: memory ran out."""
    for start in tqdm(range(0, len(items), batch), desc=name, leave=False):
        some = range(start, min(start + batch, len(items)))
        if all(f"{name}/{i}" in known for i in some):
            continue
        chunk = [items[i] for i in some]
        try:
            seen = zip(some, chunk, attention_maps(policy, chunk), strict=True)
            looks = {i: asdict(looking(maps, boxes[i], item.pictures[0].size)) for i, item, maps in seen}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            looks = dict.fromkeys(some)
        for i in (i for i in some if f"{name}/{i}" not in known):
            known[f"{name}/{i}"] = looks[i]
    return [known[f"{name}/{i}"] for i in range(len(items))]


def add_looking(scores: Scores, looks: list[dict | None]) -> None:
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
