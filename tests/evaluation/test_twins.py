"""Twins: which pairs are measured, and what a model that sees the detail, or none of it, scores."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from random_models import random_policy

from data import Cue, CueConfig, encode_cue, scene_cues, size_class
from evaluation import twins
from evaluation.heldout import neighbour_fraction, object_at
from evaluation.scores import Scores, mean
from evaluation.twins import add_twins, forced_choice, measure_twins, twin_pairs
from policy import collate, token_logps
from prompts import FAMILIES, BoxFrame
from reward import Box
from tiny import scenes

FRAME = BoxFrame(scenes.SIDE, scenes.SIDE, 1000, 1000)
N = 3


@pytest.fixture(scope="module")
def policy():
    policy = random_policy("qwen3_vl")
    policy.processor.family = replace(FAMILIES["tiny"], max_new_tokens=4)
    return policy


def test_pairs_are_equal_windows_of_twins_without_neighbours_and_uncut():
    for first, second in islice(twin_pairs(0), 40):
        a, b = first.target, second.target
        assert first.scene is second.scene and {a, b} <= set(first.scene.objects) and a != b
        assert a.name == b.name and a.core != b.core and a.side == b.side
        assert first.size == second.size == size_class(second.box, scenes.SIDE, scenes.SIDE)
        for cue in (first, second):
            (x1, y1, x2, y2), (left, top, right, bottom) = cue.box, cue.target.box
            assert x1 > 0 and y1 > 0 and x2 < scenes.SIDE and y2 < scenes.SIDE
            assert x2 - x1 == y2 - y1 and abs((x1 - left) - (right - x2)) <= 1, "centred: not cut"
            assert abs((y1 - top) - (bottom - y2)) <= 1
            assert neighbour_fraction(cue) == 0
        offsets = [[w - o for w, o in zip(cue.box, cue.target.box)] for cue in (first, second)]
        assert offsets[0] == offsets[1]


def test_pairs_are_held_out_and_the_same_every_time():
    first, again, other = ([cue.box for cue, _ in islice(twin_pairs(seed), 5)] for seed in (0, 0, 1))
    assert first == again != other
    trained = scene_cues(CueConfig(), "train", 0, twins=True)
    assert first[0] != trained[0].box


def replies_of(answer, monkeypatch):
    """Replaces the replies of a model by those that `answer(cue)` gives."""
    cues = [cue for pair in islice(twin_pairs(0), N) for cue in pair]
    replies = [(answer(cue), FRAME) for cue in cues]
    monkeypatch.setattr(twins, "cached_generate", lambda *_: replies)


def reply(thought: str, box) -> str:
    return f"<think> {thought}</think><answer>{FRAME.to_text(box)}</answer>"


def other_twin(cue):
    return next(o for o in cue.scene.objects if o.name == cue.target.name and o != cue.target)


@pytest.mark.parametrize(
    ("answer", "right", "named"),
    [
        (lambda cue: reply(cue.target.description, cue.box), 1, 1),
        (lambda cue: reply(cue.text, cue.target.box), 1, 0),
        (lambda cue: reply(cue.text, other_twin(cue).box), 0, 0),
        (lambda cue: f"<think> {cue.target.description}</think><answer>nowhere</answer>", 0, 1),
        (lambda cue: None, 0, 0),
    ],
    ids=["right", "right without the detail", "the other twin", "a miss", "no memory"],
)
def test_the_greedy_box_must_be_at_the_right_twin(policy, monkeypatch, answer, right, named):
    replies_of(answer, monkeypatch)
    got = measure_twins(policy, N, 0, batch=2)
    assert (got["right"], got["swap"], got["named_detail"]) == ([right] * N, [right] * N, [named] * N)
    assert set(got["size"]) <= {"tiny", "small"} and all(len(values) == N for values in got.values())


def test_a_model_that_always_takes_the_same_twin_is_never_right_for_both(policy, monkeypatch):
    def leftmost(cue):
        return reply(cue.text, min(o.box for o in cue.scene.objects if o.name == cue.text))

    replies_of(leftmost, monkeypatch)
    got = measure_twins(policy, N, 0, batch=4)
    assert (got["right"], got["swap"]) == ([0.5] * N, [0.0] * N)


def test_forced_choice_compares_the_boxes_after_each_thought(policy):
    """Against the log-probabilities of four separate completions."""
    cues = [cue for pair in islice(twin_pairs(0), N) for cue in pair]
    prompts = [encode_cue(policy.processor, cue, "object") for cue in cues]
    items = [(prompt, cues[i], cues[i ^ 1]) for i, prompt in enumerate(prompts)]
    got, chosen = forced_choice(policy, items), set()
    for (prompt, cue, other), row in zip(items, got, strict=True):
        for thought, value in zip((cue.target.name, cue.target.description), row, strict=True):
            logps = []
            for box in (cue.box, other.box):
                text = f"<think> {thought}</think><answer>{FRAME.to_text(box)}</answer>"
                ids = policy.processor.tokenizer(text, return_tensors="pt").input_ids[None]  # [1, 1, T]
                mask = torch.ones_like(ids, dtype=torch.bool)
                with torch.no_grad():
                    logps.append(token_logps(policy, collate(policy, [prompt]), ids, mask).sum().item())
            assert value == (logps[0] > logps[1])
            chosen.add(value)
    assert chosen == {0, 1}, "always the same would prove nothing"


def test_values_are_cached_and_a_killed_run_ends_the_same(policy):
    cache = {}
    first = measure_twins(policy, N, 0, 2, cache, "before/twins")
    assert all(key.startswith("before/twins/") for key in cache) and len(cache) == 4 * N
    for key in list(cache)[3:]:
        del cache[key]
    assert measure_twins(policy, N, 0, 2, cache, "before/twins") == first


def test_scores_have_the_pairs_also_by_size():
    scores = Scores({}, {}, [])
    values = {"forced": [1.0, 0.5, 0.0], "swap": [1.0, 0.0, 0.0], "size": ["tiny", "small", "tiny"]}
    add_twins(scores, values)
    assert scores.samples["twins_forced"] == [1, 0.5, 0] and scores.samples["twins_forced_tiny"] == [1, 0]
    assert scores.summary["twins"] == {"n": 3, "forced": 0.5, "swap": pytest.approx(1 / 3)}
    assert list(scores.summary["twins"]) == ["n", "forced", "swap"], "the same order in every process"
    assert set(twins.ROWS.values()) >= {"twins_forced", "twins_swap"}


# ---------------------------------------------------------------- a control: do the pixels tell twins apart?


def best_matches(cue: Cue) -> list[Box]:
    """Where a window's pixels match its image best: all boxes with the least squared difference."""
    (width, height), (x1, y1, x2, y2) = cue.image.size, cue.box
    pixels = torch.frombuffer(bytearray(cue.image.tobytes()), dtype=torch.uint8).double()  # [H·W·3]
    pixels = pixels.view(height, width, 3).permute(2, 0, 1)  # [3, H, W]
    patch = pixels[:, y1:y2, x1:x2]  # [3, h, w]
    # Σ (image − patch)² = Σ image² · 1 − 2 Σ image · patch + Σ patch²; the last is the same everywhere.
    terms, kernels = torch.cat([pixels**2, pixels]), torch.cat([torch.ones_like(patch), -2 * patch])
    spectrum = torch.fft.rfft2(terms) * torch.fft.rfft2(kernels, s=(height, width)).conj()  # [6, H, W/2 + 1]
    distance = torch.fft.irfft2(spectrum, s=(height, width)).sum(0)  # [H, W]
    distance = distance[: height - (y2 - y1) + 1, : width - (x2 - x1) + 1]  # inside the image
    matches = (distance <= distance.min() + 0.5).nonzero()  # [matches, 2]
    return [(x, y, x + x2 - x1, y + y2 - y1) for y, x in matches.tolist()]


