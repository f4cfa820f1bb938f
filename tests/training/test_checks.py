"""Bugs that raise no error by themselves, each made on purpose: the self-check must refuse them."""

from dataclasses import replace

import pytest
import torch
from random_models import make_infinite, prompts, random_policy
from torch import nn

import policy as policy_module
from data import CueConfig, encode_cue, scene_cues
from files.errors import UserError
from models import add_lora, load_policy
from policy import Batch, Policy, collate, rollout, token_logps
from prompts import EncodedPrompt
from training import checks
from training.checks import self_check


def untrained_policy(kind: str = "qwen3_vl") -> Policy:
    return add_lora(random_policy(kind), 4)


def check(policy: Policy) -> dict:
    torch.manual_seed(0)
    return self_check(policy, prompts(policy, 3), 4, 12, seed=0)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_sound_policy_passes(kind):
    assert check(untrained_policy(kind))["rollout_gap"] < 1e-4


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_one_dimensional_positions(kind, monkeypatch):
    """The positions of image tokens in transformers when mm_token_type_ids are missing."""
    policy = untrained_policy(kind)

    def flat_positions(ids, mm_token_type_ids, image_grid_thw, attention_mask):
        return (attention_mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1), None

    monkeypatch.setattr(policy.base_model.model, "get_rope_index", flat_positions)
    with pytest.raises(UserError, match="one-dimensional"):
        check(policy)


