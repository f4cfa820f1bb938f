"""Attention-in-Box: the one-row method against full eager attention, and hand-made maps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from random_models import make_infinite, prompts

from evaluation import attention
from evaluation.attention import (
    add_grounding,
    analyse_questions,
    append_to_prompt,
    attention_in_box,
    attention_maps,
    before_answer,
    box_ious,
    grounding_summary,
    measure_attention,
    prefixed_questions,
    touched_cells,
)
from evaluation.heldout import HeldOutSet, add_questions, question_names
from evaluation.scores import Scores
from models import load_policy
from policy import collate, group_mask
from prompts import BoxFrame
from tiny import scenes
from tiny.scenes import Scene, SceneObject


def full_maps(policy, prompt):
    """Head-mean attention of the last token from one ordinary eager forward pass, [layers, cells]."""
    batch = collate(policy, [prompt])
    config = policy.base_model.config.get_text_config()
    config._attn_implementation = "eager"
    mask = torch.zeros(1, 1, *[batch.input_ids.shape[1]] * 2)
    mask = mask.masked_fill(~group_mask(batch.segment_ids), torch.finfo(torch.float32).min)
    features = list(zip(*[image.features for image in prompt.images], strict=True))
    encoded = {"image": SimpleNamespace(pooler_output=features[0], deepstack_features=features[1:])}
    kwargs = dict(attention_mask=mask, position_ids=batch.position_ids, mm_encoder_outputs=encoded)
    with torch.no_grad():
        output = policy.base_model.model(batch.input_ids, use_cache=False, output_attentions=True, **kwargs)
    config._attn_implementation = "sdpa"
    columns = (batch.input_ids[0] == policy.base_model.config.image_token_id).nonzero()[:, 0]
    return torch.stack([layer[0, :, -1].mean(0) for layer in output.attentions])[:, columns]


def test_one_row_equals_full_eager_attention(policy):
    items = [append_to_prompt(policy.processor, item, "<think> red") for item in prompts(policy, 4)]
    maps = attention_maps(policy, items)  # in one left-padded batch
    assert policy.base_model.config.get_text_config()._attn_implementation == "sdpa"
    for item, got in zip(items, maps, strict=True):
        cells = got.shape[1] * got.shape[2]
        assert cells == int(item.images[0].grid_thw.prod()) // 4
        expected = full_maps(policy, item)[:, :cells]
        assert expected.std() > 1e-4, "an attention that is the same everywhere would prove nothing"
        assert torch.allclose(got.flatten(1), expected, atol=1e-6)


def test_attention_of_halved_batches_is_that_of_whole_ones(policy, monkeypatch):
    """Memory is enough for two prompts at a time, but never for the fourth, which is an error by itself."""
    items = prompts(policy, 5)
    boxes = [[(5.0, 5.0, 45.0, 35.0)]] * 5
    whole = measure_attention(policy, {}, "looks", items, boxes, 5)
    real, sizes = attention.attention_maps, []

    def limited(policy, chunk):
        if len(chunk) > 2 or any(item is items[3] for item in chunk):
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(chunk))
        return real(policy, chunk)

    monkeypatch.setattr(attention, "attention_maps", limited)
    halved = measure_attention(policy, {}, "looks", items, boxes, 5)
    assert sizes == [2, 1, 1] and halved[3] is None
    for i in (0, 1, 2, 4):
        assert halved[i]["aib"] == pytest.approx(whole[i]["aib"], abs=1e-6)
        assert halved[i]["mean_aib"] == pytest.approx(whole[i]["mean_aib"], abs=1e-6)


def test_attention_is_switched_back_when_the_model_fails(policy, monkeypatch):
    monkeypatch.setattr(policy.base_model.model.language_model, "norm", None)
    with pytest.raises(TypeError):
        attention_maps(policy, prompts(policy, 1))
    assert policy.base_model.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("reply", "prefix", "token"),
    [
        ("<think> red</think><answer>blue</answer>", "<think> red</think><answer>", "b"),
        ("<think> red</think><answer> blue</answer>", "<think> red</think><answer>", "b"),
        ("<think> red</think><answer>[12, 34, 56, 78]</answer>", "<think> red</think><answer>[", "1"),
        ("[12, 34, 56, 78]", "[", "1"),
        ("blue, as the star is", "", "b"),
        ("", "", ""),
    ],
)
@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_the_part_of_a_reply_before_its_answer(policy, reply, prefix, token, opening):
    """A template's opening is in the prompt already, so it must not come a second time."""
    policy.processor.family = replace(policy.processor.family, opening=opening)
    got_prefix, got_token = before_answer(policy.processor, opening + reply)
    assert got_prefix == prefix and got_token.startswith(token) and bool(got_token) == bool(token)
    rest = (opening + reply).removeprefix(opening + prefix)
    assert rest.lstrip().startswith(got_token), "the token is the first one of the rest"


