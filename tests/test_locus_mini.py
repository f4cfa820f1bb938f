"""GRPO: the loss against its formulas in plain Python, and what must not change the gradient."""

import copy
import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from random_models import make_infinite, prompts, random_policy, with_adapter

from data import CueConfig, scene_cues
from locus_mini import (
    FP16_LOSS_SCALE,
    LOCUS,
    LOSS_SCALE_INTERVAL,
    Config,
    Example,
    group_advantages,
    grpo_loss,
    importance_weights,
    learning_rate,
    micro_batch_slices,
    optimizer_step,
    sample_batch,
    token_weights,
    train_step,
    update_loss_scale,
)
from models import add_lora, load_policy
from policy import Policy, Rollout, collate, rollout, token_logps
from reward import Reward
from training import run_folder

CFG = Config(beta=0.05, steps=300, prompts=4, max_new_tokens=10, lr=1.0)


GAP, RATIO = "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"


def loss_in_python(logps, old, ref, rollout_logps, advantages, mask, cfg: Config) -> float:
    """The loss by the formulas of the papers, with loops over Python floats."""
    B, G, T = mask.shape
    lengths = [[int(mask[b, g].sum()) for g in range(G)] for b in range(B)]
    total = 0.0
    for b in range(B):
        for g in range(G):
            for t in range(T):
                if not mask[b, g, t]:
                    continue
                A, rho = float(advantages[b, g]), math.exp(float(logps[b, g, t] - old[b, g, t]))
                clipped = min(max(rho, 1 - cfg.clip_low), 1 + cfg.clip_high)
                J = min(rho * A, clipped * A)
                if A < 0:
                    J = max(J, cfg.dual_clip * A)
                if cfg.importance_sampling_cap:
                    mu = math.exp(float(old[b, g, t] - rollout_logps[b, g, t]))
                    J *= min(mu, cfg.importance_sampling_cap)
                d = float(ref[b, g, t] - logps[b, g, t])
                k3 = math.exp(d) - d - 1
                weight = {
                    "token_mean": 1 / sum(map(sum, lengths)),
                    "grpo": 1 / (B * G * lengths[b][g]),
                    "dr_grpo": 1 / (B * G * cfg.max_new_tokens),
                }[cfg.loss]
                total += weight * (cfg.beta * k3 - J)
    return total


