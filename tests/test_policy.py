"""The packed pass, the rollout and the plain model assign the same log-probabilities to a completion."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from random_models import make_infinite, prompts, random_policy, with_adapter

import policy as policy_module
from evaluation.reply_cache import generate_replies
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
from training.decoding import decoder


def plain_distribution(policy: Policy, prompt: EncodedPrompt, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [T, V] along one completion, by transformers' own forward pass on a single row."""
    input_ids = torch.cat([prompt.input_ids, tokens])[None]
    token_types = torch.cat([prompt.mm_token_type_ids, torch.zeros_like(tokens)])[None]
    logits = policy.base_model(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        mm_token_type_ids=token_types,
        pixel_values=torch.cat([image.pixel_values for image in prompt.images]),
        image_grid_thw=torch.stack([image.grid_thw for image in prompt.images]),
    ).logits[0, len(prompt.input_ids) - 1 : -1]  # [T, V]
    return ((logits.float() + policy.logit_bias) / policy.temperature).log_softmax(-1)


def plain_logps(policy: Policy, prompt: EncodedPrompt, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [T] of the tokens of one completion."""
    return plain_distribution(policy, prompt, tokens).gather(-1, tokens[:, None])[:, 0]


def sampled(policy: Policy, count: int = 3, group: int = 4, seed: int = 0):
    """Prompts with their pixels (which a batch drops), the batch of the same prompts, and a rollout on it."""
    torch.manual_seed(seed)
    encoded_prompts = prompts(policy, count)
    with_pixels = copy.deepcopy(encoded_prompts)
    batch = collate(policy, encoded_prompts)
    return with_pixels, batch, rollout(policy, batch, group, 16, torch.Generator().manual_seed(seed))


def test_sampled_completions_have_different_lengths_and_not_all_are_finished(policy):
    """A condition of the tests below: without it they would not cover masks, padding and stop tokens."""
    _, batch, rollouts = sampled(policy)
    lengths = rollouts.mask.sum(-1)
    assert len(lengths.unique()) > 3
    assert rollouts.finished.any() and not rollouts.finished.all()
    assert (batch.segment_ids[:, 0] == -1).any(), "no prompt is padded"


def test_packed_pass_rollout_and_plain_model_agree(policy):
    with_pixels, batch, rollouts = sampled(policy)
    packed = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    assert torch.allclose(packed, rollouts.logps, atol=1e-5)
    assert (packed[~rollouts.mask] == 0).all()
    for b, prompt in enumerate(with_pixels):
        for g in range(rollouts.tokens.shape[1]):
            length = int(rollouts.mask[b, g].sum())
            plain = plain_logps(policy, prompt, rollouts.tokens[b, g, :length])
            assert torch.allclose(packed[b, g, :length], plain, atol=1e-5)


def test_the_cache_of_a_long_rollout_grows_and_forgets_nothing(policy):
    """It has room for 32 tokens more at a time: 70 tokens fill it twice. No token stops a reply."""
    policy = replace(policy, stop_ids=policy.stop_ids[:0])
    for G in (1, 3):
        batch = collate(policy, prompts(policy, 2))
        rollouts = rollout(policy, batch, G, 70, torch.Generator().manual_seed(0))
        assert rollouts.mask.sum() == 2 * G * 70
        logps = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
        assert torch.allclose(logps, rollouts.logps, atol=1e-5)


def test_the_adapter_gradient_equals_that_of_one_completion_per_row(policy):
    with_pixels, batch, rollouts = sampled(policy)
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    weight = torch.randn(rollouts.tokens.shape, generator=torch.Generator().manual_seed(1)) * rollouts.mask
    packed = torch.autograd.grad(
        (token_logps(policy, batch, rollouts.tokens, rollouts.mask) * weight).sum(), trainable_params
    )
    plain = 0.0
    for b, prompt in enumerate(with_pixels):
        for g in range(rollouts.tokens.shape[1]):
            length = int(rollouts.mask[b, g].sum())
            logps = plain_logps(policy, prompt, rollouts.tokens[b, g, :length])
            plain = plain + (logps * weight[b, g, :length]).sum()
    for gradient, expected in zip(packed, torch.autograd.grad(plain, trainable_params), strict=True):
        assert torch.allclose(gradient, expected, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_no_completion_sees_the_tokens_of_another(policy):
    """If one completion changes, the log-probabilities of all others stay the same up to rounding."""
    _, batch, rollouts = sampled(policy)
    before = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    changed = rollouts.tokens.clone()
    changed[:, 1] = torch.where(rollouts.mask[:, 1], (changed[:, 1] + 7) % 300 + 20, changed[:, 1])
    after = token_logps(policy, batch, changed, rollouts.mask)
    others = [0, 2, 3]
    assert torch.allclose(before[:, others], after[:, others], atol=1e-6)
    assert not torch.allclose(before[:, 1], after[:, 1], atol=1e-2)


def test_padding_does_not_change_the_scores(policy):
    """Completions of a prompt score the same alone and in a batch with longer prompts."""
    _, batch, rollouts = sampled(policy)
    for b in range(len(batch.prompts)):
        alone = collate(policy, batch.prompts[b : b + 1])
        logps = token_logps(policy, alone, rollouts.tokens[b : b + 1], rollouts.mask[b : b + 1])
        assert torch.allclose(
            logps, token_logps(policy, batch, rollouts.tokens, rollouts.mask)[b : b + 1], atol=1e-5
        )


def test_greedy_replies_equal_those_of_generate(policy):
    """The decoding loop of this project against transformers' own, with every sampling field explicit."""
    torch.manual_seed(3)
    encoded_prompts = prompts(policy, 2)
    expected = []
    for prompt in encoded_prompts:
        generated = policy.base_model.generate(
            input_ids=prompt.input_ids[None],
            attention_mask=torch.ones_like(prompt.input_ids)[None],
            mm_token_type_ids=prompt.mm_token_type_ids[None],
            pixel_values=torch.cat([image.pixel_values for image in prompt.images]),
            image_grid_thw=torch.stack([image.grid_thw for image in prompt.images]),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=10,
            eos_token_id=policy.stop_ids.tolist(),
            pad_token_id=policy.processor.tokenizer.pad_token_id,
        )
        tokens = generated[0, len(prompt.input_ids) :]
        expected.append(policy.processor.tokenizer.decode(tokens, skip_special_tokens=True))
    opening = policy.processor.family.opening
    assert [text for text, _ in generate_replies(policy, encoded_prompts, 10)] == [
        opening + text for text in expected
    ]


def test_sampling_follows_the_distribution(policy):
    """The frequencies of 4,000 first tokens match the model's probabilities at temperature 1."""
    encoded_prompts = prompts(policy, 1)
    with_pixels = copy.deepcopy(encoded_prompts[0])
    rollouts = rollout(policy, collate(policy, encoded_prompts), 4000, 1, torch.Generator().manual_seed(5))
    vocabulary = len(policy.logit_bias)
    frequencies = torch.bincount(rollouts.tokens.flatten(), minlength=vocabulary) / 4000
    tokens = torch.arange(vocabulary)
    probs = torch.stack([plain_logps(policy, with_pixels, token[None])[0] for token in tokens[::16]]).exp()
    error = (probs * (1 - probs) / 4000).sqrt() + 1e-4
    assert ((frequencies[::16] - probs).abs() < 5 * error).all()
    assert frequencies[policy.base_model.config.image_token_id] == 0


def test_the_same_seed_samples_the_same_tokens(policy):
    _, batch, rollouts = sampled(policy)
    again = rollout(policy, batch, 4, 16, torch.Generator().manual_seed(0))
    other_seed = rollout(policy, batch, 4, 16, torch.Generator().manual_seed(1))
    assert torch.equal(rollouts.tokens, again.tokens)
    assert decode_completions(policy, rollouts) != decode_completions(policy, other_seed)


def test_image_features_are_computed_once_and_pixels_are_freed(policy):
    encoded_prompts = prompts(policy, 2)
    compute_image_features(policy, encoded_prompts)
    features = [prompt.images[0].features[0] for prompt in encoded_prompts]
    assert all(image.pixel_values.numel() == 0 for prompt in encoded_prompts for image in prompt.images)
    compute_image_features(policy, encoded_prompts)
    assert all(first is prompt.images[0].features[0] for first, prompt in zip(features, encoded_prompts))


def test_patch_embedding_equals_the_convolution(policy):
    (conv,) = (module for module in policy.base_model.modules() if isinstance(module, torch.nn.Conv3d))
    patches = torch.randn(7, conv.in_channels, *conv.kernel_size)
    expected = torch.nn.Conv3d.forward(conv, patches).flatten(1)
    assert expected.std() > 0.01 and torch.allclose(conv(patches), expected, atol=1e-5)


def test_the_reference_is_the_model_without_its_adapter():
    policy = random_policy("qwen3_vl")
    torch.manual_seed(0)
    encoded_prompts = prompts(policy, 2)
    batch = collate(policy, encoded_prompts)
    rollouts = rollout(policy, batch, 2, 8, torch.Generator().manual_seed(0))
    base = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    adapted = with_adapter(policy)
    with adapted.reference():
        assert torch.equal(token_logps(adapted, batch, rollouts.tokens, rollouts.mask), base)
    assert not torch.allclose(token_logps(adapted, batch, rollouts.tokens, rollouts.mask), base, atol=1e-3)


def test_group_mask_by_hand():
    """A prompt of one token and one of padding, then two completions whose columns alternate."""
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
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert names and all(".language_model." in name and "lora_" in name for name in names)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def gradient(policy: Policy, batch, rollouts: Rollout) -> torch.Tensor:
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    logps = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    return torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), trainable_params)])


