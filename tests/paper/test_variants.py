"""The SFT baseline and the controls: what they reward, what they imitate, and what they leave unchanged."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from random_models import prompts

import locus_mini
from data import CueConfig, encode_cue, scene_cues
from evaluation.heldout import target_object
from files.errors import UserError
from locus_mini import Example, grpo_loss, token_weights
from models import add_lora, load_policy
from paper.variants import (
    VARIANTS,
    best_completions,
    main,
    question_of,
    rollout_ground_truth,
    sft_loss,
    variant_flags,
)
from policy import Rollout, collate, decode_completions, rollout
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
        assert text.startswith(f"<think> {target_object(example.cue).name}</think>")
        scored = reward(text, example.prompt.frame.to_units(example.cue.box))
        assert scored.format == 1 and scored.iou > 0.95
    family = replace(tiny.processor.family, opening="<think>\n")
    thinking = replace(tiny, processor=replace(tiny.processor, family=family))
    rollouts = rollout_ground_truth(thinking, batch, 0, CFG)
    start = tiny.processor.tokenizer.decode(rollouts.tokens[0, 0][:3])
    assert start.startswith(f" {batch[0].cue.text.split()[0]}")
    assert all(reward(t, (0, 0, 1, 1)).format == 1 for (t,) in decode_completions(thinking, rollouts))


def test_sft_ends_with_the_stop_token_and_masks_its_padding(tiny, batch):
    rollouts, tokenizer = rollout_ground_truth(tiny, batch, 0, CFG), tiny.processor.tokenizer
    last = rollouts.mask.sum(-1) - 1
    assert (rollouts.tokens.gather(-1, last[..., None])[..., 0] == tokenizer.eos_token_id).all()
    answers = [example.prompt.frame.to_text(example.cue.box) for example in batch]
    texts = [f"<think> {e.cue.text}</think><answer>{a}</answer>" for e, a in zip(batch, answers, strict=True)]
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]
    assert rollouts.mask.sum(-1)[:, 0].tolist() == lengths


def test_imitating_raises_the_probability_of_the_true_boxes(batch):
    policy = add_lora(load_policy("tiny"), 4)
    cfg, _ = resolve(variant_flags("sft", {"lr": 2e-3}), policy.processor.family)
    rollouts = rollout_ground_truth(policy, batch, 0, cfg)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=cfg.lr)
    prompts = [example.prompt for example in batch]
    parts = [(collate(policy, prompts), rollouts, torch.ones(len(batch), 1), None)]
    losses = [locus_mini.optimizer_step(policy, optimizer, parts, cfg, sft_loss)["loss"] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.05


def test_the_best_completion_of_each_group_is_kept():
    tokens = torch.arange(24).view(2, 3, 4)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    finished, finite = torch.tensor([[True, False, True], [True, True, True]]), torch.tensor([True, True])
    rollouts = Rollout(tokens, mask, -tokens.float(), finished, finite)
    kept, better = best_completions(rollouts, torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.5, 0.5]]))
    assert kept.tokens.tolist() == [[[4, 5, 6, 7]], [[12, 13, 14, 15]]]
    assert kept.finished.tolist() == [[False], [True]]
    assert better.tolist() == [[1.0], [0.0]]


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
    for i in range(8):
        cue = CUES[i]
        question = question_of(cue, i)
        kinds.add(question.kind)
        assert question == question_of(cue, i) and question in scenes.questions(cue.scene)
        prompt = VARIANTS["questions"].task.encode(tiny.processor, cue, i, CFG)
        assert len(prompt.images) == 1
        completions = [f"<think> x</think><answer> {question.answer}</answer>", "<answer> nonsense</answer>"]
        right, wrong = VARIANTS["questions"].task.score(completions, Example(i, cue, prompt), CFG)
        assert (right.total, right.iou, wrong.total) == (1.0, 1.0, 0.0)
    assert kinds == {"place", "attribute"}


@pytest.mark.parametrize("command", ["sft", "best", "random", "shuffled", "questions"])
def test_every_control_trains_and_resumes_where_it_was_stopped(command, tmp_path, monkeypatch):
    """Two steps and, after a stop, a third are three steps."""
    variant, *flags = command.split()
    for name in ("whole", "stopped"):
        arguments = ["x", variant, "--out", str(tmp_path / name), *SMALL, "--save-every", "2", *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        if name == "stopped":
            train_step = locus_mini.train_step

            def stopped_train_step(policy, optimizer, cues, step, *rest, train_step=train_step):
                if step == 2:
                    raise KeyboardInterrupt
                return train_step(policy, optimizer, cues, step, *rest)

            with monkeypatch.context() as patch:
                patch.setattr(locus_mini, "train_step", stopped_train_step)
                with pytest.raises(SystemExit):
                    main()
            monkeypatch.setattr(sys, "argv", ["x", variant, "--resume", str(tmp_path / name)])
        main()
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    last = json.loads((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["skipped"] == 0 and last["grad_norm"] > 0


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sft", {"beta": 0.1}),
        ("best", {"beta": 0.1}),
        ("shuffled", {"data": "coco"}),
        ("questions", {"data": "photos"}),
        ("random", {"dry_run": True}),
    ],
)
def test_variants_that_make_no_sense_are_refused(name, flags):
    with pytest.raises(UserError, match=name):
        variant_flags(name, flags)


def test_imitation_has_no_kl():
    assert variant_flags("best", {})["beta"] == variant_flags("sft", {"beta": 0.0})["beta"] == 0
    assert "beta" not in variant_flags("random", {})


@pytest.mark.parametrize("arguments", [[], ["sfd"]])
def test_an_unknown_variant_is_refused_with_the_list_of_variants(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "shuffled" in capsys.readouterr().err


def test_the_best_completions_of_a_random_model_are_imitated(policy):
    """On both families' random models: the loss of the completions that were kept falls."""
    encoded = prompts(policy, 3)
    rollouts = rollout(policy, collate(policy, encoded), 4, 10, torch.Generator().manual_seed(1))
    kept, better = best_completions(rollouts, torch.rand(3, 4, generator=torch.Generator().manual_seed(2)))
    cfg = Config(beta=0.0, prompts=3, max_new_tokens=10, lr=0.01)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=0.01)
    parts = [(collate(policy, encoded), kept, better, None)]
    losses = [locus_mini.optimizer_step(policy, optimizer, parts, cfg, sft_loss)["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]


def test_help_lists_the_variants(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"    {name} " in out for name in VARIANTS)
