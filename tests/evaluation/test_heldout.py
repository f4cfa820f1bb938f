"""Scores and summaries against hand-worked examples, on replies whose scores are certain."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from random_models import make_infinite, noise, random_policy

from data import Cue, CueConfig, folder_cues, scene_cues
from evaluation import heldout, reply_cache
from evaluation.heldout import box_score, build_heldout_set, cue_summary, question_summary, target_object
from evaluation.scores import Scores, paired, summarize, table
from files.errors import UserError
from prompts import FAMILIES, BoxFrame
from tiny import scenes
from tiny.scenes import Question, Scene, SceneObject
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
    assert no_box == {"iou": 0, "parsed": 0, "format": 1, "right": 0, "detail": 0}
    photo = box_score("<answer>[990, 990, 1000, 1000]</answer>", FRAME, cue.box, replace(cue, scene=None))
    assert photo["parsed"] == 1 and photo["format"] == 0 and photo["right"] is photo["detail"] is None


@pytest.mark.parametrize(
    ("reply", "named"),
    [
        ("<think> red star with blue inside</think><answer>[1, 2, 3, 4]</answer>", 1),
        ("<think> red star</think><answer>[1, 2, 3, 4]</answer>", 0),
        ("<think> red star</think><answer> blue inside</answer>", 0),
        ("", 0),
    ],
)
def test_a_detail_counts_in_the_thought_alone(reply, named):
    cue = scene_cues(CueConfig(), "heldout", 0)[3]
    assert box_score(reply, FRAME, cue.box, cue)["detail"] == named


def test_cue_summary_by_hand():
    rows = [{"iou": v, "parsed": p, "format": 1.0, "right": r, "detail": None} for v, p, r in
            [(0.8, 1.0, 1.0), (0.5, 1.0, 1.0), (0.0, 0.0, 0.0), (0.2, 1.0, 0.0)]]  # fmt: skip
    got = cue_summary(rows)
    assert got["mean_iou"] == pytest.approx(0.375) and got["mean_iou_parsed"] == pytest.approx(0.5)
    assert (got["acc50"], got["acc75"], got["parse_rate"], got["n"]) == (0.5, 0.25, 0.75, 4)


def square(side: int, left: int = 0) -> SceneObject:
    return SceneObject("red", "square", "blue", (left, 0, left + side, side))


def test_question_summary_splits_by_kind_size_objects_and_tokens():
    single, many = (scenes.draw_layout(random.Random(0), n) for n in (1, 4))
    tiny, tiny_on_an_edge, large = (
        Question("place", "", "", square(16)),
        Question("place", "", "", square(16, left=24)),
        Question("shape", "", "", square(100)),
    )
    asked = [(single, tiny), (many, tiny), (many, tiny_on_an_edge), (many, large), (many, large)]
    got = question_summary([1.0, 0.0, 1.0, 1.0, None], asked)
    assert got["accuracy"] == pytest.approx(3 / 4) and got["n"] == 5
    assert got["by_objects"] == {"1": 1, "4": pytest.approx(2 / 3)}
    assert got["by_size"] == {"tiny": pytest.approx(2 / 3), "large": 1}
    assert got["by_tokens"] == {"1": 0.5, "2": 1, "16": 1}
    assert list(got["by_tokens"]) == ["1", "2", "16"], "in the order of the numbers"
    assert set(got["by_kind"]) == {"place", "place_tiny", "shape", "shape_large"}
    error = math.sqrt((2 * (1 / 3) ** 2 + (2 / 3) ** 2) / 2 / 3)  # of the mean of 1, 0, 1
    for name in ("place", "place_tiny"):
        part = {"accuracy": pytest.approx(2 / 3), "n": 3, "standard_error": pytest.approx(error)}
        assert got["by_kind"][name] == part
    assert got["by_kind"]["shape_large"] == {"accuracy": 1, "n": 1, "standard_error": 0}


def asked(hits: list[float]) -> Scores:
    """The scores of a model on questions about the place of tiny objects."""
    question = Question("place", "", "", square(16))
    scene_questions = [(scenes.draw_layout(random.Random(0), 1), question)] * len(hits)
    scores = Scores({"questions": question_summary(hits, scene_questions)}, {}, [])
    scores.add("questions", hits, [heldout.question_names(question)] * len(hits))
    return scores


def test_two_models_have_the_paired_standard_error_of_the_change():
    before, after = [1.0, 0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0, 0.0]
    alone = summarize(asked(before))
    assert set(alone) == {"before"}
    results = summarize(asked(before), asked(after))
    expected = paired(before, after)["standard_error"]
    assert results["change"]["questions_place_tiny"]["standard_error"] == expected
    for side, accuracy in (("before", 0.6), ("after", 0.6)):
        part = results[side]["questions"]["by_kind"]["place_tiny"]
        assert part == {"accuracy": accuracy, "n": 5, "standard_error": expected}
    assert alone["before"]["questions"]["by_kind"]["place_tiny"]["standard_error"] != expected


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
    assert [q for _, q in held.scene_questions] == [q for _, q in again.scene_questions]
    cells = Counter((q.kind, q.evidence.size) for _, q in held.scene_questions)
    assert cells == {(kind, size): 2 for kind in scenes.KINDS for size in scenes.SIDES}
    assert all(8 <= len(scene.objects) <= 12 for scene, _ in held.scene_questions), "as crowded as the cues"
    assert len(held.cues) == len(held.cue_prompts) == len(held.find_prompts) == 4
    decode = policy.processor.tokenizer.decode
    for cue, prompt in zip(held.cues, held.find_prompts):
        described = f"the {cue.target.name}." if cue.scene.is_unique(cue.target) else cue.target.description
        assert described in decode(prompt.input_ids), "no name that two objects have"
    for prompt, (scene, question) in zip(held.question_prompts, held.scene_questions):
        assert len(prompt.images) == 1, "an ordinary question has one image and no crop"
        assert question in scenes.questions(scene) and question.text in decode(prompt.input_ids)
    pairs = zip(held.question_prompts, held.suppressed_prompts, held.scene_questions, strict=True)
    for full, black, (_, question) in pairs:
        assert full.input_ids.tolist() == black.input_ids.tolist()
        lit = (black.images[0].pixel_values > -0.999).any(1).float().mean()
        box = question.evidence.box
        touched = math.prod((box[i + 2] - 1) // 16 - box[i] // 16 + 1 for i in (0, 1))
        assert 0 < lit <= touched / 256 + 1e-6


def test_a_longer_set_starts_with_the_same_cues(policy):
    cues = scene_cues(CueConfig(), "heldout", 0)
    boxes = [[cue.box for cue in build_heldout_set(policy, cues, n).cues] for n in (2, 5)]
    assert boxes[1][:2] == boxes[0]


def test_scenes_of_one_object_have_cues_and_questions(policy):
    held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 0, (1, 1)), 2)
    assert all(cue.target == cue.scene.objects[0] for cue in held.cues)
    assert all(len(scene.objects) == 1 for scene, _ in held.scene_questions)


def test_a_window_that_shows_a_neighbour():
    target, other = square(16, left=100), square(20, left=120)
    cue = Cue(Image.new("RGB", (256, 256)), (98, 0, 130, 32), "small", "red square", target=target)
    cue.scene = Scene([target, other], (0, 0, 0))
    assert heldout.neighbour_fraction(cue) == 0.5
    assert heldout.neighbour_fraction(replace(cue, box=(98, 0, 120, 22))) == 0
    cue.scene = Scene([target], (0, 0, 0))
    assert heldout.neighbour_fraction(cue) == 0


def test_the_object_at_a_box_is_the_nearest_one_that_it_touches():
    left, right = square(16, left=0), square(16, left=40)
    scene = Scene([left, right], (0, 0, 0))
    assert heldout.object_at(scene, (2, 0, 20, 20)) == left
    assert heldout.object_at(scene, (10, 0, 60, 16)) == right, "both are touched, the right one is nearer"
    assert heldout.object_at(scene, (17, 0, 23, 16)) is None, "between the two"


def scores_of(samples: list[float], boxes: list) -> Scores:
    return Scores(
        {"cue": cue_summary([{"iou": 0, "parsed": 1, "format": 1, "right": 0, "detail": 0}])},
        {"cue": samples},
        boxes,
    )


@pytest.mark.parametrize("wrong", [False, True])
def test_the_frame_check_stops_where_the_other_frame_wins(policy, wrong):
    """Perfect replies, read in their own frame and in the other one."""
    held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 0), 12)
    predicted = []
    for cue in held.cues:
        units = FRAME.to_units(cue.box)
        if wrong:  # written in pixels of the image, 0 to 256, but read as thousandths
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