def example(seed: int = 0, B: int = 3, G: int = 4, T: int = 6):
    """Ratios from 0.3 to 5, both signs of the advantage, several lengths, and a group of equal rewards."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(B, G, T, generator=generator, dtype=torch.float64)
    old = logps + torch.randn(B, G, T, generator=generator, dtype=torch.float64) * 0.6
    ref = logps + torch.randn(B, G, T, generator=generator, dtype=torch.float64) * 0.4
    lengths = torch.randint(1, T + 1, (B, G), generator=generator)
    mask = torch.arange(T) < lengths[..., None]
    rewards = torch.rand(B, G, generator=generator, dtype=torch.float64)
    rewards[-1] = 0.7  # a group of equal rewards stays in the denominator and keeps its KL
    return logps, old, ref, group_advantages(rewards), mask


def loss_weights(mask, cfg: Config):
    num_completions = mask.shape[0] * mask.shape[1]
    return token_weights(mask.double(), cfg.loss, float(mask.sum()), num_completions, cfg.max_new_tokens)


@pytest.mark.parametrize("loss", ["token_mean", "grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("cap", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_loss_equals_its_formula(loss, beta, cap, seed):
    logps, old, ref, advantages, mask = example(seed)
    rollout_logps = old + 0.5 * torch.randn(old.shape, generator=torch.Generator().manual_seed(seed))
    cfg = replace(CFG, loss=loss, beta=beta, importance_sampling_cap=cap)
    importance = importance_weights(old, rollout_logps, cap)
    reference, weights = ref if beta else None, loss_weights(mask, cfg)
    value, _ = grpo_loss(logps, old, reference, advantages, weights, cfg, importance)
    expected = loss_in_python(logps, old, ref, rollout_logps, advantages, mask, cfg)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    if cap == 0:
        assert torch.equal(value, grpo_loss(logps, old, reference, advantages, weights, cfg)[0])


@pytest.mark.parametrize(
    ("gap", "weight"), [(0.0, 1.0), (-0.5, math.exp(-0.5)), (0.5, math.exp(0.5)), (1, 2)]
)
def test_importance_weights_scale_the_gradient(gap, weight):
    """At ratio 1 the gradient of the loss is −μ · A: μ itself has none."""
    logps = torch.tensor([[[-1.0]]], dtype=torch.float64, requires_grad=True)
    old = logps.detach()
    importance = importance_weights(old, old - gap, 2.0)
    cfg, A = replace(CFG, beta=0.0), torch.tensor([[3.0]], dtype=torch.float64)
    grpo_loss(logps, old, None, A, torch.ones(1, 1, 1), cfg, importance)[0].backward()
    assert logps.grad.item() == pytest.approx(-3 * weight, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, 2.0),
        (1.25, 2.0, 2.5),  # inside the clip range: unchanged
        (1.5, 2.0, 2.6),  # above, A > 0: clipped at 1.3
        (0.5, 2.0, 1.0),  # below, A > 0: the pessimistic side, not clipped
        (0.5, -2.0, -1.6),  # below, A < 0: clipped at 0.8
        (1.5, -2.0, -3.0),  # above, A < 0: not clipped
        (10.0, -2.0, -6.0),  # far above, A < 0: dual clip at 3
    ],
)
def test_each_side_of_the_clip_range(ratio, advantage, expected):
    logps = torch.tensor([[[math.log(ratio)]]], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, 1, 1, dtype=torch.float64)
    loss, stats = grpo_loss(logps, old, None, torch.tensor([[advantage]]), torch.ones(1, 1, 1), CFG)
    assert -loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    has_gradient = ratio in (1.0, 1.25) or (ratio, advantage) in ((0.5, 2.0), (1.5, -2.0))
    gradient = -ratio * advantage if has_gradient else 0.0
    assert logps.grad.item() == pytest.approx(gradient, abs=1e-12)
    assert stats["clip_ratio"].item() == (expected in (2.6, -1.6))


def test_the_expectation_of_k3_is_the_kl():
    """E[exp(d) − d − 1] = KL(π ‖ ref); a sum over the vocabulary computes the expectation exactly."""
    torch.manual_seed(0)
    policy = (0.5 * torch.randn(50, dtype=torch.float64)).log_softmax(-1)
    ref = (0.5 * torch.randn(50, dtype=torch.float64)).log_softmax(-1)
    exact = (policy.exp() * (policy - ref)).sum().item()
    weights = policy.exp().view(1, 1, 50)
    cfg = replace(CFG, beta=1.0)
    value, _ = grpo_loss(
        policy.view(1, 1, 50), policy.view(1, 1, 50), ref.view(1, 1, 50), torch.zeros(1, 1), weights, cfg
    )
    assert value.item() == pytest.approx(exact, rel=1e-9)


def test_k3_stays_finite_far_from_the_reference():
    logps = torch.tensor([[[-1.0, -200.0]]], requires_grad=True)
    ref = torch.tensor([[[-200.0, -1.0]]])
    cfg = replace(CFG, beta=1.0)
    loss, stats = grpo_loss(logps, logps.detach(), ref, torch.zeros(1, 1), torch.full((1, 1, 2), 0.5), cfg)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()
    assert stats["kl"].item() == 20  # each of the two is capped at 10


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 1.0, 1e-7])
@pytest.mark.parametrize("num_generations", [2, 3, 7, 8])
def test_equal_rewards_have_advantages_of_exactly_zero(value, num_generations):
    rewards = torch.full((2, num_generations), value)
    for loss in ("token_mean", "dr_grpo"):
        assert torch.equal(group_advantages(rewards, loss), torch.zeros(2, num_generations))


def test_advantages_equal_their_formula():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    first = [(r - 3) / (math.sqrt(14 / 3) + 1e-6) for r in (1, 2, 3, 6)]
    second = [(r - 0.25) / (0.5 + 1e-6) for r in (0, 0, 0, 1)]
    assert group_advantages(rewards).flatten().tolist() == pytest.approx(first + second, abs=1e-12)
    assert group_advantages(rewards, "dr_grpo")[0].tolist() == [-2.0, -1.0, 0.0, 3.0]


def test_the_rewards_of_a_group_do_not_change_the_advantages_of_another():
    """Nor does shifting or scaling them change its own."""
    rewards = torch.rand(2, 5, dtype=torch.float64)
    changed = torch.stack([rewards[0], 10 * rewards[1] + 3])
    assert torch.equal(group_advantages(rewards)[0], group_advantages(changed)[0])
    assert torch.allclose(group_advantages(rewards)[1], group_advantages(changed)[1], atol=1e-4)


class NoStep:
    """An optimizer that changes nothing, so that a test can read the gradients."""

    def __init__(self, parameters):
        self.param_groups = [{"params": parameters, "lr": 0.0}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def step(self) -> None:
        pass


def gradients(policy, batch, rollouts, advantages, cfg: Config, old) -> list[torch.Tensor]:
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    (slices,) = micro_batch_slices(cfg.prompts, cfg)
    parts = [(collate(policy, batch.prompts[s]), rollouts.select(s), advantages[s], old[s]) for s in slices]
    optimizer_step(policy, NoStep(trainable_params), parts, cfg)
    return [p.grad.clone() for p in trainable_params]


@pytest.mark.parametrize("loss", ["token_mean", "grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_micro_batch_size_does_not_change_the_gradient(loss, beta):
    """4 prompts in passes of 4, 2 and 1; one group has equal rewards, and the ratios are not 1."""
    policy = with_adapter(random_policy("qwen3_vl"))
    torch.manual_seed(0)
    batch = collate(policy, prompts(policy, 4))
    rollouts = rollout(policy, batch, 3, 10, torch.Generator().manual_seed(0))
    rewards = torch.rand(4, 3)
    rewards[2] = 0.5
    advantages = group_advantages(rewards)
    old = token_logps(policy, batch, rollouts.tokens, rollouts.mask).detach() + 0.1 * torch.randn(
        rollouts.mask.shape
    )
    cfg = replace(CFG, loss=loss, beta=beta, max_grad_norm=1e9)
    expected = gradients(policy, batch, rollouts, advantages, replace(cfg, micro_batch=4), old)
    assert max(g.abs().max() for g in expected) > 1e-4
    for size in (2, 1):
        accumulated = gradients(policy, batch, rollouts, advantages, replace(cfg, micro_batch=size), old)
        for gradient, expected_gradient in zip(accumulated, expected, strict=True):
            assert torch.allclose(gradient, expected_gradient, atol=1e-6)


def test_sampling_and_training_of_the_embedded_model_agree_in_float32():
    """On the CPU the correction is 1 to 1e-4, whether the gradient is corrected or not."""
    policy, cfg = add_lora(load_policy("tiny"), 4), replace(CFG, prompts=2, source="object", micro_batch=2)
    batch = sample_batch(policy.processor, scene_cues(CueConfig(), "train", 0), 0, cfg)
    cfg = replace(cfg, max_new_tokens=policy.processor.family.max_new_tokens)
    rollouts = LOCUS.sample(policy, batch, 0, cfg)
    collated = collate(policy, [example.prompt for example in batch])
    with torch.no_grad():
        old = token_logps(policy, collated, rollouts.tokens, rollouts.mask)
    importance = importance_weights(old, rollouts.logps, 2.0)
    assert 0 < (importance - 1).abs().max() < 1e-4
    advantages = group_advantages(torch.rand(2, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = NoStep([p for p in policy.model.parameters() if p.requires_grad])
    metrics = optimizer_step(policy, optimizer, [(collated, rollouts, advantages, None)], cfg)
    assert 0 < metrics[GAP] < 1e-4 and 0 < abs(metrics[RATIO] - 1) < 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_log_has_the_mean_gap_and_the_mean_ratio_over_tokens(beta):
    """Two micro-batches with known gaps. The second has equal rewards: without the KL it gets no pass."""
    policy = with_adapter(random_policy("qwen3_vl"))
    torch.manual_seed(0)
    parts, gaps = [], (0.5, -1.0)
    for prompt, gap in zip(prompts(policy, 2), gaps):
        batch = collate(policy, [prompt])
        rollouts = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(1))
        rollouts = replace(rollouts, logps=rollouts.logps - gap * rollouts.mask)
        parts.append((batch, rollouts, torch.tensor([[1.0, -1.0, 0.0]]) * (gap > 0), None))
    optimizer = NoStep([p for p in policy.model.parameters() if p.requires_grad])
    metrics = optimizer_step(policy, optimizer, parts, replace(CFG, beta=beta, importance_sampling_cap=1.2))
    first, second = (part[1].mask.sum().item() for part in parts)
    second_gap, second_ratio = (1.0, math.exp(-1)) if beta else (0.0, 1.0)
    expected = (0.5 * first + second_gap * second) / (first + second)
    assert metrics[GAP] == pytest.approx(expected, abs=1e-4)
    expected = (1.2 * first + second_ratio * second) / (first + second)
    assert metrics[RATIO] == pytest.approx(expected, abs=1e-4)
    off = optimizer_step(policy, optimizer, parts, replace(CFG, beta=beta, importance_sampling_cap=0.0))
    assert off[GAP] == metrics[GAP] and off[RATIO] == 1


def test_a_rollout_is_split_into_updates_and_an_update_into_micro_batches():
    cfg = replace(CFG, prompts=12, updates=3, micro_batch=3)
    updates = [[list(range(12))[s] for s in slices] for slices in micro_batch_slices(12, cfg)]
    assert updates == [[[0, 1, 2], [3]], [[4, 5, 6], [7]], [[8, 9, 10], [11]]]


def test_a_gradient_that_is_not_finite_changes_no_weight():
    policy = with_adapter(random_policy("qwen3_vl"))
    torch.manual_seed(0)
    batch = collate(policy, prompts(policy, 2))
    rollouts = rollout(policy, batch, 2, 6, torch.Generator().manual_seed(0))
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params, lr=0.1)
    before = [p.detach().clone() for p in trainable_params]
    infinite = torch.tensor([[float("inf"), 1.0], [0.0, 1.0]])
    stats = optimizer_step(policy, optimizer, [(batch, rollouts, infinite, None)], CFG)
    assert stats["skipped"] == 1
    assert all(torch.equal(p, b) for p, b in zip(trainable_params, before, strict=True))
    finite = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    stats = optimizer_step(policy, optimizer, [(batch, rollouts, finite, None)], CFG)
    assert stats["skipped"] == 0
    assert not all(torch.equal(p, b) for p, b in zip(trainable_params, before, strict=True))


def test_the_learning_rate_is_positive_in_every_step_and_decays_to_0():
    cfg = replace(CFG, steps=100, warmup=0.1, lr=1.0, decay="linear")
    rates = [learning_rate(step, cfg) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] and all(a >= b for a, b in pairwise(rates[9:]))
    assert 0 < rates[-1] < 0.02
    constant = replace(cfg, decay="constant")
    assert [learning_rate(step, constant) for step in (0, 9, 50, 99)] == [pytest.approx(0.1), 1, 1, 1]


def test_a_step_raises_the_probability_of_the_better_completion():
    policy = with_adapter(random_policy("qwen3_vl"))
    torch.manual_seed(0)
    batch = collate(policy, prompts(policy, 1))
    rollouts = rollout(policy, batch, 4, 8, torch.Generator().manual_seed(0))
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params, lr=3e-3)
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    before = token_logps(policy, batch, rollouts.tokens, rollouts.mask).sum(-1)[0]
    optimizer_step(policy, optimizer, [(batch, rollouts, advantages, None)], replace(CFG, beta=0.0))
    after = token_logps(policy, batch, rollouts.tokens, rollouts.mask).sum(-1)[0]
    assert after[0] > before[0] and (after[1:] < before[1:]).all()


# ---------------------------------------------------------------- groups that are not finite, and float16


def float16_policy() -> Policy:
    """In float16, with an adapter in float32."""
    policy = random_policy("qwen3_vl")
    policy.base_model.half()
    return with_adapter(policy)


def random_rewards(completions: list[str], example: Example, cfg: Config) -> list[Reward]:
    """Rewards that depend on the example alone."""
    rng = random.Random(example.index)
    return [Reward(rng.random(), rng.random(), 1.0) for _ in completions]


def one_step(policy: Policy, examples: list[Example], rollouts: Rollout, cfg: Config):
    """The metrics of a step on these completions, and the weights after it, as one vector."""
    policy = copy.deepcopy(policy)
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params)
    task = replace(LOCUS, sample=lambda *_: rollouts, score=random_rewards)
    metrics, _ = train_step(policy, optimizer, None, 0, cfg, task, examples)
    metrics = {name: value for name, value in metrics.items() if not name.startswith("seconds")}
    return metrics, torch.cat([p.detach().flatten() for p in trainable_params])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_without_a_group_that_is_not_finite_equals_one_on_the_others(updates, dtype):
    policy = float16_policy() if dtype == torch.float16 else with_adapter(random_policy("qwen3_vl"))
    torch.manual_seed(0)
    encoded_prompts = prompts(policy, 4)
    examples = [Example(i, None, prompt) for i, prompt in enumerate(encoded_prompts)]
    make_infinite(policy, encoded_prompts[1])
    batch = collate(policy, encoded_prompts)
    rollouts = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(0))
    cfg = replace(CFG, updates=updates, micro_batch=1, lr=1e-3)
    metrics, weights = one_step(policy, examples, rollouts, cfg)
    others = [0, 2, 3]
    kept = rollouts.select(torch.tensor(others))
    expected, same = one_step(policy, [examples[i] for i in others], kept, replace(cfg, prompts=3))
    assert torch.equal(weights, same)
    assert metrics.pop("frac_groups_not_finite") == 0.25 and expected.pop("frac_groups_not_finite") == 0
    assert metrics == expected and metrics["skipped"] == 0 and metrics["grad_norm"] > 0
    start = torch.cat([p.detach().flatten() for p in policy.model.parameters() if p.requires_grad])
    assert not torch.equal(weights, start)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_in_which_no_group_is_finite_is_skipped(updates, beta):
    policy = float16_policy()
    torch.manual_seed(0)
    encoded_prompts = prompts(policy, 4)
    for prompt in encoded_prompts:
        make_infinite(policy, prompt)
    batch = collate(policy, encoded_prompts)
    rollouts = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(0))
    examples = [Example(i, None, prompt) for i, prompt in enumerate(encoded_prompts)]
    cfg = replace(CFG, updates=updates, micro_batch=2, lr=1e-3, beta=beta)
    metrics, weights = one_step(policy, examples, rollouts, cfg)
    assert metrics["skipped"] == metrics["frac_groups_not_finite"] == 1
    before = torch.cat([p.detach().flatten() for p in policy.model.parameters() if p.requires_grad])
    assert torch.equal(weights, before)


def test_the_loss_scale_halves_after_a_skipped_step_and_doubles_after_a_hundred_applied_ones():
    group = {"loss_scale": 1024.0}
    for applied, count, expected in (
        (True, LOSS_SCALE_INTERVAL - 1, 1024),
        (True, 1, 2048),
        (True, LOSS_SCALE_INTERVAL - 1, 2048),
        (False, 1, 1024),  # the count starts anew
        (True, LOSS_SCALE_INTERVAL - 1, 1024),
        (False, 3, 128),
        (True, LOSS_SCALE_INTERVAL, 256),
    ):
        for _ in range(count):
            update_loss_scale(group, applied)
        assert group["loss_scale"] == expected


def test_gradients_that_overflow_float16_halve_the_scale_until_they_fit(tmp_path):
    """The steps after a checkpoint equal those without one: it holds the scale."""
    policy = float16_policy()
    torch.manual_seed(0)
    batch = collate(policy, prompts(policy, 1))
    rollouts = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(0))
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params, lr=0.0)  # so that every step has the same gradients
    optimizer.param_groups[0]["loss_scale"] = 2.0**22
    parts = [(batch, rollouts, torch.tensor([[1.0, -1.0, 0.0]]), None)]
    skipped = [optimizer_step(policy, optimizer, parts, CFG)["skipped"] for _ in range(20)]
    num_skipped = int(sum(skipped))
    assert 2 < num_skipped < 20 and skipped == [1] * num_skipped + [0] * (20 - num_skipped)
    assert optimizer.param_groups[0]["loss_scale"] == 2.0 ** (22 - num_skipped)
    (tmp_path / "metrics.jsonl").touch()
    run_folder.save_checkpoint(tmp_path, 1, policy.model, optimizer, {})
    resumed = torch.optim.AdamW(trainable_params, lr=1.0)
    assert run_folder.load_checkpoint(tmp_path, policy.model, resumed, {}) == 1
    for name in ("loss_scale", "applied_steps", "lr"):
        assert resumed.param_groups[0][name] == optimizer.param_groups[0][name]


def test_only_float16_has_a_loss_scale():
    for policy in (float16_policy(), with_adapter(random_policy("qwen3_vl"))):
        torch.manual_seed(0)
        batch = collate(policy, prompts(policy, 1))
        rollouts = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-3)
        optimizer_step(policy, optimizer, [(batch, rollouts, torch.tensor([[1.0, -1.0, 0.0]]), None)], CFG)
        scale = FP16_LOSS_SCALE if policy.base_model.dtype == torch.float16 else None
        assert optimizer.param_groups[0].get("loss_scale") == scale
