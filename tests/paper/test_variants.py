"""The SFT baseline and the controls: what they reward, what they imitate, and what they leave unchanged."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from programs import new_folder, start_early

import locus_mini
from data import Cue, CueConfig, encode_cue, scene_cues
from evaluation.heldout import target_object
from files.errors import UserError
from locus_mini import Example, grpo_loss, token_weights
from models import add_lora, load_policy
from paper.variants import (
    VARIANTS,
    main,
    question_of,
    rationale,
    rollout_ground_truth,
    sft_loss,
    variant_flags,
)
from policy import collate, decode_completions
from reward import reward
from tiny import scenes
from training.settings import Config, resolve

CUES, CFG = scene_cues(CueConfig(), "train", 5), Config()
SMALL = ["--steps", "3", "--prompts", "4", "--eval-cues", "6", "--show-every", "0"]


@pytest.fixture(scope="module")
def tiny():
    return load_policy("tiny")


@pytest.fixture(scope="module")
def batch(tiny) -> list[Example]:
    """Six cues and their prompts."""
    return [Example(i, CUES[i], encode_cue(tiny.processor, CUES[i], "object")) for i in range(6)]


def test_sft_is_the_mean_negative_log_probability_of_what_is_imitated():
    logps = -torch.rand(3, 1, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None, None]
    weights = token_weights(mask.double(), "sft", float(mask.sum()), 3.0, 40)
    loss = sft_loss(logps, logps, None, torch.ones(3, 1), weights, Config())[0]
    assert loss.item() == pytest.approx(-logps[mask].mean().item(), abs=1e-12)
    second = sft_loss(logps, logps, None, torch.tensor([[0.0], [1.0], [0.0]]), weights, Config())[0]
    assert second.item() == pytest.approx(-logps[1, 0, :2].sum().item() / 11, abs=1e-12)


def test_imitation_has_the_gradient_of_grpo_at_equal_advantages():
    """At ratio 1 and A = 1 the surrogate's gradient is that of log π."""
    logps = (-torch.rand(2, 1, 4, dtype=torch.float64)).requires_grad_()
    weights = torch.rand(2, 1, 4, dtype=torch.float64)
    sft_loss(logps, logps, None, torch.ones(2, 1), weights, Config())[0].backward()
    imitated, logps.grad = logps.grad, None
    old, advantages = logps.detach().clone(), torch.ones(2, 1, dtype=torch.float64)
    grpo_loss(logps, old, None, advantages, weights, Config(beta=0.0))[0].backward()
    assert torch.allclose(imitated, logps.grad, atol=1e-12)


def test_what_sft_imitates_is_a_perfect_completion_in_the_familys_format(tiny, batch):
    completions = decode_completions(tiny, rollout_ground_truth(tiny, batch, 0, CFG))
    for (text,), example in zip(completions, batch, strict=True):
        assert text.startswith(f"<think> {target_object(example.cue).description}</think>")
        scored = reward(text, example.prompt.frame.to_units(example.cue.box))
        assert scored.format == 1 and scored.iou > 0.95
    family = replace(tiny.processor.family, opening="<think>\n")
    thinking = replace(tiny, processor=replace(tiny.processor, family=family))
    rollouts = rollout_ground_truth(thinking, batch, 0, CFG)
    start = tiny.processor.tokenizer.decode(rollouts.tokens[0, 0][:3])
    assert start.startswith(f" {batch[0].cue.target.color}")
    assert all(reward(t, (0, 0, 1, 1)).format == 1 for (t,) in decode_completions(thinking, rollouts))


@pytest.mark.parametrize("padding", ["pad_token", "eos_token"])
def test_sft_ends_with_the_stop_token_and_masks_its_padding(tiny, batch, padding):
    """Also with a tokenizer whose padding token is its stop token."""
    tokenizer = tiny.processor.tokenizer
    own, tokenizer.pad_token = tokenizer.pad_token, getattr(tokenizer, padding)
    rollouts = rollout_ground_truth(tiny, batch, 0, CFG)
    tokenizer.pad_token = own
    last = rollouts.mask.sum(-1) - 1
    assert (rollouts.tokens.gather(-1, last[..., None])[..., 0] == tokenizer.eos_token_id).all()
    answers = [example.prompt.frame.to_text(example.cue.box) for example in batch]
    thoughts = [example.cue.target.description for example in batch]
    texts = [f"<think> {t}</think><answer>{a}</answer>" for t, a in zip(thoughts, answers, strict=True)]
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]
    assert rollouts.mask.sum(-1)[:, 0].tolist() == lengths


