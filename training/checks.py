"""Checks against failures that raise no error: a wrong gradient, a wrong box frame, a run that diverges."""

from itertools import compress, takewhile

import torch
import torch.nn.functional as F

from evaluation.heldout import HeldOutSet
from evaluation.scores import Scores, mean, paired
from files.errors import UserError
from policy import Batch, Policy, collate, decode_completions, rollout, token_logps
from prompts import EncodedPrompt, box_frame
from reward import iou, reward
from training.decoding import decoder
from training.settings import FRAMES

# Rollout against training pass: statistics of the gaps per token, and their limits in nats. In 16 bits the
# kernels of the two passes differ, so single tokens differ a lot, and the maximum is noise. The median says
# nothing either: most tokens of a trained model have p ≈ 1, which hardly moves whatever the bug.
STATISTICS = {"maximum": torch.max, "mean": torch.mean, "90 % quantile": lambda gaps: gaps.quantile(0.9)}
FLOAT32_LIMITS = {"maximum": 1e-3}
HALF_LIMITS = {"mean": 0.03, "90 % quantile": 0.15}
NOT_FINITE = "The model is not finite in {}: its weights are damaged, or need a GPU with bfloat16."

# ---------------------------------------------------------------- before training


def require(condition: bool, problem: str) -> None:
    """UserError with the problem that the self-check has found, unless the condition holds."""
    if not condition:
        raise UserError(f"Self-check: {problem}.")


def self_check(policy: Policy, prompts: list[EncodedPrompt], G: int, max_new_tokens: int, seed: int) -> dict:
    """Samples G completions of some prompts and checks that training on them would do what it should.

    UserError for the first problem: each is a bug that someone has met, and none raises an error by itself.
    Returns the measured gaps, in nats per token (in float32 the maximum, else the mean), and the IoU of a
    perfect completion.
    """
    config = policy.base_model.config
    attention = {config._attn_implementation, config.get_text_config()._attn_implementation}
    require(attention == {"sdpa"}, f"attention is {attention}, but only sdpa applies our masks")
    is_float32 = all(p.dtype == torch.float32 for p in policy.model.parameters() if p.requires_grad)
    require(is_float32, "adapter weights are not float32, so small steps would be rounded away")
    require(policy.logit_bias[config.image_token_id].item() == -torch.inf, "image tokens could be sampled")
    batch = collate(policy, prompts)
    _, h, w = batch.position_ids[:, batch.input_ids == config.image_token_id]  # [image tokens] each
    require((h != w).any(), "image tokens have one-dimensional positions: mm_token_type_ids are missing")
    # On some CPUs a pass without gradients repacks 4-bit weights, and no gradient passes them any more.
    before = prompt_gradient(policy, batch)
    generator, decode = torch.Generator(policy.device).manual_seed(seed), decoder(policy, G, max_new_tokens)
    rollouts = rollout(policy, batch, G, max_new_tokens, generator, decode)
    if not rollouts.finite.any():
        raise UserError(NOT_FINITE.format(policy.base_model.dtype))
    # In float16 single images overflow, and training leaves their groups out: the others are checked.
    if not rollouts.finite.all():
        return self_check(policy, list(compress(prompts, rollouts.finite.tolist())), G, max_new_tokens, seed)
    cosine = F.cosine_similarity(before, prompt_gradient(policy, batch), dim=0).item()
    require(cosine > 0.999, f"after a rollout the gradient differs (cosine {cosine:.3f}): repacked weights?")
    varies = any(len(set(group)) > 1 for group in decode_completions(policy, rollouts))
    require(varies, "all completions of a group are the same: is --max-new-tokens too low?")
    with torch.no_grad():
        logps = token_logps(policy, batch, rollouts.tokens, rollouts.mask)  # [B, G, T]
        with policy.reference():
            ref = token_logps(policy, batch, rollouts.tokens, rollouts.mask)  # [B, G, T]
        # The last completion of the first prompt by itself: neither padding nor its group may change it.
        first, tokens, mask = collate(policy, prompts[:1]), rollouts.tokens[:1, -1:], rollouts.mask[:1, -1:]
        alone = token_logps(policy, first, tokens, mask)  # [1, 1, T]
    limits = FLOAT32_LIMITS if policy.base_model.dtype == torch.float32 else HALF_LIMITS
    # The adapter adds 0, so the same kernels give the same bits; a GPU may take others in a second pass.
    reference_limits = {"maximum": 1e-5 if policy.device.type == "cpu" else 1e-3}
    measured = {}
    for name, gap, limits_of_gap, problem in (
        ("rollout_gap", logps - rollouts.logps, limits, "rollout and training pass disagree"),
        ("packing_gap", logps[:1, -1:] - alone, limits, "a completion differs without its group"),
        ("reference_gap", logps - ref, reference_limits, "the untrained adapter is not the reference"),
    ):
        mask = rollouts.mask[: len(gap), -gap.shape[1] :]  # the shape of `gap`
        for statistic, limit in limits_of_gap.items():
            value = STATISTICS[statistic](gap.abs()[mask]).item()
            require(value < limit, f"{problem}, by {value:.2g} nats ({statistic} over tokens)")
            measured.setdefault(name, value)
    frame = prompts[0].frame
    box = frame.to_pixels((100.3, 100.3, 300.3, 300.3))
    perfect = reward(f"<think></think><answer>{frame.to_text(box)}</answer>", frame.to_units(box)).iou
    require(perfect > 0.99, f"a perfect completion scores an IoU of {perfect:.3f}: is --box-frame right?")
    return measured | {"perfect_iou": perfect}


