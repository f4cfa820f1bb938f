"""The SFT baseline and the controls: what they reward, what they imitate, what they leave alone."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from random_models import prompts, random_policy

import locus_mini
from data import CueConfig, encode_cue, scene_cues
from evaluation.heldout import target_object
from files.errors import UserError
from locus_mini import Example, grpo_loss, token_weights
from models import add_lora, load_adapter, load_policy
from paper.variants import (
    VARIANTS,
    all_weights,
    best_completions,
    ground_truth_completions,
    main,
    question_of,
    sft_loss,
    variant_flags,
)
from policy import Rollout, collate, decode_completions, rollout, token_logps
from reward import reward
from tiny import scenes
from training.run_folder import save_adapter
from training.settings import Config, resolve

CUES, CFG = scene_cues(CueConfig(), "train", 5), Config()
SMALL = ["--steps", "3", "--prompts", "4", "--eval-cues", "6", "--show-every", "0"]


@pytest.fixture(scope="module")
def tiny():
    return load_policy("tiny")


@pytest.fixture(scope="module")
def some(tiny):
    cues = [CUES[i] for i in range(6)]
    return [encode_cue(tiny.processor, cue, "object") for cue in cues], cues


def test_sft_is_the_mean_negative_log_probability_of_what_is_imitated():
    logps = -torch.rand(3, 1, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None, None]
    weights = token_weights(mask.double(), "sft", float(mask.sum()), 3.0, 40)
    loss = sft_loss(logps, logps, None, torch.ones(3, 1), weights, Config())[0]
    assert loss.item() == pytest.approx(-logps[mask].mean().item(), abs=1e-12)
    none = sft_loss(logps, logps, None, torch.tensor([[0.0], [1.0], [0.0]]), weights, Config())[0]
    assert none.item() == pytest.approx(-logps[1, 0, :2].sum().item() / 11, abs=1e-12)


def test_imitation_has_the_gradient_of_grpo_where_every_answer_is_as_good_as_any():
    """At ratio 1 and A = 1 the surrogate's gradient is that of log π."""
    logps = (-torch.rand(2, 1, 4, dtype=torch.float64)).requires_grad_()
    weights = torch.rand(2, 1, 4, dtype=torch.float64)
    sft_loss(logps, logps, None, torch.ones(2, 1), weights, Config())[0].backward()
    imitated, logps.grad = logps.grad, None
    old = logps.detach().clone()
    grpo_loss(logps, old, None, torch.ones(2, 1, dtype=torch.float64), weights, Config(beta=0.0))[
        0
    ].backward()
    assert torch.allclose(imitated, logps.grad, atol=1e-12)


def test_what_sft_imitates_is_a_perfect_answer_in_the_families_form(tiny, some):
    items, cues = some
    said = decode_completions(tiny, ground_truth_completions(tiny, items, cues))
    for (text,), item, cue in zip(said, items, cues):
        assert text.startswith(f"<think> {target_object(cue).name}</think>")
        scored = reward(text, item.frame.to_units(cue.box))
        assert scored.format == 1 and scored.iou > 0.95
    thinking = replace(
        tiny, processor=replace(tiny.processor, family=replace(tiny.processor.family, opening="<think>\n"))
    )
    rollouts = ground_truth_completions(thinking, items, cues)
    assert tiny.processor.tokenizer.decode(rollouts.tokens[0, 0][:3]).startswith(
        f" {cues[0].text.split()[0]}"
    )
    assert all(reward(t, (0, 0, 1, 1)).format == 1 for (t,) in decode_completions(thinking, rollouts))


def test_sft_ends_with_the_stop_token_and_hides_its_padding(tiny, some):
    rollouts = ground_truth_completions(tiny, *some)
    last = rollouts.mask.sum(-1) - 1
    assert (
        rollouts.tokens.gather(-1, last[..., None])[..., 0] == tiny.processor.tokenizer.eos_token_id
    ).all()
    shown = [f"<think> {c.text}</think><answer>{i.frame.to_text(c.box)}</answer>" for i, c in zip(*some)]
    lengths = [len(tiny.processor.tokenizer(text)["input_ids"]) + 1 for text in shown]
    assert rollouts.mask.sum(-1)[:, 0].tolist() == lengths


def test_imitating_raises_the_probability_of_the_true_answers(some, tiny):
    policy = add_lora(load_policy("tiny"), 4)
    items, cues = some
    cfg, _ = resolve(variant_flags("sft", {"lr": 2e-3}), policy.processor.family)
    rollouts = ground_truth_completions(policy, items, cues)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=cfg.lr)
    ones = torch.ones(len(items), 1)
    passes = [(collate(policy, items), rollouts, ones, None)]
    losses = [locus_mini.optimizer_step(policy, optimizer, passes, cfg, sft_loss)["loss"] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.05


def test_the_best_answer_of_each_group_is_kept():
    tokens = torch.arange(24).view(2, 3, 4)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    rollouts = Rollout(tokens, mask, -tokens.float(), torch.tensor([[True, False, True], [True, True, True]]))
    kept, better = best_completions(rollouts, torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.5, 0.5]]))
    assert kept.tokens.tolist() == [[[4, 5, 6, 7]], [[12, 13, 14, 15]]]
    assert kept.finished.tolist() == [[False], [True]]
    assert better.tolist() == [[1.0], [0.0]]


