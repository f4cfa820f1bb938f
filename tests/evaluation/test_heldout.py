"""Scores and summaries against hand-worked examples, on replies whose scores are certain."""

import math
import random
from dataclasses import replace

import pytest
import torch
from random_models import make_infinite, noise, random_policy

from data import CueConfig, folder_cues, scene_cues
from evaluation import heldout, reply_cache
from evaluation.heldout import box_score, build_heldout_set, cue_summary, question_summary, target_object
from evaluation.scores import Scores, paired, table
from files.errors import UserError
from prompts import FAMILIES, BoxFrame
from tiny import scenes
from tiny.scenes import Question
from training.checks import check_frame

FRAME = BoxFrame(scenes.SIDE, scenes.SIDE, 1000, 1000)


@pytest.fixture(scope="module")
def policy():
    policy = random_policy("qwen3_vl")
    policy.processor.family = replace(FAMILIES["tiny"])
    return policy


def reply_with(box, think: str = "x") -> str:
    return f"<think>{think}</think><answer>{FRAME.to_text(box)}</answer>"


def test_box_score_tells_the_right_object_from_the_others():
    cue = scene_cues(CueConfig(), "heldout", 0)[3]
    mine = target_object(cue)
    other = next(t for t in cue.scene.objects if t != mine)
    right = box_score(reply_with(cue.box), FRAME, cue.box, cue)
    assert right["iou"] > 0.9 and right["parsed"] == right["format"] == right["right"] == 1
    wrong = box_score(reply_with(other.box), FRAME, cue.box, cue)
    assert wrong["iou"] < 0.2 and wrong["right"] == 0 and wrong["parsed"] == 1
    no_box = box_score("<think>x</think><answer>nowhere</answer>", FRAME, cue.box, cue)
    assert no_box == {"iou": 0, "parsed": 0, "format": 1, "right": 0}
    photo = box_score("<answer>[990, 990, 1000, 1000]</answer>", FRAME, cue.box, replace(cue, scene=None))
    assert photo["parsed"] == 1 and photo["format"] == 0 and photo["right"] == 0


def test_cue_summary_by_hand():
    rows = [{"iou": v, "parsed": p, "format": 1.0, "right": r} for v, p, r in
            [(0.8, 1.0, 1.0), (0.5, 1.0, 1.0), (0.0, 0.0, 0.0), (0.2, 1.0, 0.0)]]  # fmt: skip
    got = cue_summary(rows)
    assert got["mean_iou"] == pytest.approx(0.375) and got["mean_iou_parsed"] == pytest.approx(0.5)
    assert (got["acc50"], got["acc75"], got["parse_rate"], got["n"]) == (0.5, 0.25, 0.75, 4)


def test_question_summary_splits_by_objects_size_and_kind():
    single, many = (scenes.draw_layout(random.Random(0), n) for n in (1, 4))
    tiny, small = (
        Question("place", "", "", "", (0, 0, 16, 16)),
        Question("attribute", "", "", "", (0, 0, 30, 30)),
    )
    got = question_summary([1.0, 0.0, 1.0], [(single, tiny), (many, tiny), (many, small)])
    assert got["accuracy"] == pytest.approx(2 / 3) and got["n"] == 3
    assert got["by_objects"] == {"1": 1, "4": 0.5}
    assert got["by_size"] == {"small": 1, "tiny": 0.5} and got["by_kind"] == {"attribute": 1, "place": 0.5}


def test_paired_standard_error_by_hand():
    got = paired([0, 0, 1, 1], [1, 0, 1, 1])
    assert got["change"] == 0.25
    assert got["standard_error"] == pytest.approx(math.sqrt((0.75**2 + 3 * 0.25**2) / 3 / 4))
    assert paired([0.5] * 5, [0.5] * 5) == {"change": 0, "standard_error": 0, "n": 5}
    lost = paired([None, 0.5, 0.0], [0.7, 1.0, None])  # no pair where memory ran out on either side
    assert lost == {"change": 0.5, "standard_error": 0, "n": 1}


