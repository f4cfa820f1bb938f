"""Instances: does the model tell an object from its twin by the crop (the paper's reason for visual cues)?

Twins have one name and one size, and differ in what is inside. Every scene is asked twice, with the window of
either twin as the crop, so a model that prefers one of the two boxes whatever it is shown scores 50 %, and is
never right for both. The windows are uncut and show no other object.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice

import torch

from data import Cue, CueConfig, encode_cue, scene_cues
from evaluation.heldout import box_score, neighbour_fraction
from evaluation.reply_cache import cached_generate, cached_values
from evaluation.scores import Scores, mean
from policy import Policy, collate, compute_image_features, token_logps
from prompts import EncodedPrompt
from tiny.scenes import SIDE

ROWS = {"twins, forced choice": "twins_forced", "twins, choice told the detail": "twins_forced_described"}
ROWS |= {"twins, each crop found": "twins_right", "twins, both crops found": "twins_swap"}
ROWS |= {"twins, detail in the thought": "twins_named_detail"}


def twin_pairs(seed: int) -> Iterator[tuple[Cue, Cue]]:
    """Held-out scenes without end: a cue for each of two twins, whose windows differ in their place alone."""
    for cue in map(scene_cues(CueConfig(), "heldout", seed, twins=True).__getitem__, count()):
        (twin,) = (o for o in cue.scene.objects if o.name == cue.target.name and o != cue.target)
        dx, dy = (twin.box[i] - cue.target.box[i] for i in (0, 1))
        x1, y1, x2, y2 = cue.box
        pair = cue, replace(cue, box=(x1 + dx, y1 + dy, x2 + dx, y2 + dy), target=twin)
        # A window that touches an edge of the image may have been cut there.
        if all(min(c.box) > 0 and max(c.box) < SIDE and neighbour_fraction(c) == 0 for c in pair):
            yield pair


def measure_twins(
    policy: Policy, n: int, seed: int, batch: int, cache: dict | None = None, name: str = "twins"
) -> dict[str, list]:
    """Scores of n pairs of twins: lists with a value per pair, but for `swap` the mean over its two crops.

    forced            is the target's box more probable than its twin's, after a thought that is their name?
    forced_described  the same after a thought that also says what is inside the target
    right             is the greedy box at the right twin? A miss is wrong
    swap              is it for both crops? 1 or 0
    named_detail      does the greedy reply's thought say what is inside?
    size              of the twins: tiny or small

    batch: prompts per batch. cache: values of an earlier, killed run, whose keys begin with `name`.
    """
    cues = [cue for pair in islice(twin_pairs(seed), n) for cue in pair]  # 2n: cue i ^ 1 is the other twin's
    prompts, cache = [], {} if cache is None else cache
    for cue in cues:
        prompts.append(encode_cue(policy.processor, cue, "object"))
        compute_image_features(policy, prompts[-1:])

    def choose(indices: range) -> list[list[float]]:
        return forced_choice(policy, [(prompts[i], cues[i], cues[i ^ 1]) for i in indices])

    forced = cached_values(cache, f"{name}/forced", range(2 * n), batch, choose)  # [2n, 2 thoughts]
    limits = policy.processor.family.max_new_tokens, batch
    replies = zip(cached_generate(policy, cache, f"{name}/replies", prompts, limits), cues, strict=True)
    rows = [box_score(*reply, cue.box, cue) or {"right": 0.0, "detail": 0.0} for reply, cue in replies]
    columns = zip(*((*values, row["right"], row["detail"]) for values, row in zip(forced, rows, strict=True)))
    pairs = [list(zip(column[::2], column[1::2], strict=True)) for column in columns]  # 4 × [n, 2 crops]
    names = ("forced", "forced_described", "right", "named_detail")
    lists = {name: [mean(pair) for pair in column] for name, column in zip(names, pairs, strict=True)}
    return lists | {"swap": [float(all(pair)) for pair in pairs[2]], "size": [cue.size for cue in cues[::2]]}


@torch.no_grad()
def forced_choice(policy: Policy, items: list[tuple[EncodedPrompt, Cue, Cue]]) -> list[list[float]]:
    """1 where a cue's box is more probable than the other twin's, else 0: [items, 2 thoughts].

    items: the prompt of a cue, the cue, and that of the other twin. The thoughts are the name and the
    description of the cue's target. Each is the same before both boxes, so it adds the same to both
    log-probabilities.
    """
    texts = [
        f"<think> {thought}</think><answer>{prompt.frame.to_text(box)}</answer>"
        for prompt, cue, other in items
        for thought in (cue.target.name, cue.target.description)
        for box in (cue.box, other.box)
    ]
    kwargs = dict(padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    tokens = policy.processor.tokenizer(texts, **kwargs).to(policy.device)
    groups = (part.unflatten(0, (-1, 4)) for part in (tokens.input_ids, tokens.attention_mask.bool()))
    batch = collate(policy, [prompt for prompt, _, _ in items])
    logps = token_logps(policy, batch, *groups).sum(-1)  # [B, 4], from [B, 4, T]
    return (logps[:, ::2] > logps[:, 1::2]).float().tolist()


def add_twins(scores: Scores, values: dict[str, list]) -> None:
    """Adds the values of measure_twins to a model's scores: samples, also by size, and their means."""
    means = {name: mean(column) for name, column in values.items() if name != "size"}
    scores.summary["twins"] = {"n": len(values["size"])} | means
    for name in means:
        scores.add(f"twins_{name}", values[name], zip(values["size"]))