def test_random_rewards_ignore_the_answer_and_repeat(tiny, some):
    items, cues = some
    perfect = f"<think> x</think><answer>{items[0].frame.to_text(cues[0].box)}</answer>"
    good = VARIANTS["random"].task.score([perfect] * 4, Example(7, cues[0], items[0]), CFG)
    bad = VARIANTS["random"].task.score(["nothing"] * 4, Example(7, cues[0], items[0]), CFG)
    assert [r.total for r in good] == [r.total for r in bad]
    assert len({r.total for r in good}) == 4
    assert good[0].iou > 0.95 and bad[0].iou == 0, "what is logged stays the true overlap"
    other = VARIANTS["random"].task.score([perfect] * 4, Example(8, cues[0], items[0]), CFG)
    assert [r.total for r in other] != [r.total for r in good]


def test_a_shuffled_target_pays_for_another_thing(tiny, some):
    items, cues = some
    for i, (item, cue) in enumerate(zip(items, cues)):
        boxes = [cue.box, *(t.box for t in cue.scene.objects if t != target_object(cue))]
        answers = [f"<think> x</think><answer>{item.frame.to_text(box)}</answer>" for box in boxes]
        scored = VARIANTS["shuffled"].task.score(answers, Example(i, cue, item), CFG)
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
        item = VARIANTS["questions"].task.encode(tiny.processor, cue, i, CFG)
        assert len(item.images) == 1
        answers = [f"<think> x</think><answer> {question.answer}</answer>", "<answer> nonsense</answer>"]
        right, wrong = VARIANTS["questions"].task.score(answers, Example(i, cue, item), CFG)
        assert (right.total, right.iou, wrong.total) == (1.0, 1.0, 0.0)
    assert kinds == {"place", "attribute"}


def test_training_all_weights_leaves_the_reference_as_it_was(tmp_path, some):
    policy = all_weights(load_policy("tiny"))
    items, _ = some
    trained = {n.split(".")[-3] for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == {"modules_to_save"}
    batch = collate(policy, items)
    rollouts = rollout(policy, batch, 2, 12, torch.Generator().manual_seed(0))
    before = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-3)
    cfg, _ = resolve({}, policy.processor.family)
    locus_mini.optimizer_step(
        policy, optimizer, [(batch, rollouts, torch.tensor([[1.0, -1.0]] * 6), None)], cfg
    )
    with torch.no_grad():
        after = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
        with policy.reference():
            reference = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    assert torch.equal(reference, before.detach())
    assert (after - before).abs().max() > 0.01
    save_adapter(policy.model, tmp_path / "adapter")
    loaded = load_adapter(load_policy("tiny"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(token_logps(loaded, batch, rollouts.tokens, rollouts.mask), after, atol=1e-5)


def test_all_weights_are_for_the_embedded_model_alone():
    policy = random_policy("qwen2_5_vl")
    with pytest.raises(UserError, match="all_weights"):
        all_weights(policy)


@pytest.mark.parametrize(
    "extra",
    [
        "sft",
        "best",
        "random",
        "shuffled",
        "questions",
        "all_weights --lr 1e-4",
    ],
)
def test_every_control_trains_and_goes_on_where_it_was_stopped(extra, tmp_path, monkeypatch):
    """Two steps and, after a stop, a third are three steps."""
    for name in ("whole", "halved"):
        variant, *flags = extra.split()
        arguments = ["x", variant, "--out", str(tmp_path / name), *SMALL, "--save-every", "2", *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        if name == "halved":
            usual = locus_mini.train_step

            def stopped(policy, optimizer, cues, step, *rest, usual=usual):
                if step == 2:
                    raise KeyboardInterrupt
                return usual(policy, optimizer, cues, step, *rest)

            with monkeypatch.context() as patch:
                patch.setattr(locus_mini, "train_step", stopped)
                with pytest.raises(SystemExit):
                    main()
            monkeypatch.setattr(sys, "argv", ["x", variant, "--resume", str(tmp_path / name)])
        main()
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "halved")]
    assert files[0].read_bytes() == files[1].read_bytes()
    last = json.loads((tmp_path / "halved" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["skipped"] == 0 and last["grad_norm"] > 0


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sft", {"beta": 0.1}),
        ("best", {"beta": 0.1}),
        ("shuffled", {"data": "coco"}),
        ("questions", {"data": "photos"}),
    ],
)
def test_variants_that_make_no_sense_are_refused(name, flags):
    with pytest.raises(UserError, match=name):
        variant_flags(name, flags)


def test_imitation_goes_without_the_kl():
    assert variant_flags("best", {})["beta"] == variant_flags("sft", {"beta": 0.0})["beta"] == 0
    assert "beta" not in variant_flags("random", {})


@pytest.mark.parametrize("words", [[], ["sfd"]])
def test_an_unknown_variant_names_the_known_ones(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "shuffled" in capsys.readouterr().err


def test_a_group_of_one_random_model_answers_is_imitated(policy):
    """On both families' random models: the loss of what was kept falls."""
    items = prompts(policy, 3)
    rollouts = rollout(policy, collate(policy, items), 4, 10, torch.Generator().manual_seed(1))
    kept, better = best_completions(rollouts, torch.rand(3, 4, generator=torch.Generator().manual_seed(2)))
    cfg = Config(beta=0.0, prompts=3, max_new_tokens=10, lr=0.01)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=0.01)
    share = [(collate(policy, items), kept, better, None)]
    losses = [locus_mini.optimizer_step(policy, optimizer, share, cfg, sft_loss)["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]