def test_a_mask_that_lets_completions_see_each_other(monkeypatch):
    policy, original = untrained_policy(), policy_module.group_mask

    def leaky_mask(segment_ids: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        return original(segment_ids.clamp(max=0), queries)

    monkeypatch.setattr(policy_module, "group_mask", leaky_mask)
    with pytest.raises(UserError, match="disagree|without its group"):
        check(policy)


def test_a_mask_that_is_wrong_only_in_training(monkeypatch):
    policy, original = untrained_policy(), policy_module.group_mask

    def leaky_mask(segment_ids: torch.Tensor, queries: int) -> torch.Tensor:
        return original(segment_ids if queries < segment_ids.shape[1] else segment_ids.clamp(max=0), queries)

    monkeypatch.setattr(policy_module, "group_mask", leaky_mask)
    with pytest.raises(UserError, match="disagree|without its group"):
        check(policy)


def test_an_image_token_that_can_be_sampled():
    policy = untrained_policy()
    policy.logit_bias = torch.zeros_like(policy.logit_bias)
    with pytest.raises(UserError, match="image tokens could be sampled"):
        check(policy)


def test_a_sampled_image_token_breaks_the_pass_that_the_check_protects():
    """Why image tokens are forbidden: a completion with one has more placeholders than features."""
    policy = untrained_policy()
    batch = collate(policy, prompts(policy, 1))
    tokens = torch.full((1, 1, 2), policy.base_model.config.image_token_id)
    with pytest.raises((ValueError, RuntimeError)):
        token_logps(policy, batch, tokens, torch.ones(1, 1, 2, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_weights_in_half_precision(dtype):
    policy = untrained_policy()
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    with pytest.raises(UserError, match="not float32"):
        check(policy)


def test_half_precision_adapters_would_not_move():
    """The bug itself: a step of AdamW at 1e-6 is lost in bf16 weights of usual size, but not in float32."""
    for dtype, moves in ((torch.bfloat16, False), (torch.float32, True)):
        weight = nn.Parameter(torch.full((100,), 0.05, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
        before = weight.detach().clone()
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert torch.equal(weight.detach(), before) != moves


def test_eager_attention():
    policy = untrained_policy()
    policy.base_model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="sdpa"):
        check(policy)


def test_eager_attention_adds_our_mask_instead_of_applying_it():
    """The bug itself: the same pass under eager attention, and completions see each other."""
    policy = untrained_policy()
    torch.manual_seed(0)
    batch = collate(policy, prompts(policy, 2))
    rollouts = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(0))
    expected = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    policy.base_model.set_attn_implementation("eager")
    assert not torch.allclose(token_logps(policy, batch, rollouts.tokens, rollouts.mask), expected, atol=1e-2)


def test_weights_that_pass_no_gradient_after_a_rollout():
    """On CPUs with AVX512-BF16 the first pass without gradients repacks 4-bit weights, and from then on the
    layer's input gets no gradient."""
    policy = untrained_policy()

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


def test_a_trained_adapter_is_not_the_reference():
    policy = untrained_policy()
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with pytest.raises(UserError, match="not the reference"):
        check(policy)


def test_damaged_weights():
    policy = untrained_policy()
    policy.base_model.model.language_model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="not finite in torch.float32: its weights are damaged"):
        check(policy)


def test_an_image_that_is_not_finite_leaves_the_others_to_be_checked(monkeypatch):
    policy = untrained_policy()
    torch.manual_seed(0)
    encoded_prompts = prompts(policy, 3)
    make_infinite(policy, encoded_prompts[1])
    assert self_check(policy, encoded_prompts, 4, 12, seed=0)["rollout_gap"] < 1e-4
    original = policy_module.target_logps
    monkeypatch.setattr(
        policy_module, "target_logps", lambda policy, h, *rest: original(policy, 3 * h, *rest)
    )
    with pytest.raises(UserError, match="disagree"):
        self_check(policy, encoded_prompts, 4, 12, seed=0)


def test_a_group_of_equal_completions():
    policy = untrained_policy()
    policy.logit_bias[:] = -torch.inf
    policy.logit_bias[50] = 0
    with pytest.raises(UserError, match="same"):
        check(policy)


def test_stale_rope_deltas_change_nothing():
    """Positions that an earlier call has left in the model do not matter: ours are always explicit."""
    policy = untrained_policy()
    torch.manual_seed(0)
    batch_prompts = prompts(policy, 2)
    batch = collate(policy, batch_prompts)
    rollouts = rollout(policy, batch, 2, 8)
    policy.base_model.model.rope_deltas = torch.tensor([[1000], [-7]])
    assert torch.equal(rollout(policy, collate(policy, batch_prompts), 2, 8).tokens, rollouts.tokens)


# ---------------------------------------------------------------- trained weights in 16 and in 4 bits

# Their tokens have p ≈ 1 for the most part, so a fault moves few of them: random weights would hide this.


@pytest.fixture(scope="module", params=["bf16", "NF4"])
def trained(request) -> tuple[Policy, list[EncodedPrompt]]:
    """The embedded model in 16 or in 4 bits with a fresh adapter, and four of its cues."""
    policy = add_lora(load_policy("tiny", load_in_4bit=request.param == "NF4", dtype=torch.bfloat16), 16)
    assert ("Linear4bit" in {type(m).__name__ for m in policy.model.modules()}) == (request.param == "NF4")
    cues = scene_cues(CueConfig(), "train", 0)
    return policy, [encode_cue(policy.processor, cues[i], "object") for i in range(4)]


def check_trained(policy: Policy, encoded_prompts: list[EncodedPrompt]) -> dict:
    return self_check(policy, encoded_prompts, 8, 40, seed=0)


@pytest.mark.parametrize("scale", [1, 3])
def test_sound_trained_weights_pass(scale, trained, monkeypatch):
    """Also with an lm_head that is three times as large in sampling and in scoring: a sharper model."""
    lm_head = trained[0].base_model.lm_head
    original = lm_head.forward
    monkeypatch.setattr(lm_head, "forward", lambda hidden: original(scale * hidden))
    measured = check_trained(*trained)
    assert 0 < measured["rollout_gap"] < 0.01 and measured["packing_gap"] < 0.01
    assert measured["reference_gap"] == 0


def test_trained_weights_and_positions_off_by_one(trained, monkeypatch):
    def shifted_logps(policy: Policy, batch: Batch, *completions: torch.Tensor) -> torch.Tensor:
        return token_logps(policy, replace(batch, completion_start=batch.completion_start + 1), *completions)

    monkeypatch.setattr(checks, "token_logps", shifted_logps)
    with pytest.raises(UserError, match="disagree"):
        check_trained(*trained)


def test_trained_weights_and_completions_that_see_each_other(trained, monkeypatch):
    original = policy_module.group_mask

    def leaky_mask(segment_ids: torch.Tensor, queries: int) -> torch.Tensor:
        return original(segment_ids if queries < segment_ids.shape[1] else segment_ids.clamp(max=0), queries)

    monkeypatch.setattr(policy_module, "group_mask", leaky_mask)
    with pytest.raises(UserError, match="disagree"):
        check_trained(*trained)


def test_trained_weights_and_another_lm_head_in_scoring(trained, monkeypatch):
    original = policy_module.target_logps
    monkeypatch.setattr(
        policy_module, "target_logps", lambda policy, h, *rest: original(policy, 3 * h, *rest)
    )
    with pytest.raises(UserError, match="disagree"):
        check_trained(*trained)


@pytest.mark.parametrize("fault", ["mean", "90 % quantile"])
def test_each_statistic_refuses_by_itself(fault, trained, monkeypatch):
    """Few tokens that are far off move the mean alone; many that are slightly off move the quantile alone."""
    policy, encoded_prompts = trained
    size, every = (2.0, 20) if fault == "mean" else (0.2, 8)

    def wrong_logps(*inputs: torch.Tensor) -> torch.Tensor:
        logps = token_logps(*inputs)
        far_off = torch.arange(logps.numel()).view(logps.shape) % every == 0
        return logps + size * far_off

    monkeypatch.setattr(checks, "token_logps", wrong_logps)
    with pytest.raises(UserError, match=f"disagree.*{fault}"):
        check_trained(policy, encoded_prompts)