def prompt_gradient(policy: Policy, batch: Batch) -> torch.Tensor:
    """The gradient of some log-probabilities, as one vector; the last prompt tokens serve as a completion."""
    tokens = batch.input_ids[:, None, -4:]  # [B, 1, 4]
    logps = token_logps(policy, batch, tokens, torch.ones_like(tokens, dtype=torch.bool))  # [B, 1, 4]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(logps.sum(), parameters, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


# ---------------------------------------------------------------- after the first evaluation


def check_frame(policy: Policy, held: HeldOutSet, scores: Scores) -> None:
    """UserError if the base model's boxes fit better in the other box frame, by two standard errors.

    In the wrong frame even a perfect completion can score an IoU of 0.
    """
    family, patch_size = policy.processor.family, policy.processor.image_processor.patch_size
    (other,) = set(FRAMES) - {family.box_frame}
    ious = []  # of each cue's predicted box, if its numbers are read in the other frame
    for cue, prompt, box in zip(held.cues, held.cue_prompts, scores.boxes, strict=True):
        frame = box_frame(other, *cue.image.size, prompt.images[0].grid_thw, patch_size)
        ious.append(iou(frame.to_pixels(prompt.frame.to_units(box)), cue.box) if box else 0.0)
    gain = paired(scores.samples["cue"], ious)
    if gain["n"] > 1 and gain["change"] > 2 * gain["standard_error"]:
        fits = f"fit the frame {other} better than {family.box_frame} (IoU {gain['change']:+.3f})"
        raise UserError(f"The boxes that the model predicts {fits}: give --box-frame {other}.")


# ---------------------------------------------------------------- while training


def diverged(history: list[dict], policy: Policy, lr: float) -> UserError | None:
    """The error that ends a run if each of its last five steps had a loss or gradient that is not finite."""
    if len(history) < 5 or any(metrics["skipped"] < 1 for metrics in history[-5:]):
        return None
    if all(metrics["frac_groups_not_finite"] == 1 for metrics in history[-5:]):
        return UserError(NOT_FINITE.format(policy.base_model.dtype))
    return UserError(f"Five steps in a row were not finite: start again with --lr below {lr}.")


def entropy_collapsed(history: list[dict]) -> bool:
    """Whether the mean entropy of the last five steps is below 10 % of that of the first five.

    Learning the format and the boxes lowers it too, but to a half or a third of what it was. Steps without
    --log-entropy, or without a training pass, have none and do not count.
    """
    entropies = [metrics["entropy"] for metrics in history if metrics.get("entropy")]
    return len(entropies) >= 10 and mean(entropies[-5:]) < 0.1 * mean(entropies[:5])


def step_warnings(history: list[dict], kl_limit: float) -> list[str]:
    """Warnings about the last step of a run, whose metrics are `history`.

    Groups left out, cut completions, a high KL and a collapsed entropy warn in the first of several such
    steps. Equal rewards in every group, which teach nothing, warn after 20 such steps in a row, and after
    every 20 more.
    """
    last, previous, warnings = history[-1], history[-2] if len(history) > 1 else {}, []
    clipped, idle = "completions/clipped_ratio", "frac_reward_zero_std"
    if (dropped := last["frac_groups_not_finite"]) > 0 == previous.get("frac_groups_not_finite", 0):
        warnings.append(f"{dropped:.0%} of the groups were not finite and are left out: see docs/gpu.md")
    if last["skipped"] > 0:
        warnings.append(f"a loss or gradient was not finite: {last['skipped']:.0%} of the updates skipped")
    if last[clipped] > 0.1 >= previous.get(clipped, 0):
        warnings.append(f"{last[clipped]:.0%} of the completions were cut off: raise --max-new-tokens")
    if last["kl"] > kl_limit >= previous.get("kl", 0):
        warnings.append(f"KL {last['kl']:.2g} is above --kl-limit {kl_limit:g}: lower --lr or raise --beta")
    if entropy_collapsed(history) and not entropy_collapsed(history[:-1]):
        remedy = "completions hardly differ any more; lower --lr or raise --beta"
        warnings.append(f"the entropy has fallen below a tenth of that at the start: {remedy}")
    num_idle = len(list(takewhile(lambda metrics: metrics[idle] >= 1, reversed(history))))
    if num_idle and num_idle % 20 == 0:
        causes = "the box frame (--box-frame), the format, and completions cut off (--max-new-tokens)"
        warnings.append(f"for {num_idle} steps the rewards of every group were equal: check {causes}")
    return warnings