def test_gradient_checkpointing_saves_memory_and_changes_no_result(policy):
    """Completions and gradients stay the same, and fewer bytes are saved for the backward pass."""
    _, batch, rollouts = sampled(policy)

    def saved_bytes() -> int:
        sizes: dict[int, int] = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            logps = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
        return sum(sizes.values()) if logps.requires_grad else 0

    expected, bytes_before = gradient(policy, batch, rollouts), saved_bytes()
    enable_gradient_checkpointing(policy)
    assert saved_bytes() < 0.7 * bytes_before
    assert torch.equal(gradient(policy, batch, rollouts), expected)
    again = rollout(policy, batch, 4, 16, torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, rollouts.tokens) and torch.equal(again.logps, rollouts.logps)


def test_rollouts_of_parts_of_a_batch_join_to_one(policy):
    """The parts have different lengths; joined, they score as they were sampled."""
    torch.manual_seed(0)
    encoded_prompts = prompts(policy, 4)
    generator = torch.Generator().manual_seed(3)
    parts = [
        rollout(policy, collate(policy, encoded_prompts[i : i + 1]), 3, 4 + i, generator) for i in range(4)
    ]
    rollouts = Rollout.join(parts)
    assert rollouts.tokens.shape[:2] == (4, 3) and rollouts.mask.sum() == sum(
        part.mask.sum() for part in parts
    )
    with torch.no_grad():
        logps = token_logps(policy, collate(policy, encoded_prompts), rollouts.tokens, rollouts.mask)
    assert torch.allclose(logps, rollouts.logps, atol=1e-4)