def match_twins(n: int, seed: int) -> float:
    """The share of n pairs for which the best matches of both windows are at the right twin."""

    def finds(cue: Cue) -> bool:
        return all(object_at(cue.scene, box) == cue.target for box in best_matches(cue))

    return mean(finds(first) and finds(second) for first, second in islice(twin_pairs(seed), n))


def test_pixels_tell_twins_apart():
    assert match_twins(40, 0) >= 0.99


def test_best_matches_against_brute_force():
    cue = scene_cues(CueConfig(), "heldout", 1)[0]
    cue.image = cue.image.crop((0, 0, 60, 50))
    pixels = np.asarray(cue.image).astype(int)
    for window in ((3, 4, 23, 20), (40, 30, 60, 50)):
        x1, y1, x2, y2 = window
        patch, (w, h) = pixels[y1:y2, x1:x2], (x2 - x1, y2 - y1)
        found = {
            (x, y, x + w, y + h)
            for y in range(50 - h + 1)
            for x in range(60 - w + 1)
            if (pixels[y : y + h, x : x + w] == patch).all()
        }
        assert set(best_matches(replace(cue, box=window))) == found and window in found


def test_a_window_of_plain_ground_matches_everywhere():
    image = scenes.render(scenes.Scene([], (20, 30, 40)))
    matches = best_matches(Cue(image, (100, 100, 140, 130), "small"))
    assert len(matches) == (256 - 40 + 1) * (256 - 30 + 1)
