"""Bugs that raise no error of their own, each introduced on purpose: the self-check must refuse to train."""

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
def test_a_correct_policy_passes(kind):
    assert check(fresh(kind))["rollout_gap"] < 1e-4


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_one_dimensional_positions_are_refused(kind, monkeypatch):
    """transformers falls back to them if mm_token_type_ids are missing."""
    policy = fresh(kind)

    def one_dimensional(ids, mm_token_type_ids, image_grid_thw, attention_mask):
        return (attention_mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1), None

    monkeypatch.setattr(policy.base_model.model, "get_rope_index", one_dimensional)
    with pytest.raises(UserError, match="one-dimensional"):
        check(policy)


def test_a_mask_that_lets_completions_see_each_other_is_refused(monkeypatch):
    policy, group_mask = fresh(), policy_module.group_mask

    def leaky(segment_ids: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        return group_mask(segment_ids.clamp(max=0), queries)

    monkeypatch.setattr(policy_module, "group_mask", leaky)
    with pytest.raises(UserError, match="disagree|without its group"):
        check(policy)


def test_a_mask_that_is_wrong_only_in_training_is_refused(monkeypatch):
    policy, group_mask = fresh(), policy_module.group_mask

    def leaky(segment_ids: torch.Tensor, queries: int) -> torch.Tensor:
        return group_mask(
            segment_ids if queries < segment_ids.shape[1] else segment_ids.clamp(max=0), queries
        )

    monkeypatch.setattr(policy_module, "group_mask", leaky)
    with pytest.raises(UserError, match="disagree|without its group"):
        check(policy)


def test_an_image_token_that_can_be_sampled_is_refused():
    policy = fresh()
    policy.logit_bias = torch.zeros_like(policy.logit_bias)
    with pytest.raises(UserError, match="image tokens could be sampled"):
        check(policy)


def test_a_sampled_image_token_would_break_the_training_pass():
    """A completion with such a token has more image placeholders than image features."""
    policy = fresh()
    batch = collate(policy, prompts(policy, 1))
    tokens = torch.full((1, 1, 2), policy.base_model.config.image_token_id)
    with pytest.raises((ValueError, RuntimeError)):
        token_logps(policy, batch, tokens, torch.ones(1, 1, 2, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_weights_in_half_precision_are_refused(dtype):
    policy = fresh()
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    with pytest.raises(UserError, match="not float32"):
        check(policy)


def test_half_precision_adapter_weights_would_not_change():
    """The bug itself: AdamW at a learning rate of 1e-6 changes float32 weights of 0.05, but not bf16 ones."""
    for dtype, changes in ((torch.bfloat16, False), (torch.float32, True)):
        weight = nn.Parameter(torch.full((100,), 0.05, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
        before = weight.detach().clone()
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert torch.equal(weight.detach(), before) != changes


def test_eager_attention_is_refused():
    policy = fresh()
    policy.base_model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="sdpa"):
        check(policy)


def test_eager_attention_would_add_our_mask_instead_of_applying_it():
    """The bug itself: the same pass in eager attention, where completions see each other."""
    policy = fresh()
    torch.manual_seed(0)
    batch = collate(policy, prompts(policy, 2))
    rollouts = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(0))
    expected = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    policy.base_model.set_attn_implementation("eager")
    assert not torch.allclose(token_logps(policy, batch, rollouts.tokens, rollouts.mask), expected, atol=1e-2)


def test_weights_that_pass_no_gradient_after_a_rollout_are_refused():
    """As 4-bit weights do on CPUs with AVX512-BF16: a pass without gradients repacks them, and from then on
    the layer's input gets none."""
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


def test_a_trained_adapter_is_refused():
    policy = fresh()
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with pytest.raises(UserError, match="not the reference"):
        check(policy)


def test_a_rollout_without_variation_is_refused():
    policy = fresh()
    policy.logit_bias[:] = -torch.inf
    policy.logit_bias[50] = 0
    with pytest.raises(UserError, match="same"):
        check(policy)


def test_stale_rope_deltas_do_not_change_a_rollout():
    """What an earlier call leaves in the model must not matter, because positions are always explicit."""
    policy = fresh()
    torch.manual_seed(0)
    encoded_prompts = prompts(policy, 2)
    batch = collate(policy, encoded_prompts)
    rollouts = rollout(policy, batch, 2, 8)
    policy.base_model.model.rope_deltas = torch.tensor([[1000], [-7]])
    assert torch.equal(rollout(policy, collate(policy, encoded_prompts), 2, 8).tokens, rollouts.tokens)
