"""Bugs that raise nothing by themselves (DESIGN §7), each put in on purpose: the self-check must refuse."""

import pytest
import torch
from random_models import prompts, random_policy
from torch import nn

import policy as policy_module
from files.errors import UserError
from models import add_lora
from policy import Policy, collate, rollout, token_logps
from training.checks import self_check


def fresh(kind: str = "qwen3_vl") -> Policy:
    return add_lora(random_policy(kind), 4)


def check(policy: Policy) -> dict:
    torch.manual_seed(0)
    return self_check(policy, prompts(policy, 3), 4, 12, seed=0)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_nothing_is_found_where_nothing_is_wrong(kind):
    assert check(fresh(kind))["rollout_gap"] < 1e-4


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_one_dimensional_positions(kind, monkeypatch):
    """What transformers falls back to without mm_token_type_ids."""
    policy = fresh(kind)

    def flat(ids, mm_token_type_ids, image_grid_thw, attention_mask):
        return (attention_mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1), None

    monkeypatch.setattr(policy.base_model.model, "get_rope_index", flat)
    with pytest.raises(UserError, match="one-dimensional"):
        check(policy)


def test_a_mask_that_lets_answers_see_each_other(monkeypatch):
    policy, right = fresh(), policy_module.group_mask

    def leaky(segment_ids: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        return right(segment_ids.clamp(max=0), queries)

    monkeypatch.setattr(policy_module, "group_mask", leaky)
    with pytest.raises(UserError, match="disagree|without its group"):
        check(policy)


def test_a_mask_that_is_wrong_in_training_alone(monkeypatch):
    policy, right = fresh(), policy_module.group_mask

    def leaky(segment_ids: torch.Tensor, queries: int) -> torch.Tensor:
        return right(segment_ids if queries < segment_ids.shape[1] else segment_ids.clamp(max=0), queries)

    monkeypatch.setattr(policy_module, "group_mask", leaky)
    with pytest.raises(UserError, match="disagree|without its group"):
        check(policy)


def test_an_image_token_that_can_be_sampled():
    policy = fresh()
    policy.logit_bias = torch.zeros_like(policy.logit_bias)
    with pytest.raises(UserError, match="image tokens could be sampled"):
        check(policy)


def test_a_sampled_image_token_breaks_the_pass_that_the_check_protects():
    """Why the tokens are forbidden: an answer with one has more placeholders than features."""
    policy = fresh()
    batch = collate(policy, prompts(policy, 1))
    tokens = torch.full((1, 1, 2), policy.base_model.config.image_token_id)
    with pytest.raises((ValueError, RuntimeError)):
        token_logps(policy, batch, tokens, torch.ones(1, 1, 2, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_weights_in_half_precision(dtype):
    policy = fresh()
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    with pytest.raises(UserError, match="not float32"):
        check(policy)


def test_half_precision_adapters_would_not_move():
    """The trap itself: AdamW at 1e-6 leaves bf16 weights of usual size where they are, float32 ones not."""
    for dtype, moves in ((torch.bfloat16, False), (torch.float32, True)):
        weight = nn.Parameter(torch.full((100,), 0.05, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
        before = weight.detach().clone()
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert torch.equal(weight.detach(), before) != moves


def test_eager_attention():
    policy = fresh()
    policy.base_model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="sdpa"):
        check(policy)


def test_eager_attention_adds_our_mask_instead_of_applying_it():
    """The trap itself: the same pass under eager attention, and answers see each other."""
    policy = fresh()
    torch.manual_seed(0)
    batch = collate(policy, prompts(policy, 2))
    rollouts = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(0))
    right = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    policy.base_model.set_attn_implementation("eager")
    assert not torch.allclose(token_logps(policy, batch, rollouts.tokens, rollouts.mask), right, atol=1e-2)


def test_weights_that_pass_no_gradient_after_a_rollout():
    """What repacked 4-bit weights do on CPUs with AVX512-BF16: after the first pass without gradients, the
    layer's input gets none."""
    policy = fresh()

    class Repacking(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner, self.repacked = inner, False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.repacked = self.repacked or not torch.is_grad_enabled()
            return self.inner(x.detach() if self.repacked else x)

    for layer in policy.base_model.model.language_model.layers:
        for name in ("gate_proj", "up_proj"):
            adapted = getattr(layer.mlp, name)
            adapted.base_layer = Repacking(adapted.base_layer)
    with pytest.raises(UserError, match="repacked"):
        check(policy)


def test_an_adapter_that_has_been_trained_is_no_fresh_one():
    policy = fresh()
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with pytest.raises(UserError, match="not the reference"):
        check(policy)


def test_a_rollout_that_never_varies():
    policy = fresh()
    policy.logit_bias[:] = -torch.inf
    policy.logit_bias[50] = 0
    with pytest.raises(UserError, match="same"):
        check(policy)


def test_stale_rope_deltas_change_nothing():
    """What an earlier call left in the model must not matter, since positions are always explicit."""
    policy = fresh()
    torch.manual_seed(0)
    items = prompts(policy, 2)
    batch = collate(policy, items)
    rollouts = rollout(policy, batch, 2, 8)
    policy.base_model.model.rope_deltas = torch.tensor([[1000], [-7]])
    assert torch.equal(rollout(policy, collate(policy, items), 2, 8).tokens, rollouts.tokens)
