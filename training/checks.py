"""What training must not do unseen: train something else, score in a wrong frame, diverge, learn nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.heldout import HeldOutSet
from evaluation.scores import Scores, paired
from files.errors import UserError
from policy import Policy, collate, decode_completions, rollout, token_logps
from prompts import EncodedPrompt, box_frame
from reward import iou, reward

# Rollout against training: a quantile of the gaps and what it may be, in nats. In 16 bits other kernels make
# single tokens differ by a lot; what is wrong moves most of them.
TOLERANCE = {torch.float32: (1.0, 1e-3), torch.float16: (0.5, 0.05), torch.bfloat16: (0.5, 0.05)}


def self_check(
    policy: Policy, items: list[EncodedPrompt], group: int, max_new_tokens: int, seed: int
) -> dict:
    """Refuse to train what would silently train something else: every line is a bug that has been met."""

    def require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise UserError(f"Self-check: {otherwise}.")

    config, trained = policy.base_model.config, [p for p in policy.model.parameters() if p.requires_grad]
    attention = {config._attn_implementation, config.get_text_config()._attn_implementation}
    require(
        attention == {"sdpa"}, f"attention is {attention}, and only sdpa applies our masks: load with sdpa"
    )
    require(
        all(p.dtype == torch.float32 for p in trained), "adapter weights are not float32: they would not move"
    )
    require(policy.logit_bias[config.image_token_id].item() == -torch.inf, "image tokens could be sampled")
    batch, first = collate(policy, items), collate(policy, items[:1])
    _, h, w = batch.position_ids[:, batch.input_ids == config.image_token_id]
    require((h != w).any(), "image tokens have one-dimensional positions: mm_token_type_ids are missing")

    def gradient() -> Tensor:
        some = batch.input_ids[:, None, -4:]  # [B, 1, 4]: any tokens will do
        logps = token_logps(policy, batch, some, torch.ones_like(some, dtype=torch.bool))
        grads = torch.autograd.grad(logps.sum(), trained, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])

    fresh = gradient()
    rollouts = rollout(policy, batch, group, max_new_tokens, torch.Generator(policy.device).manual_seed(seed))
    kept = F.cosine_similarity(fresh, gradient(), dim=0).item()
    require(
        kept > 0.999, f"a rollout turns the gradient (cosine {kept:.3f}): repacked 4-bit weights pass none on"
    )
    require(
        any(len(set(row)) > 1 for row in decode_completions(policy, rollouts)),
        "all answers of a group are the same",
    )
    with torch.no_grad():
        logps = token_logps(policy, batch, rollouts.tokens, rollouts.mask)  # [B, G, T]
        alone = token_logps(policy, first, rollouts.tokens[:1, -1:], rollouts.mask[:1, -1:])  # [1, 1, T]
        with policy.reference():
            reference = token_logps(policy, batch, rollouts.tokens, rollouts.mask)  # [B, G, T]
    usual, same, measured = TOLERANCE[policy.base_model.dtype], (1.0, 1e-5), {}
    for name, one, other, (share, most), what in (
        ("rollout_gap", logps, rollouts.logps, usual, "rollout and training disagree"),
        ("packing_gap", logps[:1, -1:], alone, usual, "an answer without its group scores differently"),
        ("reference_gap", logps, reference, same, "the untrained adapter is not the reference"),
    ):
        living = rollouts.mask[: len(one), -one.shape[1] :]  # [B, G, T] of `one`
        measured[name] = (one - other).abs()[living].quantile(share).item()
        require(measured[name] < most, f"{what}, by {measured[name]:.2g} nats")
    frame = items[0].frame
    box = frame.to_pixels((100.3, 100.3, 300.3, 300.3))
    perfect = reward(f"<think></think><answer>{frame.to_text(box)}</answer>", frame.to_units(box)).iou
    require(perfect > 0.99, f"a perfect answer scores an IoU of {perfect:.3f}: is --box-frame right?")
    return measured | {"perfect_iou": perfect}


def check_frame(policy: Policy, held: HeldOutSet, scores: Scores) -> None:
    """UserError if the answered boxes fit better in the other frame, by two standard errors: scored in the
    wrong one, a perfect answer can be worth nothing."""
    own = policy.processor.family.box_frame
    other = "resized" if own == "relative1000" else "relative1000"
    better = []
    for cue, item, box, score in zip(held.cues, held.cue_prompts, scores.boxes, scores.samples["cue"]):
        frame = box_frame(
            other, *cue.image.size, item.images[0].grid_thw, policy.processor.image_processor.patch_size
        )
        if score is None:
            continue
        better.append((iou(frame.to_pixels(item.frame.to_units(box)), cue.box) if box else 0.0) - score)
    gain = paired([0.0] * len(better), better)
    if gain["n"] > 1 and gain["change"] > 2 * gain["standard_error"]:
        raise UserError(
            f"The answered boxes fit the frame {other} better than {own} (IoU {gain['change']:+.3f}): "
            f"give --box-frame {other}."
        )


def diverged(history: list[dict]) -> bool:
    """Whether the last five steps all had a loss or a gradient that is not finite."""
    return len(history) >= 5 and all(metrics["skipped"] == 1 for metrics in history[-5:])


def step_warnings(history: list[dict], kl_limit: float) -> list[str]:
    """Warnings about the last step, each when its reason begins; about groups all alike every 20 steps."""
    one, before, out = history[-1], history[-2] if len(history) > 1 else {}, []
    if one["skipped"] > 0:
        share = f"{one['skipped']:.0%} of the step's updates"
        out.append(f"a loss or gradient was not finite, so {share} changed nothing")
    if one["completions/clipped_ratio"] > 0.1 >= before.get("completions/clipped_ratio", 0):
        out.append(f"{one['completions/clipped_ratio']:.0%} of the answers cut; raise --max-new-tokens")
    if one["kl"] > kl_limit >= before.get("kl", 0):
        out.append(f"KL {one['kl']:.2g} is over --kl-limit {kl_limit:g}: lower --lr or raise --beta")
    still = next(
        (i for i, metrics in enumerate(reversed(history)) if metrics["frac_reward_zero_std"] < 1),
        len(history),
    )
    if still and still % 20 == 0:
        out.append(
            f"for {still} steps no group has taught anything: its answers all score alike. Look at them for "
            "boxes in another frame (--box-frame), a format never met, or answers cut (--max-new-tokens)"
        )
    return out
