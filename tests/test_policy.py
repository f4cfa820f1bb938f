"""The packed group pass, the rollout and the plain model must agree: that is what makes GRPO here GRPO."""

import copy
from types import SimpleNamespace

import pytest
import torch
from random_models import prompts, random_policy, with_adapter
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import policy as policy_module
from evaluation.reply_cache import generate_replies
from files.errors import UserError
from models import add_lora, enable_gradient_checkpointing
from policy import (
    Policy,
    Rollout,
    collate,
    compute_image_features,
    decode_completions,
    group_mask,
    rollout,
    token_logps,
)
from prompts import EncodedPrompt
from training.checks import self_check


def oracle_logps(policy: Policy, item: EncodedPrompt, tokens: torch.Tensor) -> torch.Tensor:
    """log-probabilities [T] of one answer by the model's own forward pass: one row, nothing of ours."""
    ids = torch.cat([item.input_ids, tokens])[None]
    kinds = torch.cat([item.mm_token_type_ids, torch.zeros_like(tokens)])[None]
    logits = policy.base_model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=kinds,
        pixel_values=torch.cat([p.pixel_values for p in item.images]),
        image_grid_thw=torch.stack([p.grid_thw for p in item.images]),
    ).logits[0, len(item.input_ids) - 1 : -1]  # [T, V]
    logps = (logits.float() + policy.logit_bias).log_softmax(-1)
    return logps.gather(-1, tokens[:, None])[:, 0]


def sampled(policy: Policy, count: int = 3, group: int = 4, seed: int = 0):
    """Fresh prompts twice (the batch drops its pixels, the oracle needs them), and a rollout on them."""
    torch.manual_seed(seed)
    items = prompts(policy, count)
    kept = copy.deepcopy(items)
    batch = collate(policy, items)
    return kept, batch, rollout(policy, batch, group, 16, torch.Generator().manual_seed(seed))


def test_answers_differ_in_length_and_some_are_cut(policy):
    """Without this the agreement below would not cover what it claims."""
    _, batch, rollouts = sampled(policy)
    lengths = rollouts.mask.sum(-1)
    assert len(lengths.unique()) > 3
    assert rollouts.finished.any() and not rollouts.finished.all()
    assert (batch.segment_ids[:, 0] == -1).any(), "no prompt is padded"


def test_packed_rollout_and_plain_model_agree(policy):
    kept, batch, rollouts = sampled(policy)
    packed = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    assert torch.allclose(packed, rollouts.logps, atol=1e-5)
    assert (packed[~rollouts.mask] == 0).all()
    for b, item in enumerate(kept):
        for g in range(rollouts.tokens.shape[1]):
            length = int(rollouts.mask[b, g].sum())
            plain = oracle_logps(policy, item, rollouts.tokens[b, g, :length])
            assert torch.allclose(packed[b, g, :length], plain, atol=1e-5)