def test_image_features_are_the_same_in_several_passes(policy, monkeypatch):
    torch.manual_seed(0)
    together, apart = prompts(policy, 4), prompts(policy, 4)
    compute_image_features(policy, together)
    monkeypatch.setattr(policy_module, "MAX_PATCHES_PER_PASS", 60)
    compute_image_features(policy, apart)
    for prompt, same_prompt in zip(together, apart):
        for image, same_image in zip(prompt.images, same_prompt.images):
            for layer, expected in zip(image.features, same_image.features):
                assert torch.allclose(layer, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_group_that_is_not_finite_has_no_tokens_and_changes_no_other(greedy, dtype, policy):
    """In a batch, and in the pass that scores it."""
    policy.base_model.to(dtype)
    torch.manual_seed(0)
    encoded_prompts = prompts(policy, 3)
    kwargs = {} if greedy else {"generator": torch.Generator()}

    def sample() -> Rollout:
        if not greedy:
            kwargs["generator"].manual_seed(0)
        return rollout(policy, collate(policy, encoded_prompts), 3, 8, **kwargs)

    expected = sample()
    assert expected.finite.tolist() == [True] * 3
    make_infinite(policy, encoded_prompts[1])
    rollouts = sample()
    assert rollouts.finite.tolist() == [True, False, True]
    assert not rollouts.mask[1].any() and (rollouts.logps[1] == 0).all()
    for b in (0, 2):
        for name in ("tokens", "logps"):
            values, others = (getattr(r, name)[b][r.mask[b]] for r in (rollouts, expected))
            assert torch.equal(values, others)
    with torch.no_grad():
        logps = token_logps(policy, collate(policy, encoded_prompts), rollouts.tokens, rollouts.mask)
    assert logps.isfinite().all() and (logps[1] == 0).all()
    joined = Rollout.join([rollouts.select(slice(0, 1)), rollouts.select(slice(1, 3))])
    assert torch.equal(joined.finite, rollouts.finite)


def test_one_completion_that_is_not_finite_makes_its_whole_group_so(policy):
    """Its keys and values are in the row that the group shares, where 0 · NaN is NaN."""
    torch.manual_seed(0)
    encoded_prompts = prompts(policy, 3)
    batch = collate(policy, encoded_prompts)
    expected = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(0))
    other_tokens = torch.cat([batch.input_ids.flatten(), expected.tokens[1:].flatten()])
    first_tokens = expected.tokens[0, :, 0][expected.mask[0, :, 1]]  # of completions that go past it
    token = next(token for token in first_tokens if token not in other_tokens)
    policy.base_model.get_input_embeddings().weight[token] = torch.inf
    rollouts = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(0))
    assert rollouts.finite.tolist() == [False, True, True]
    assert torch.equal(rollouts.tokens[1:][rollouts.mask[1:]], expected.tokens[1:][expected.mask[1:]])