@pytest.mark.parametrize("answer", [" purple", " top left", "[12, 34, 56, 78]", "red"])
def test_the_prefix_of_an_answer_ends_where_its_own_tokens_begin(answer):
    """A prefix that took the space of " purple" would be followed by other tokens than the model's own."""
    processor = load_policy("tiny").processor
    reply = f"<think> red star</think><answer>{answer}</answer>"
    prefix, token = before_answer(processor, reply)
    ids, prefix_ids = (processor.tokenizer(text)["input_ids"] for text in (reply, prefix))
    assert prefix_ids == ids[: len(prefix_ids)]
    assert processor.tokenizer.decode(ids[len(prefix_ids)]).strip() == token
    assert token in ("purple", "top", "1", "red", "r", "re")


def test_cells_that_touch_a_box_count():
    # 4 × 2 tokens on an image of 80 × 40 pixels: 20 pixels a token.
    def cells(*boxes):
        return touched_cells(list(boxes), (80, 40), (2, 4)).int().tolist()

    assert cells((0, 0, 20, 20)) == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert cells((19, 19, 21, 21)) == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert cells((70, 30, 200, 90), (-9, -9, 1, 1)) == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert cells() == [[0, 0, 0, 0], [0, 0, 0, 0]]


def test_attention_in_box_by_hand():
    first = [[4.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]  # mass 8
    second = [[0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]  # mass 2
    got = attention_in_box(torch.tensor([first, second]), [(0, 0, 15, 10), (70, 0, 80, 5)], (80, 40))
    assert got.aib == pytest.approx([4 / 8, 2 / 2])
    assert got.mean_aib == pytest.approx(6 / 10), "of the averaged map, not the mean of the layers"
    assert got.peak == 1 and got.chance == pytest.approx(2 / 8)
    assert attention_in_box(torch.tensor([first, second]), [(60, 20, 80, 40)], (80, 40)).peak == 0


def test_boxes_count_with_or_without_an_answer_block():
    frame = BoxFrame(200, 100, 1000, 1000)
    replies = [
        ("<think>x</think><answer>[100, 100, 200, 200]</answer>", frame),
        (None, frame),
        ("nowhere", frame),
    ]
    replies.append(('```json\n[{"bbox_2d": [100, 100, 200, 200], "label": "star"}]\n```', frame))
    assert box_ious(replies, [(20, 10, 40, 20)] * 4) == [1.0, None, 0.0, 1.0]


def test_grounding_against_answers_by_hand():
    ious, right = [0.0, 0.0, 0.3, 0.5, 0.9, None], [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    got = grounding_summary(list(zip(ious, right, strict=True)))
    assert got["n"] == 5
    assert [part["n"] for part in got["accuracy"].values()] == [2, 1, 2]
    assert [part["accuracy"] for part in got["accuracy"].values()] == [0.5, 0.0, 0.5]
    assert got["right"] == {"mean_iou": 0.25, "found": 0.5, "n": 2}
    assert got["wrong"]["mean_iou"] == pytest.approx(0.4) and got["wrong"]["found"] == pytest.approx(1 / 3)
    assert list(got["counts"].values()) == [1, 1, 1, 2]
    base, after = Scores({}, {}, []), Scores({}, {}, [])
    add_grounding(base, ious, right, base)
    add_grounding(after, [1.0] * 6, [1.0] * 6, base)
    assert [len(after.samples[name]) for name in ("IoU 0", "IoU < 0.5", "IoU ≥ 0.5")] == [2, 1, 2]
    assert base.samples["misread"] == [0, 0, 0, 0, 1, None] and base.samples["not found"][:3] == [0, 1, 1]


def test_attention_that_is_not_finite_is_left_out(policy):
    encoded_prompts = prompts(policy, 3)
    make_infinite(policy, encoded_prompts[1])
    stats = measure_attention(policy, {}, "looks", encoded_prompts, [[(0, 0, 30, 30)]] * 3, 3)
    assert [sample is None for sample in stats] == [False, True, False]


# ---------------------------------------------------------------- both, on the questions about a scene


@pytest.fixture
def held(policy) -> HeldOutSet:
    """Every question about a scene of a tiny, a small and a large object."""
    objects = [
        SceneObject("red", "star", "blue", (0, 0, 16, 16)),
        SceneObject("green", "cross", "white", (200, 0, 240, 40)),
        SceneObject("blue", "circle", "red", (20, 130, 120, 230)),
    ]
    held, scene = HeldOutSet([], []), Scene(objects, (20, 30, 40))
    add_questions(policy, held, scene, scenes.questions(scene))
    return held


def test_attention_is_read_at_the_first_token_of_the_answer(policy, held):
    decode, endings = policy.processor.tokenizer.decode, set()
    prompts = prefixed_questions(policy.processor, held)
    items = zip(held.scene_questions, held.question_prompts, prompts, strict=True)
    for (_, question), plain, prompt in items:
        assert prompt.input_ids[: len(plain.input_ids)].tolist() == plain.input_ids.tolist()
        ending = decode(prompt.input_ids[len(plain.input_ids) :])
        box = plain.frame.to_text(question.evidence.box) if question.kind == "place" else ""
        assert ending == f"<think> {question.evidence.name}{box}</think><answer>"
        endings.add(ending)
    assert len(endings) == 6, "a place has its box in the thought, and the other two kinds share one"


def test_analyses_are_split_by_kind_and_size(policy, held, monkeypatch):
    asked = []

    def recorded(policy, cache, name, prompts, limits):
        texts = [policy.processor.tokenizer.decode(prompt.input_ids) for prompt in prompts]
        asked.extend(zip(texts, held.scene_questions, strict=True))
        boxes = [q.evidence.box if q.kind == "place" else (0, 0, 16, 16) for _, q in held.scene_questions]
        answers = [prompt.frame.to_text(box) for prompt, box in zip(prompts, boxes, strict=True)]
        return [(f"<answer>{text}</answer>", prompt.frame) for text, prompt in zip(answers, prompts)]

    monkeypatch.setattr("evaluation.attention.cached_generate", recorded)
    right = [float(question.kind == "detail") for _, question in held.scene_questions]
    scores = Scores({}, {"questions": right}, [])
    analyse_questions(policy, held, scores, scores, {}, "before", (8, 4))
    for text, (_, question) in asked:
        assert f" {question.answer}" not in text.rpartition("<|vision_end|>")[2], "the text says the answer"
        assert question.evidence.color in text
    # Found: all places, and of the other kinds the tiny object, whose box is given every time.
    cells = {name for _, question in held.scene_questions for name in question_names(question)}
    assert len(cells) == 12
    for name in cells:
        is_found = name.startswith("place") or name.endswith("tiny")
        mean_found = 1 / 3 if name in ("detail", "shape") else float(is_found)
        samples = scores.samples[f"found_{name}"]
        assert sum(samples) / len(samples) == pytest.approx(mean_found)
        grounding = scores.summary["grounding"]["by_kind"][name]
        assert grounding["right" if name.startswith("detail") else "wrong"]["n"] == grounding["n"]
        attention = scores.summary["attention"]["by_kind"][name]
        assert attention["n"] == len(samples) == len(scores.samples[f"aib_{name}"])
        mean_aib = sum(scores.samples[f"aib_{name}"]) / len(samples)
        assert attention["mean_aib"] == pytest.approx(mean_aib) and len(attention["aib_by_layer"]) == 2
    tiny, small, large = (scores.samples[f"chance_detail_{size}"][0] for size in scenes.SIDES)
    assert tiny <= small < large