def test_a_share_of_the_rationales_is_of_another_object_and_the_box_stays_true(tiny, batch):
    examples = [replace(batch[i % 6], index=i) for i in range(600)]
    right = [rationale(example, 0.25) == example.cue.target.description for example in examples]
    assert 0.69 < sum(right) / 600 < 0.81
    for example, is_right in zip(examples, right, strict=True):
        descriptions = [o.description for o in example.cue.scene.objects]
        assert rationale(example, 0.25) in descriptions and rationale(example, 0.25) == rationale(
            example, 0.25
        )
        assert not is_right or rationale(example, 0.0) == rationale(example, 0.25)
        # More are wrong at a half, and those that were wrong stay wrong.
        assert is_right or rationale(example, 0.5) != example.cue.target.description
    completions = decode_completions(tiny, VARIANTS["sft_half_wrong"].task.sample(tiny, batch, 0, CFG))
    for (text,), example in zip(completions, batch, strict=True):
        assert text.startswith(f"<think> {rationale(example, 0.5)}</think>")
        assert reward(text, example.prompt.frame.to_units(example.cue.box)).iou > 0.95


@pytest.mark.parametrize(("text", "expected"), [(None, ""), ("a cup", "a cup")])
def test_the_rationale_of_a_photo_is_its_text_if_it_has_any(text, expected, batch):
    photo = Cue(batch[0].cue.image, (1, 2, 30, 40), "tiny", text)
    assert rationale(replace(batch[0], cue=photo), 0.0) == expected


