"""Attention-in-Box: the one-row method against full eager attention, and hand-made maps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from random_models import make_infinite, prompts

from evaluation import attention
from evaluation.attention import (
    add_grounding,
    append_to_prompt,
    attention_in_box,
    attention_maps,
    before_answer,
    box_ious,
    grounding_summary,
    measure_attention,
    touched_cells,
)
from evaluation.scores import Scores
from policy import collate, group_mask
from prompts import BoxFrame


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
        ("<think> red</think><answer> blue</answer>", "<think> red</think><answer> ", "b"),
        ("<think> red</think><answer>[12, 34, 56, 78]</answer>", "<think> red</think><answer>[", "1"),
        ("[12, 34, 56, 78]", "[", "1"),
        ("blue, as the ring is", "", "b"),
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
    assert rest.startswith(got_token), "the token is the first one of the rest"


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
    got = grounding_summary(ious, right)
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
