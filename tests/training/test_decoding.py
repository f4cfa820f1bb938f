"""The fused decoder samples what the plain rollout does, and each of its shortcuts changes only rounding."""

from collections import Counter

import pytest
import torch
from count_dispatches import LIMIT, OperatorCounter, build_policy, count_step
from peft.tuners.lora import LoraLayer
from random_models import KINDS, prompts, random_policy, with_adapter

from data import CueConfig, encode_cue, open_cues
from locus_mini import optimizer_step, sample_batch, sample_completions
from models import load_policy
from policy import Policy, Rollout, collate, rollout, run_text, token_logps
from prompts import EncodedPrompt
from training import decoding
from training.decoding import FusedDecoder, JointLinear, decoder
from training.memory import step_metrics
from training.settings import resolve


def both(policy: Policy, encoded: list[EncodedPrompt], G: int, length: int = 16) -> tuple[Rollout, Rollout]:
    """The same rollout with `run_text` and with the fused decoder."""
    batch = collate(policy, encoded)
    decodes = run_text, FusedDecoder(policy, G, length)
    plain, fused = (
        rollout(policy, batch, G, length, torch.Generator().manual_seed(0), decode) for decode in decodes
    )
    return plain, fused


def assert_same(rollouts: Rollout, expected: Rollout, atol: float = 1e-5) -> None:
    """Tokens are compared up to the stop token; what follows is padding."""
    assert torch.equal(rollouts.mask, expected.mask) and torch.equal(rollouts.finished, expected.finished)
    assert torch.equal(rollouts.tokens * rollouts.mask, expected.tokens * expected.mask)
    assert torch.allclose(rollouts.logps, expected.logps, atol=atol)