def test_imitating_raises_the_probability_of_the_true_boxes(batch):
    policy = add_lora(load_policy("tiny"), 4)
    cfg, _ = resolve(variant_flags("sft", {"lr": 2e-3}), policy.processor.family)
    rollouts = rollout_ground_truth(policy, batch, 0, cfg)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=cfg.lr)
    prompts = [example.prompt for example in batch]
    parts = [(collate(policy, prompts), rollouts, torch.ones(len(batch), 1), None)]
    losses = [locus_mini.optimizer_step(policy, optimizer, parts, cfg, sft_loss)["loss"] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.05


def perfect_completion(example: Example, box=None) -> str:
    """A completion with a box, by default the cue's."""
    return f"<think> x</think><answer>{example.prompt.frame.to_text(box or example.cue.box)}</answer>"


def test_random_rewards_ignore_the_completion_and_repeat(batch):
    score, perfect, example = VARIANTS["random"].task.score, perfect_completion(batch[0]), batch[0]
    good = score([perfect] * 4, replace(example, index=7), CFG)
    bad = score(["nothing"] * 4, replace(example, index=7), CFG)
    assert [r.total for r in good] == [r.total for r in bad]
    assert len({r.total for r in good}) == 4
    assert good[0].iou > 0.95 and bad[0].iou == 0, "what is logged stays the true overlap"
    other = score([perfect] * 4, replace(example, index=8), CFG)
    assert [r.total for r in other] != [r.total for r in good]


def test_a_shuffled_target_rewards_the_box_of_another_object(batch):
    for example in batch:
        cue = example.cue
        boxes = [cue.box, *(o.box for o in cue.scene.objects if o != target_object(cue))]
        completions = [perfect_completion(example, box) for box in boxes]
        scored = VARIANTS["shuffled"].task.score(completions, example, CFG)
        best = max(range(len(boxes)), key=lambda g: scored[g].total)
        assert best != 0 and scored[best].total > 0.9
        assert scored[0].iou > 0.95 and scored[0].total < 0.2


def test_questions_are_rewarded_by_their_answer_on_the_full_image_alone(tiny):
    kinds = set()
    for i in range(9):
        cue = CUES[i]
        question = question_of(cue, i)
        kinds.add(question.kind)
        assert question == question_of(cue, i) and question in scenes.questions(cue.scene)
        prompt = VARIANTS["questions"].task.encode(tiny.processor, cue, i, CFG)
        assert len(prompt.images) == 1
        completions = [f"<think> x</think><answer> {question.answer}</answer>", "<answer> nonsense</answer>"]
        right, wrong = VARIANTS["questions"].task.score(completions, Example(i, cue, prompt), CFG)
        assert (right.total, right.iou, wrong.total) == (1.0, 1.0, 0.0)
    assert kinds == set(scenes.KINDS)


def test_a_unique_description_replaces_the_crop_where_the_name_is_ambiguous(tiny):
    cues = scene_cues(CueConfig(), "train", 5, twins=True)
    for i in range(6):
        prompt = VARIANTS["description"].task.encode(tiny.processor, cues[i], i, CFG)
        text = tiny.processor.tokenizer.decode(prompt.input_ids)
        descriptions = [o.description for o in cues[i].scene.objects if o.description in text]
        assert descriptions == [cues[i].target.description] and len(prompt.images) == 1
        bare = tiny.processor.tokenizer.decode(encode_cue(tiny.processor, cues[i], "text").input_ids)
        assert sum(o.name in bare for o in cues[i].scene.objects) == 2, "the name fits the twin too"


def test_another_crop_shows_another_scene_and_leaves_image_and_target(tiny, batch):
    cfg = replace(CFG, seed=5)  # of the batch's own cues
    for example in batch:
        prompt = VARIANTS["other_crop"].task.encode(tiny.processor, example.cue, example.index, cfg)
        true_image, true_crop = encode_cue(tiny.processor, example.cue, "object").images
        image, crop = prompt.images
        assert torch.equal(image.pixel_values, true_image.pixel_values)
        assert crop.pixel_values.shape == true_crop.pixel_values.shape
        assert not torch.equal(crop.pixel_values, true_crop.pixel_values)
        again = VARIANTS["other_crop"].task.encode(tiny.processor, example.cue, example.index, cfg)
        assert torch.equal(again.images[1].pixel_values, crop.pixel_values), "so that a run can be resumed"
    assert VARIANTS["other_crop"].task.score is locus_mini.score


CONTROLS = ("sft_quarter_wrong", "random", "shuffled", "other_crop", "description", "questions")
EARLY = {}


def start_early_programs() -> None:
    """Runs of three steps that nothing stops."""
    EARLY["folder"] = folder = new_folder()
    for name in CONTROLS:
        arguments = (name, "--out", folder / name, *SMALL)
        EARLY[name] = start_early(*arguments, code="from paper import variants; variants.main()")


@pytest.mark.parametrize("variant", CONTROLS)
def test_every_control_trains_and_resumes_where_it_was_stopped(variant, tmp_path, monkeypatch):
    """Two steps and, after a stop, a third are three steps."""
    train_step = locus_mini.train_step

    def stopped_train_step(policy, optimizer, cues, step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        return train_step(policy, optimizer, cues, step, *rest)

    arguments = ["x", variant, "--out", str(tmp_path / "run"), *SMALL, "--save-every", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with monkeypatch.context() as patch:
        patch.setattr(locus_mini, "train_step", stopped_train_step)
        with pytest.raises(SystemExit):
            main()
    monkeypatch.setattr(sys, "argv", ["x", variant, "--resume", str(tmp_path / "run")])
    main()
    EARLY[variant].result()
    folders, name = (tmp_path / "run", EARLY["folder"] / variant), "adapter/adapter_model.safetensors"
    assert len({(folder / name).read_bytes() for folder in folders}) == 1
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["skipped"] == 0 and last["grad_norm"] > 0


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sft", {"beta": 0.1}),
        ("sft_half_wrong", {"data": "coco"}),
        ("other_crop", {"data": "photos"}),
        ("shuffled", {"data": "coco"}),
        ("questions", {"data": "photos"}),
        ("random", {"dry_run": True}),
    ],
)
def test_variants_that_make_no_sense_are_refused(name, flags):
    with pytest.raises(UserError, match=name):
        variant_flags(name, flags)


def test_imitation_has_no_kl():
    assert variant_flags("sft_half_wrong", {})["beta"] == variant_flags("sft", {"beta": 0.0})["beta"] == 0
    assert "beta" not in variant_flags("random", {}) | variant_flags("sft", {"resume": "runs/x"})


@pytest.mark.parametrize("arguments", [[], ["sfd"]])
def test_an_unknown_variant_is_refused_with_the_list_of_variants(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "shuffled" in capsys.readouterr().err


def test_help_lists_the_variants(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"    {name} " in out for name in VARIANTS)