def test_gradient_of_the_adapter_is_that_of_one_row_at_a_time(policy):
    kept, batch, rollouts = sampled(policy)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    weight = torch.randn(rollouts.tokens.shape, generator=torch.Generator().manual_seed(1)) * rollouts.mask
    packed = torch.autograd.grad(
        (token_logps(policy, batch, rollouts.tokens, rollouts.mask) * weight).sum(), trained
    )
    plain = 0.0
    for b, item in enumerate(kept):
        for g in range(rollouts.tokens.shape[1]):
            length = int(rollouts.mask[b, g].sum())
            logps = oracle_logps(policy, item, rollouts.tokens[b, g, :length])
            plain = plain + (logps * weight[b, g, :length]).sum()
    for ours, theirs in zip(packed, torch.autograd.grad(plain, trained), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_no_token_of_one_answer_reaches_another(policy):
    """Change one answer: no log-probability of any other answer moves by a bit more than rounding."""
    _, batch, rollouts = sampled(policy)
    before = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    changed = rollouts.tokens.clone()
    changed[:, 1] = torch.where(rollouts.mask[:, 1], (changed[:, 1] + 7) % 300 + 20, changed[:, 1])
    after = token_logps(policy, batch, changed, rollouts.mask)
    others = [0, 2, 3]
    assert torch.allclose(before[:, others], after[:, others], atol=1e-6)
    assert not torch.allclose(before[:, 1], after[:, 1], atol=1e-2)


def test_padding_of_the_prompts_changes_nothing(policy):
    """A prompt alone and beside longer ones gives the same greedy answer and the same scores."""
    _, batch, rollouts = sampled(policy)
    for b in range(len(batch.prompts)):
        alone = collate(policy, batch.prompts[b : b + 1])
        ours = token_logps(policy, alone, rollouts.tokens[b : b + 1], rollouts.mask[b : b + 1])
        assert torch.allclose(
            ours, token_logps(policy, batch, rollouts.tokens, rollouts.mask)[b : b + 1], atol=1e-5
        )


def test_greedy_answers_are_those_of_generate(policy):
    """The one decoding loop of the project against transformers' own, every sampling field explicit."""
    torch.manual_seed(3)
    items = prompts(policy, 2)
    expected = []
    for item in items:
        out = policy.base_model.generate(
            input_ids=item.input_ids[None],
            attention_mask=torch.ones_like(item.input_ids)[None],
            mm_token_type_ids=item.mm_token_type_ids[None],
            pixel_values=torch.cat([p.pixel_values for p in item.images]),
            image_grid_thw=torch.stack([p.grid_thw for p in item.images]),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=10,
            eos_token_id=policy.stop_ids.tolist(),
            pad_token_id=policy.processor.tokenizer.pad_token_id,
        )
        tokens = out[0, len(item.input_ids) :]
        expected.append(policy.processor.tokenizer.decode(tokens, skip_special_tokens=True))
    opening = policy.processor.family.opening
    assert [text for text, _ in generate_replies(policy, items, 10)] == [opening + text for text in expected]


def test_sampling_follows_the_distribution(policy):
    """Frequencies of 4,000 first tokens against the model's own probabilities (temperature 1)."""
    items = prompts(policy, 1)
    kept = copy.deepcopy(items[0])
    rollouts = rollout(policy, collate(policy, items), 4000, 1, torch.Generator().manual_seed(5))
    vocabulary = len(policy.logit_bias)
    drawn = torch.bincount(rollouts.tokens.flatten(), minlength=vocabulary) / 4000
    tokens = torch.arange(vocabulary)
    first = torch.stack([oracle_logps(policy, kept, token[None])[0] for token in tokens[::16]]).exp()
    error = (first * (1 - first) / 4000).sqrt() + 1e-4
    assert ((drawn[::16] - first).abs() < 5 * error).all()
    assert drawn[policy.base_model.config.image_token_id] == 0


def test_the_same_seed_samples_the_same(policy):
    _, batch, rollouts = sampled(policy)
    again = rollout(policy, batch, 4, 16, torch.Generator().manual_seed(0))
    other = rollout(policy, batch, 4, 16, torch.Generator().manual_seed(1))
    assert torch.equal(rollouts.tokens, again.tokens)
    assert decode_completions(policy, rollouts) != decode_completions(policy, other)


def test_features_are_computed_once_and_pixels_let_go(policy):
    items = prompts(policy, 2)
    compute_image_features(policy, items)
    features = [item.images[0].features[0] for item in items]
    assert all(picture.pixel_values.numel() == 0 for item in items for picture in item.images)
    compute_image_features(policy, items)
    assert all(a is item.images[0].features[0] for a, item in zip(features, items))


def test_patches_as_one_product_are_the_convolution(policy):
    (proj,) = (module for module in policy.base_model.modules() if isinstance(module, torch.nn.Conv3d))
    patches = torch.randn(7, proj.in_channels, *proj.kernel_size)
    own = torch.nn.Conv3d.forward(proj, patches).flatten(1)
    assert own.std() > 0.01 and torch.allclose(proj(patches), own, atol=1e-5)


def test_reference_is_the_model_without_adapter():
    policy = random_policy("qwen3_vl")
    torch.manual_seed(0)
    items = prompts(policy, 2)
    batch = collate(policy, items)
    rollouts = rollout(policy, batch, 2, 8, torch.Generator().manual_seed(0))
    base = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    adapted = with_adapter(policy)
    with adapted.reference():
        assert torch.equal(token_logps(adapted, batch, rollouts.tokens, rollouts.mask), base)
    assert not torch.allclose(token_logps(adapted, batch, rollouts.tokens, rollouts.mask), base, atol=1e-3)


def test_group_mask_by_hand():
    """Prompt of two (one padded) and two answers whose columns alternate."""
    mask = group_mask(torch.tensor([[-1, 0, 1, 2, 1, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 1, 1, 0, 1, 0],
        [0, 1, 0, 0, 0, 1],
    ]
    assert group_mask(torch.tensor([[0, 1, 2, 1, 2]]), num_queries=2)[0, 0].int().tolist() == [
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize("rank", [1, 8])
def test_only_the_text_layers_are_adapted(rank):
    policy = with_adapter(random_policy("qwen2_5_vl"), rank)
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trained and all(".language_model." in name and "lora_" in name for name in trained)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def gradient(policy: Policy, batch, rollouts: Rollout) -> torch.Tensor:
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    logps = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    return torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), trained)])