def test_samples_of_one_group_count_as_one():
    """Four questions, each in two orders with the same result: two independent pairs of changes."""
    before, after = [0, 0, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 1, 1]
    grouped = paired(before, after, list("aabbccdd"))
    independent = paired(before[::2], after[::2])
    assert grouped["change"] == independent["change"] == 0.25 and grouped["n"] == 8
    assert grouped["standard_error"] == pytest.approx(independent["standard_error"])
    assert paired(before, after)["standard_error"] < grouped["standard_error"]


def test_a_batch_that_does_not_fit_is_halved_down_to_one_prompt(policy, monkeypatch):
    held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 0), 5)
    plain = list(reply_cache.generate_replies(policy, held.cue_prompts, 8))
    real, sizes = reply_cache.rollout, []

    def small(policy, batch, *rest):
        sizes.append(len(batch.prompts))
        if len(batch.prompts) > 1 or batch.prompts[0] is held.cue_prompts[3]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(policy, batch, *rest)

    monkeypatch.setattr(reply_cache, "rollout", small)
    got = list(reply_cache.generate_replies(policy, held.cue_prompts, 8, batch=3))
    assert sizes == [3, 1, 2, 1, 1, 2, 1, 1]
    expected = [text for text, _ in plain]
    expected[3] = None
    assert [text for text, _ in got] == expected
    assert [frame for _, frame in got] == [frame for _, frame in plain]
    scores = heldout.evaluate(policy, held, 8, batch=3)
    assert scores.summary["cue"]["n"] == 4 and scores.summary["cue"]["errors"] == 1
    check_frame(policy, held, scores)


def limit_memory(monkeypatch, most: int) -> list[int]:
    """Rollouts of more than `most` prompts run out of memory from now on; returns the sizes of the others."""
    real, sizes = reply_cache.rollout, []

    def limited(policy, batch, *rest):
        if len(batch.prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch.prompts))
        return real(policy, batch, *rest)

    monkeypatch.setattr(reply_cache, "rollout", limited)
    return sizes


@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 11), (2, [2, 2, 2, 2, 1, 2]), (4, [4, 4, 3])])
def test_replies_of_halved_batches_are_those_of_whole_ones(policy, tmp_path, monkeypatch, most, sizes):
    held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 0), 11)
    prompts, limits = held.cue_prompts, (8, 8)
    undisturbed = reply_cache.cached_generate(policy, {}, "before", prompts, limits)
    assert len({text for text, _ in undisturbed}) > 1, "equal replies would prove nothing"
    finished = limit_memory(monkeypatch, most)
    cache = reply_cache.ReplyCache(tmp_path / "answers.jsonl", {})
    assert reply_cache.cached_generate(policy, cache, "before", prompts, limits) == undisturbed
    assert finished == sizes, "each prompt is replied to once"
    again = reply_cache.ReplyCache(tmp_path / "answers.jsonl", {})
    assert reply_cache.cached_generate(policy, again, "before", prompts, limits) == undisturbed
    assert finished == sizes, "the file has every reply"


def test_a_half_that_is_finished_is_in_the_file_before_the_other_half_runs(policy, tmp_path, monkeypatch):
    held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 0), 4)
    undisturbed = reply_cache.cached_generate(policy, {}, "before", held.cue_prompts, (8, 4))
    limit_memory(monkeypatch, 2)
    limited, path = reply_cache.rollout, tmp_path / "answers.jsonl"

    def stopped(policy, batch, *rest):
        if batch.prompts[0] is held.cue_prompts[2]:
            raise KeyboardInterrupt
        return limited(policy, batch, *rest)

    monkeypatch.setattr(reply_cache, "rollout", stopped)
    with pytest.raises(KeyboardInterrupt):
        cache = reply_cache.ReplyCache(path, {})
        reply_cache.cached_generate(policy, cache, "before", held.cue_prompts, (8, 4))
    cached = reply_cache.ReplyCache(path, {})
    assert {key: text for key, (text, *_) in cached.items()} == {
        f"before/{i}": undisturbed[i][0] for i in range(2)
    }