@pytest.mark.parametrize("place", ["hidden state", "logits"])
def test_damaged_weights_leave_no_group_finite(place, policy):
    _, batch, _ = sampled(policy)
    if place == "logits":
        policy.base_model.lm_head.weight[7] = torch.inf
    else:
        policy.base_model.model.language_model.norm.weight[0] = torch.nan
    assert not rollout(policy, batch, 2, 4, torch.Generator().manual_seed(0)).finite.any()
    assert not rollout(policy, batch, 1, 4).finite.any()


def test_self_check_passes_on_a_fresh_adapter():
    policy = random_policy("qwen3_vl")
    measured = self_check(add_lora(policy, 4), prompts(policy, 2), 4, 12, seed=0)
    assert measured["rollout_gap"] < 1e-4 and measured["packing_gap"] < 1e-4
    assert measured["reference_gap"] == 0 and measured["perfect_iou"] > 0.99


# ---------------------------------------------------------------- temperature and entropy


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_divides_the_logits_of_sampling_and_scoring_alike(policy, temperature):
    """In the plain rollout, the fused one and the packed pass, and in that of the reference."""
    policy.temperature = temperature
    with_pixels, batch, plain = sampled(policy)
    fused = rollout(policy, batch, 4, 16, torch.Generator().manual_seed(0), decoder(policy, 4, 16))
    for rollouts in (plain, fused):
        assert torch.allclose(
            token_logps(policy, batch, rollouts.tokens, rollouts.mask), rollouts.logps, atol=1e-5
        )
    tokens = plain.tokens[0, 0][plain.mask[0, 0]]
    for context in (nullcontext(), policy.reference()):
        with context:
            expected = plain_logps(policy, with_pixels[0], tokens)
            packed = token_logps(policy, batch, plain.tokens, plain.mask)[0, 0][plain.mask[0, 0]]
        assert torch.allclose(packed, expected, atol=1e-5)


def test_a_lower_temperature_samples_likelier_tokens(policy):
    """At 0.05 nearly the greedy ones, at 20 nearly any; scored at temperature 1."""
    policy.stop_ids = torch.tensor([-1])
    batch, means = collate(policy, prompts(policy, 2)), []
    for temperature in (0.05, 1.0, 20.0):
        hot = replace(policy, temperature=temperature)
        tokens = rollout(hot, batch, 8, 8, torch.Generator().manual_seed(0)).tokens
        means.append(token_logps(policy, batch, tokens, torch.ones_like(tokens, dtype=torch.bool)).mean())
    assert means[0] > means[1] + 0.5 and means[1] > means[2] + 0.2  # a random model is nearly uniform at 1


def test_greedy_decoding_has_no_temperature(policy):
    batch = collate(policy, prompts(policy, 3))
    expected = rollout(policy, batch, 1, 12)
    greedy = rollout(replace(policy, temperature=7.0), batch, 1, 12)
    assert torch.equal(greedy.tokens, expected.tokens) and torch.equal(greedy.logps, expected.logps)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entropies_are_those_of_the_plain_model_and_have_no_gradient(policy, temperature, monkeypatch):
    """−Σ p · log p over all tokens that may be sampled, in the same chunks as the log-probabilities."""
    policy.temperature = temperature
    with_pixels, batch, rollouts = sampled(policy, count=1, group=1)
    monkeypatch.setattr(policy_module, "LOGIT_CHUNK_SIZE", 3 * len(policy.logit_bias))
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    entropies: list[torch.Tensor] = []
    logps = token_logps(policy, batch, rollouts.tokens, rollouts.mask, entropies)
    plain = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    assert torch.equal(logps, plain)
    for gradient, expected in zip(*(torch.autograd.grad(x.sum(), parameters) for x in (logps, plain))):
        assert torch.equal(gradient, expected)
    tokens = rollouts.tokens[0, 0][rollouts.mask[0, 0]]
    distribution = plain_distribution(policy, with_pixels[0], tokens)  # [T, V], −inf for image tokens
    expected = -(distribution.exp() * distribution).nansum(-1)  # [T]
    assert len(entropies) == -(-len(tokens) // 3) and not any(entropy.requires_grad for entropy in entropies)
    assert torch.allclose(torch.cat(entropies), expected, atol=1e-5)
    assert (expected > 0.1).all() and (expected < math.log(len(policy.logit_bias))).all()