def test_recomputed_layers_keep_less_and_change_nothing(policy):
    """Neither answers, nor log-probabilities, nor gradients; what is kept for the backward pass shrinks."""
    _, batch, rollouts = sampled(policy)

    def kept() -> int:
        held: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logps = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
        return sum(held.values()) if logps.requires_grad else 0

    before, usual = gradient(policy, batch, rollouts), kept()
    enable_gradient_checkpointing(policy)
    assert kept() < 0.7 * usual
    assert torch.equal(gradient(policy, batch, rollouts), before)
    again = rollout(policy, batch, 4, 16, torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, rollouts.tokens) and torch.equal(again.logps, rollouts.logps)


def test_prompts_answered_in_parts_are_one_rollout(policy):
    """Of other lengths in every part: joined, they score as they were sampled."""
    torch.manual_seed(0)
    items = prompts(policy, 4)
    generator = torch.Generator().manual_seed(3)
    parts = [rollout(policy, collate(policy, items[i : i + 1]), 3, 4 + i, generator) for i in range(4)]
    rollouts = Rollout.join(parts)
    assert rollouts.tokens.shape[:2] == (4, 3) and rollouts.mask.sum() == sum(
        part.mask.sum() for part in parts
    )
    with torch.no_grad():
        logps = token_logps(policy, collate(policy, items), rollouts.tokens, rollouts.mask)
    assert torch.allclose(logps, rollouts.logps, atol=1e-4)


@pytest.mark.parametrize("share", [1, 2, 4])
def test_heads_that_share_keys_ask_as_one_and_get_the_usual_answer(share, monkeypatch):
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=share, is_causal=True)
    query = torch.randn(3, 5, 8, 16).transpose(1, 2)  # [B, A, Q, D], as transformers has it
    key, value = torch.randn(2, 3, 8 // share, 20, 16)  # [B, K, L, D] each
    mask = torch.rand(3, 1, 5, 20) > 0.4
    mask[..., 0] = True
    ours, _ = policy_module.grouped_query_attention(module, query, key, value, mask, scaling=0.3)
    usual, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert ours.shape == (3, 5, 8, 16) and torch.allclose(ours, usual, atol=1e-6)
    kernel = torch.nn.functional.scaled_dot_product_attention

    def as_gpus_lay_it_out(*args, **ways) -> torch.Tensor:  # [B, K, Q, D] out of [B, Q, K, D] in memory
        return kernel(*args, **ways).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_gpus_lay_it_out)
    assert torch.equal(
        policy_module.grouped_query_attention(module, query, key, value, mask, scaling=0.3)[0], ours
    )
    other, _ = policy_module.grouped_query_attention(module, query, key, value, mask.roll(1, -1), scaling=0.3)
    assert not torch.allclose(other, usual, atol=1e-2), "the mask does nothing"


def test_a_cache_with_room_holds_what_one_that_appends_holds():
    """Beyond its room it grows, never over the most that there will be."""
    torch.manual_seed(0)
    roomy, plain = policy_module.PreallocatedCacheLayer(40), DynamicLayer()
    for columns in (7, 3, 3, 3, 3, 15, 6):
        keys, values = torch.randn(2, 2, 3, columns, 4)  # [B, K, Q, D] each
        ours, usual = roomy.update(keys, values), plain.update(keys, values)
        assert torch.equal(ours[0], usual[0]) and torch.equal(ours[1], usual[1])
        assert roomy.get_seq_length() == plain.get_seq_length() <= roomy.keys.shape[2] <= 40


def test_pictures_seen_in_parts_have_the_same_features(policy, monkeypatch):
    torch.manual_seed(0)
    together, apart = prompts(policy, 4), prompts(policy, 4)
    compute_image_features(policy, together)
    monkeypatch.setattr(policy_module, "MAX_PATCHES_PER_PASS", 60)
    compute_image_features(policy, apart)
    for one, other in zip(together, apart):
        for picture, same in zip(one.images, other.images):
            for layer, expected in zip(picture.features, same.features):
                assert torch.allclose(layer, expected, atol=1e-5)


def test_states_that_are_not_finite_end_a_rollout_in_one_sentence(policy):
    _, batch, _ = sampled(policy)
    norm = policy.base_model.model.language_model.norm
    norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        rollout(policy, batch, 2, 4, torch.Generator().manual_seed(0))


def test_self_check_passes_on_a_fresh_adapter():
    policy = random_policy("qwen3_vl")
    measured = self_check(add_lora(policy, 4), prompts(policy, 2), 4, 12, seed=0)
    assert measured["rollout_gap"] < 1e-4 and measured["packing_gap"] < 1e-4
    assert measured["reference_gap"] == 0 and measured["perfect_iou"] > 0.99