def test_a_reply_that_is_not_finite_is_an_error_and_not_a_wrong_answer(policy, capsys):
    held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 0), 3)
    plain = list(reply_cache.generate_replies(policy, held.cue_prompts, 8))
    make_infinite(policy, held.cue_prompts[1])
    replies = list(reply_cache.generate_replies(policy, held.cue_prompts, 8))
    assert [text for text, _ in replies] == [plain[0][0], None, plain[2][0]]
    capsys.readouterr()
    summary = heldout.evaluate(policy, held, 8).summary["cue"]
    assert summary["n"] == 2 and summary["errors"] == 1
    assert "cue search: 1 of 3 prompts have no reply" in capsys.readouterr().err


def test_photos_are_opened_at_each_access(policy, tmp_path):
    for i in range(30):
        noise((320, 240), i).save(tmp_path / f"{i}.png")
    held = build_heldout_set(policy, folder_cues(tmp_path, CueConfig(), "heldout", 0), 4)
    boxes, items = [cue.box for cue in held.cues], list(held.cue_prompts)
    assert len(held.cues) == len(items) == 4 and held.find_prompts == held.scene_questions == []
    assert boxes == [cue.box for cue in held.cues], "drawn again, the same"
    assert held.cues[0] is not held.cues[0] and items[0] is not held.cue_prompts[0], "none is kept"


def test_held_out_samples_are_the_same_every_time_and_suppressed_ones_show_only_evidence(policy, monkeypatch):
    # compute_image_features would let go of the pixels
    monkeypatch.setattr(heldout, "compute_image_features", lambda policy, prompts: None)
    cues = scene_cues(CueConfig(), "heldout", 0)
    held, again = build_heldout_set(policy, cues, 4), build_heldout_set(policy, cues, 4)
    assert [q.text for _, q in held.scene_questions] == [q.text for _, q in again.scene_questions]
    kinds = [q.kind for _, q in held.scene_questions]
    assert kinds.count("place") == kinds.count("attribute") == 4
    assert len(held.cues) == len(held.cue_prompts) == len(held.find_prompts) == 4
    for item in held.question_prompts:
        assert len(item.images) == 1, "an ordinary question has one image and no crop"
    for full, black, (_, question) in zip(
        held.question_prompts, held.suppressed_prompts, held.scene_questions
    ):
        assert full.input_ids.tolist() == black.input_ids.tolist()
        lit = (black.images[0].pixel_values > -0.999).any(1).float().mean()
        touched = math.prod((question.box[i + 2] - 1) // 16 - question.box[i] // 16 + 1 for i in (0, 1))
        assert 0 < lit <= touched / 144 + 1e-6


def test_alone_keeps_only_evidence_with_its_tokens_to_itself(policy):
    held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 0, (16, 16)), 3, alone=True)
    assert all(scenes.alone_in_its_cells(scene, q.box) for scene, q in held.scene_questions)


def scores_of(samples: list[float], boxes: list) -> Scores:
    return Scores(
        {"cue": cue_summary([{"iou": 0, "parsed": 1, "format": 1, "right": 0}])}, {"cue": samples}, boxes
    )


@pytest.mark.parametrize("wrong", [False, True])
def test_the_frame_check_stops_where_the_other_frame_wins(policy, wrong):
    """Perfect replies, read in their own frame and in the other one."""
    held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 0), 12)
    predicted = []
    for cue in held.cues:
        units = FRAME.to_units(cue.box)
        if wrong:  # written in pixels of the image, 0 to 192, but read as thousandths
            units = cue.box
        predicted.append(FRAME.to_pixels(units))
    values = [heldout.iou(box, cue.box) for box, cue in zip(predicted, held.cues)]
    scores = scores_of(values, predicted)
    if wrong:
        with pytest.raises(UserError, match="--box-frame resized"):
            check_frame(policy, held, scores)
    else:
        check_frame(policy, held, scores)


def test_the_table_shows_both_models_and_the_change():
    before, after = scores_of([0.1, 0.2, 0.3], []), scores_of([0.5, 0.6, 0.7], [])
    line = table(before, after).splitlines()[1]
    assert line.split()[-6:] == ["3", "20.0", "60.0", "+40.0", "±", "0.0"]
    assert "±" not in table(before)