@pytest.mark.parametrize("G", [3, 8])
@pytest.mark.parametrize(
    "text", [{}, dict(width=128, num_key_value_heads=1), dict(width=128, num_key_value_heads=4)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_decoder_samples_what_the_plain_rollout_does(kind, text, G):
    """Prompts with padding, completions of different lengths, and 4, 2 or 1 heads that share keys."""
    policy = with_adapter(random_policy(kind, **text))
    batch = collate(policy, encoded := prompts(policy, 3))
    plain, fused = both(policy, encoded, G)
    assert_same(fused, plain)
    assert (batch.segment_ids == -1).any() and len(plain.mask.sum(-1).unique()) > 2
    assert not plain.finished.all() and plain.mask.shape[2] == 16, "no completion fills the cache"
    with torch.no_grad():
        packed = token_logps(policy, batch, fused.tokens, fused.mask)
    assert torch.allclose(packed, fused.logps, atol=1e-5)


def test_the_fused_decoder_decodes_greedily_too(policy):
    batch = collate(policy, prompts(policy, 3))
    plain, fused = (rollout(policy, batch, 1, 12, None, d) for d in (run_text, FusedDecoder(policy, 1, 12)))
    assert_same(fused, plain)


@pytest.mark.parametrize("prompts_per_pass", [1, 2, 100])
def test_prompts_can_be_read_any_number_at_a_time(policy, prompts_per_pass, monkeypatch):
    encoded = prompts(policy, 4)
    monkeypatch.setattr(decoding, "PROMPTS_PER_PASS", prompts_per_pass)
    assert_same(*reversed(both(policy, encoded, 4)))


def test_a_mask_that_shows_other_completions_is_noticed(policy, monkeypatch):
    """The comparison above has teeth: if completions see each other, log-probabilities move."""
    monkeypatch.setattr(torch, "eye", lambda size: torch.ones(size, size))
    plain, fused = both(policy, prompts(policy, 2), 4)
    first = plain.logps[..., 0], fused.logps[..., 0]
    assert torch.allclose(*first, atol=1e-5), "the first token depends on the prompt alone"
    assert (plain.logps - fused.logps)[..., 2:].abs().max() > 1e-2


def test_a_joint_layer_adds_what_peft_adds(policy):
    """As two products (Qwen2.5-VL's layers have a bias) and merged (Qwen3-VL's have none)."""
    attention, x = policy.base_model.model.language_model.layers[0].self_attn, torch.randn(5, 64)
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    with torch.no_grad():
        joint = JointLinear(torch.float32, *layers)
        expected = torch.cat([layer(x) for layer in layers], 1)
        base = torch.cat([layer.base_layer(x) for layer in layers], 1)
        assert torch.allclose(joint(x), expected, atol=1e-5)
        assert not torch.allclose(base, expected, atol=1e-2), "the adapter adds nothing"
        weights = [layer.base_layer.weight.clone() for layer in layers]
    is_merged = joint.A is None
    assert is_merged == (layers[0].base_layer.bias is None)
    assert all(torch.equal(layer.base_layer.weight, w) for layer, w in zip(layers, weights, strict=True))


@pytest.fixture(scope="module", params=[False, True], ids=["bf16", "4 bit"])
def half_policy(request) -> Policy:
    """The embedded model in bf16 or NF4, with an adapter that changes its outputs."""
    policy = with_adapter(load_policy("tiny", load_in_4bit=request.param, dtype=torch.bfloat16), 16)
    for module in policy.model.modules():
        if isinstance(module, LoraLayer):
            module.lora_B["default"].weight.data.mul_(0.05)
    return policy


def test_in_16_and_4_bits_the_fused_decoder_stays_near_the_training_pass(half_policy):
    """The gaps of sampling to the training pass, in the statistics of the self-check; a third of its limits.

    The plain decoder runs the layers of the training pass, the fused one rounds in another order: its gap is
    larger, but by less than a factor of three.
    """
    cues = open_cues("scenes", "train", 0, CueConfig())
    batch_prompts = [encode_cue(half_policy.processor, cues[i], "object") for i in range(16)]
    batch, means = collate(half_policy, batch_prompts), []
    for rollouts in both(half_policy, batch_prompts, 8, 40):
        with torch.no_grad():
            logps = token_logps(half_policy, batch, rollouts.tokens, rollouts.mask)
        gap = (logps - rollouts.logps)[rollouts.mask].abs()
        assert gap.mean() < 0.01 and gap.quantile(0.9) < 0.05
        means.append(gap.mean())
    assert means[1] < 3 * means[0]


def test_autocast_of_the_adapter_changes_only_rounding(half_policy, monkeypatch):
    """Off on a CPU; switched on there, log-probabilities and gradient stay those of float32 products."""
    cues, autocast = open_cues("scenes", "train", 0, CueConfig()), torch.autocast
    batch = collate(half_policy, [encode_cue(half_policy.processor, cues[i], "object") for i in range(2)])
    rollouts = rollout(half_policy, batch, 4, 24, torch.Generator().manual_seed(0))
    parameters = [p for p in half_policy.model.parameters() if p.requires_grad]

    def logps_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        logps = token_logps(half_policy, batch, rollouts.tokens, rollouts.mask)
        grads = torch.autograd.grad(logps.sum(), parameters)
        return logps.detach(), torch.cat([grad.flatten() for grad in grads])

    logps, gradient = logps_and_gradient()
    seen = []

    class SwitchedOn(autocast):
        """`torch.autocast` as policy.py calls it, but enabled; transformers passes names only."""

        def __init__(self, *args, **kwargs):
            if args:
                seen.append(kwargs)
            super().__init__(*args, **kwargs | ({"enabled": True} if args else {}))

    monkeypatch.setattr(torch, "autocast", SwitchedOn)
    cast_logps, cast_gradient = logps_and_gradient()
    assert seen == [{"enabled": False}], "on a CPU autocast is off"
    assert not torch.equal(cast_logps, logps), "autocast has no effect"
    assert (cast_logps - logps)[rollouts.mask].abs().mean() < 0.03
    assert torch.cosine_similarity(cast_gradient, gradient, dim=0) > 0.99
    assert all(p.dtype == torch.float32 for p in parameters) and cast_gradient.dtype == torch.float32


def test_layers_of_an_unknown_kind_and_without_an_adapter_run_as_they_are(policy, monkeypatch):
    assert isinstance(decoder(policy, 2, 4), FusedDecoder)
    assert decoder(random_policy("qwen3_vl"), 2, 4) is run_text
    monkeypatch.setattr(decoding, "LAYERS", ())
    assert decoder(policy, 2, 4) is run_text


def test_training_samples_with_the_fused_decoder_and_seconds_add_up(monkeypatch):
    """A rollout of training is that of the plain decoder, and its parts in the metrics make up its time."""
    policy = with_adapter(load_policy("tiny"), 4)
    cfg, _ = resolve({"prompts": 4, "rollout_batch": 2}, policy.processor.family)
    cues = open_cues("scenes", "train", 0, CueConfig())
    batch = sample_batch(policy.processor, cues, 0, cfg)
    step_metrics()
    fused = sample_completions(policy, batch, 0, cfg)
    metrics = step_metrics()
    assert min(metrics[f"seconds/{name}"] for name in ("vision", "prefill", "decoding")) > 0
    assert metrics["seconds/passes"] == 0 and metrics["memory/reserved_gb"] == 0
    monkeypatch.setattr("locus_mini.decoder", lambda *args: run_text)
    # A trained model is sharper than a random one, so rounding moves it further.
    assert_same(fused, sample_completions(policy, batch, 0, cfg), atol=1e-4)


def test_a_decoding_step_calls_few_operators(tmp_path):
    """Of a 3B model with 36 layers in 4 bit: counted on one and two layers, which add up."""
    one, two = (count_step(build_policy(tmp_path / f"{n}", n), True) for n in (1, 2))
    assert one.total() + 35 * (two - one).total() <= LIMIT
    # One layer more adds two norms, each one operator, and seven 4-bit products.
    assert (two - one)["_fused_rms_norm"] == 2 and (two - one)["gemm_4bit"] == 7


# Of a rollout and an optimizer step, with a Policy.logits that knows no temperature (torch 2.13.0).
NUM_OPERATORS = {"qwen2_5_vl": (1693, 1707), "qwen3_vl": (1891, 1849)}


def count_training(kind: str, temperature: float, log_entropy: bool) -> tuple[Counter, Counter]:
    """The operators of a rollout of 8 tokens and of an optimizer step on it, on random weights."""
    policy = with_adapter(random_policy(kind))
    policy.temperature, policy.stop_ids = temperature, torch.tensor([-1])
    flags = {"prompts": 2, "num_generations": 3, "max_new_tokens": 8, "log_entropy": log_entropy}
    cfg, _ = resolve(flags, policy.processor.family)
    torch.manual_seed(0)
    batch, advantages = collate(policy, prompts(policy, 2)), torch.tensor([[1.0, -1.0, 0.0]] * 2)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], foreach=False)
    with OperatorCounter() as sampling:
        rollouts = rollout(policy, batch, 3, 8, torch.Generator().manual_seed(0), decoder(policy, 3, 8))
    with OperatorCounter() as training:
        optimizer_step(policy, optimizer, [(batch, rollouts, advantages, None)], cfg)
    return sampling.counts, training.counts


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_1_and_no_entropy_call_no_operator_and_others_few(kind):
    """A division per token, and four in the passes; the entropy is seven for one chunk of logits."""
    plain, hot, entropy = (count_training(kind, *args) for args in ((1.0, False), (0.7, False), (1.0, True)))
    assert tuple(counts.total() for counts in plain) == NUM_OPERATORS[kind]
    assert hot[0] - plain[0] == Counter({"div": 8}) and not plain[0] - hot[0]
    assert entropy[0] == plain[0] and not plain[1] - entropy[1]
    assert hot[1] - plain[1] == Counter({"div": 4}), "reference, policy, its logits again, and backward"
    of_a_chunk = ("detach", "_softmax", "special_entr", "sum")
    of_the_mean = ("cat", "mean", "_local_scalar_dense")
    assert entropy[1] - plain[1] == Counter((*of_a_chunk, *of_the_mean))
