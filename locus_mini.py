"""LOCUS with GRPO from scratch: train a multimodal model to find a crop in its image.

    python locus_mini.py                                          the embedded model, on a laptop, in minutes
    python locus_mini.py --model Qwen/Qwen2.5-VL-3B-Instruct --data coco --annotations FILE --images DIR

What differs from textbook GRPO:
- A group shares its prompt: the two images are read once per prompt, not once per completion (policy.py).
- π_old is the training pass's own first value, not the rollout's. The kernels of the two differ, above all in
  4 bit, and truncated importance sampling corrects what that changes in the gradient.
- The loss is a mean over the tokens of the whole optimizer step, so the micro-batch size changes nothing.
- The clip range is wider above (0.3) than below (0.2), and a dual clip bounds the loss of completions with a
  negative advantage: both as in the paper's framework.
- The reference model is the same model with its adapter switched off: it needs no memory of its own.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from files.errors import exit_on_error
from training.settings import Config, prepare_torch, read_flags

if __name__ == "__main__":  # --help, a wrong flag or a missing file: answer before torch takes its seconds
    with exit_on_error():
        read_flags(__doc__)
        prepare_torch()

import torch
from torch import Tensor
from tqdm import tqdm

from data import Cue, Cues, encode_cue
from evaluation.scores import mean
from policy import Policy, Rollout, collate, decode_completions, rollout, token_logps
from prompts import EncodedPrompt, Processor
from reward import Reward, reward
from training import checks, learning, pictures, run_folder
from training.decoding import decoder
from training.dry_run import advise_16_bits, dry_run
from training.experiment import run_experiment
from training.memory import phase, step_metrics

FP16_LOSS_SCALE = 2.0**10  # at the start; without it the smallest float16 gradients are 0
LOSS_SCALE_INTERVAL = 100  # optimizer steps without a skipped one, after which it doubles

# ---------------------------------------------------------------- GRPO, as functions of tensors


def group_advantages(rewards: Tensor, loss_type: str = "token_mean") -> Tensor:
    """A_g = (r_g − mean r) / (std r + 1e-6) within each group, std with G − 1; [B, G] to [B, G].

    >>> group_advantages(torch.tensor([[1.0, 0.0], [0.7, 0.7]]))
    tensor([[ 0.7071, -0.7071],
            [ 0.0000,  0.0000]])
    """
    centered = rewards - rewards.mean(1, keepdim=True)  # [B, G]
    if loss_type != "dr_grpo":  # Dr. GRPO does not divide by the standard deviation
        # Bessel's correction, except for a group of one, which only imitation has.
        centered /= rewards.std(1, correction=min(1, rewards.shape[1] - 1), keepdim=True) + 1e-6
    # In float32, equal rewards can have a std of 6e-8 instead of 0, which would give advantages of 0.06.
    return torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, centered)


def token_weights(mask: Tensor, loss_type: str, num_tokens: float, num_completions: float, max_len: int):
    """The weight of each token in the loss of its optimizer step, [B, G, T]; 0 outside the mask.

    num_tokens, num_completions: N of the whole optimizer step, so the micro-batch size changes nothing.
    token_mean  1 / Σ_i |o_i|       every token of the step counts the same (as in DAPO)
    grpo        1 / (N · |o_i|)     every completion counts the same (the GRPO paper)
    dr_grpo     1 / (N · max_len)   no bonus for being short or long (Dr. GRPO); max_len is max_new_tokens
    """
    if loss_type == "grpo":
        return mask / (num_completions * mask.sum(-1, keepdim=True).clamp(min=1))
    if loss_type == "dr_grpo":
        return mask / (num_completions * max_len)
    return mask / num_tokens


def importance_weights(old_logps: Tensor, rollout_logps: Tensor, cap: float) -> Tensor:
    """μ = min(π_old / π_rollout, cap) of each token, [B, G, T]: truncated importance sampling; cap 0: μ = 1.

    The tokens were sampled by other kernels than those of the training pass, so from slightly other
    probabilities. Weighted by μ, their mean is the one under π_old. The cap bounds what one token can weigh.

    >>> importance_weights(torch.zeros(3), torch.tensor([0.0, 0.5, -9.0]), cap=2.0)
    tensor([1.0000, 0.6065, 2.0000])
    """
    if cap == 0:
        return torch.ones_like(old_logps)
    return torch.exp(old_logps - rollout_logps).clamp(max=cap)


def grpo_loss(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, weights: Tensor,
    cfg: Config, importance: Tensor | float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """L = Σ w · (−μ · J + β · k3): the clipped surrogate and the KL to the reference, token by token.

    logps, old_logps, ref_logps: log-probabilities under the policy, the policy that sampled and the reference
    (None where β = 0), [B, G, T]. advantages: [B, G]. weights, importance: w and μ, those of `token_weights`
    and of `importance_weights`, [B, G, T].
    Also returns sums over tokens for the log, without weights: `kl` and `clip_ratio`.

    >>> logps, weights = torch.tensor([[[-1.0]]]), torch.ones(1, 1, 1)
    >>> grpo_loss(logps, logps, None, torch.tensor([[2.0]]), weights, Config(beta=0.0))[0]  # ρ = 1: L = −A
    tensor(-2.)
    """
    # One advantage for all tokens: the reward is for the completion as a whole.
    advantage = advantages[..., None]  # [B, G, 1]
    is_completion = weights > 0  # [B, G, T]
    # Importance ratio: differs from 1 only after the first update on a rollout.
    ratio = torch.exp(logps - old_logps)  # ρ = π / π_old
    clipped_ratio = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    # Pessimistic bound: a ratio outside the clip range gains nothing further.
    surrogate = torch.minimum(ratio * advantage, clipped_ratio * advantage)  # J = min(ρA, clip(ρ)A)
    # Dual clip: where A < 0, ρA has no lower bound, so one token that became likely could dominate.
    bounded = torch.maximum(surrogate, cfg.dual_clip * advantage)  # J ≥ cA
    surrogate = torch.where(advantage < 0, bounded, surrogate)
    # The sampler's kernels differ from the training pass's, above all in 4 bit. μ has no gradient.
    surrogate = importance * surrogate  # μJ
    # For the log: where the clip range, not the dual clip, stopped the gradient.
    num_clipped = ((ratio * advantage > clipped_ratio * advantage) & is_completion).sum()
    k3 = torch.zeros_like(logps)
    # KL to the reference: keeps what the base model can do.
    if ref_logps is not None:
        # k3 is an unbiased estimate of KL(π ‖ π_ref) that is never negative; the clamps are the framework's.
        log_ratio = (ref_logps - logps).clamp(-20, 20)
        k3 = (log_ratio.exp() - log_ratio - 1).clamp(max=10)
    loss = (weights * (cfg.beta * k3 - surrogate)).sum()
    return loss, {"kl": (k3 * is_completion).sum().detach(), "clip_ratio": num_clipped}


def learning_rate(update_index: int, cfg: Config) -> float:
    """Linear warm-up times linear decay to 0 (or times 1); `update_index` counts optimizer steps from 0."""
    total_updates = max(1, cfg.steps * cfg.updates * cfg.iterations)
    warmup_steps = max(1, round(cfg.warmup * total_updates))
    decay_factor = 1.0 if cfg.decay == "constant" else max(0.0, 1 - update_index / total_updates)
    # update_index + 1: a warm-up that starts at 0 would waste the first step.
    return cfg.lr * min((update_index + 1) / warmup_steps, 1.0) * decay_factor


# ---------------------------------------------------------------- one step


@dataclass
class Example:
    """One cue of a step and its prompt; `index` is its number among all cues."""

    index: int
    cue: Cue
    prompt: EncodedPrompt


def encode_example(processor: Processor, cue: Cue, index: int, cfg: Config) -> EncodedPrompt:
    """LOCUS's prompt: the image, its crop, and the request for the crop's box."""
    return encode_cue(processor, cue, cfg.source)


def sample_batch(
    processor: Processor, cues: Cues, step: int, cfg: Config, encode: Callable = encode_example
) -> list[Example]:
    """The cues of a step and their prompts. Nothing here needs the model: a thread prepares it ahead."""
    numbered = [(i, cues[i]) for i in range(step * cfg.prompts, (step + 1) * cfg.prompts)]
    return [Example(i, cue, encode(processor, cue, i, cfg)) for i, cue in numbered]


@phase("rollout")
def sample_completions(policy: Policy, batch: list[Example], step: int, cfg: Config) -> Rollout:
    """G completions of each prompt of a step, cfg.rollout_batch prompts at a time."""
    # Seeded by the step, so that a resumed run samples what an uninterrupted one would.
    generator = torch.Generator(policy.device).manual_seed(cfg.seed * 1_000_003 + step)
    prompts, batch_size = [example.prompt for example in batch], cfg.rollout_batch
    with phase("vision"):  # the image features, which later passes reuse
        parts = [collate(policy, prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    limits = (cfg.num_generations, cfg.max_new_tokens)
    # decoder: the text layers as `rollout` would run them itself, in fewer calls.
    return Rollout.join([rollout(policy, p, *limits, generator, decoder(policy, *limits)) for p in parts])


def score(completions: list[str], example: Example, cfg: Config) -> list[Reward]:
    """LOCUS's reward of each completion: 0.9 · IoU + 0.1 · format, in the model's own box frame."""
    target_box = example.prompt.frame.to_units(example.cue.box)
    return [reward(text, target_box, cfg.alpha) for text in completions]


@phase("optimizer")
def apply_gradients(optimizer: Any, loss_scale: float, max_norm: float, finite: bool) -> tuple[float, bool]:
    """Unscales, clips and applies the gradients; returns their norm, and whether they were applied."""
    parameters = optimizer.param_groups[0]["params"]
    # Undo the float16 scale before clipping, which compares the norm with a constant.
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= loss_scale
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    # A step with a NaN would ruin the adapter for good, so it is skipped and counted.
    if applied := finite and math.isfinite(grad_norm):
        optimizer.step()
    return grad_norm, applied


def update_loss_scale(param_group: dict[str, Any], applied: bool) -> None:
    """Halves the float16 loss scale after a skipped step, doubles it after 100 applied steps in a row.

    The rule of torch.amp.GradScaler, but with its state in the optimizer, so every checkpoint has it.
    """
    param_group["applied_steps"] = param_group.get("applied_steps", 0) + 1 if applied else 0
    if not applied:
        param_group["loss_scale"] /= 2
    elif param_group["applied_steps"] % LOSS_SCALE_INTERVAL == 0:
        param_group["loss_scale"] *= 2


def optimizer_step(
    policy: Policy, optimizer: Any, micro_batches: list, cfg: Config, loss_function: Callable = grpo_loss
) -> dict[str, float]:
    """One optimizer step on micro-batches (batch, rollouts, advantages, old_logps); returns its metrics.

    Their gradients add up to the gradient of the whole, because the weights divide by tokens of the whole.
    old_logps: [B, G, T] before the first of several steps, or None if this is the only one.
    """
    num_tokens = sum(rollouts.mask.sum() for _, rollouts, _, _ in micro_batches).item()
    num_completions = sum(rollouts.finished.numel() for _, rollouts, _, _ in micro_batches)
    # Tokens without a pass count as a difference of 0 and a ratio of 1.
    difference, ratio = "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"
    metric_sums = {"loss": 0.0, "kl": 0.0, "clip_ratio": 0.0, difference: 0.0, ratio: 1.0}
    entropies: list[Tensor] | None = [] if cfg.log_entropy else None  # of the tokens that have a pass
    finite = all(rollouts.finite.all() for _, rollouts, _, _ in micro_batches)
    param_group, is_float16 = optimizer.param_groups[0], policy.base_model.dtype == torch.float16
    loss_scale = param_group.setdefault("loss_scale", FP16_LOSS_SCALE) if is_float16 else 1.0
    optimizer.zero_grad(set_to_none=True)
    for batch, rollouts, advantages, old_logps in micro_batches:
        # Equal rewards and no KL: the gradient is 0. Their tokens stay in the denominator. And nothing can be
        # learned in a step that will be skipped.
        if not finite or (cfg.beta == 0 and not advantages.any()):
            continue
        ref_logps = None
        if cfg.beta > 0:
            with torch.no_grad(), policy.reference():
                ref_logps = token_logps(policy, batch, rollouts.tokens, rollouts.mask)  # [B, G, T]
        # Policy: the only pass with gradients.
        logps = token_logps(policy, batch, rollouts.tokens, rollouts.mask, entropies)  # [B, G, T]
        # Detached, the ratio is exactly 1 here, but its gradient is that of the log-probability.
        old_logps = logps.detach() if old_logps is None else old_logps
        loss_weights = token_weights(rollouts.mask, cfg.loss, num_tokens, num_completions, cfg.max_new_tokens)
        importance = importance_weights(old_logps, rollouts.logps, cfg.importance_sampling_cap)  # [B, G, T]
        loss, stats = loss_function(logps, old_logps, ref_logps, advantages, loss_weights, cfg, importance)
        # Gradients of the micro-batches add up until the optimizer step.
        (loss_scale * loss).backward()
        finite = finite and math.isfinite(loss.item())
        metric_sums["loss"] += loss.item()
        stats |= {difference: (old_logps - rollouts.logps).abs().sum(), ratio: (importance - 1).sum()}
        for name, token_sum in stats.items():
            metric_sums[name] += token_sum.item() / num_tokens
    grad_norm, applied = apply_gradients(optimizer, loss_scale, cfg.max_grad_norm, finite)
    # Without a backward pass, the scale has neither failed nor held.
    if is_float16 and any(p.grad is not None for p in param_group["params"]):
        update_loss_scale(param_group, applied)
    if entropies is not None:  # None without a pass, which `mean` leaves out
        metric_sums["entropy"] = torch.cat(entropies).mean().item() if entropies else None
    return metric_sums | {"grad_norm": grad_norm, "skipped": float(not applied)}


def micro_batch_slices(num_prompts: int, cfg: Config) -> list[list[slice]]:
    """The prompts of each optimizer step of a rollout, as slices that fit in one pass.

    num_prompts: those of the rollout whose groups are finite, cfg.prompts at most.
    """
    # Rounded up: without the groups that are not finite there may be a remainder.
    step_size, size = math.ceil(num_prompts / cfg.updates), cfg.micro_batch
    updates = [(i, min(i + step_size, num_prompts)) for i in range(0, num_prompts, step_size)]
    return [[slice(i, min(i + size, end)) for i in range(start, end, size)] for start, end in updates]


@phase("policy pass")
def update_policy(
    policy: Policy, optimizer: Any, batch: list[Example], rollouts: Rollout, advantages: Tensor, step: int,
    cfg: Config, loss_function: Callable | None = None,
) -> dict[str, float]:  # fmt: skip
    """All optimizer steps on one rollout; returns the mean of their metrics."""
    prompts, updates, update_metrics = [example.prompt for example in batch], [], []
    for slices in micro_batch_slices(len(prompts), cfg):
        parts = [(collate(policy, prompts[s]), rollouts.select(s), advantages[s], None) for s in slices]
        # With several steps per rollout, π_old is the policy before the first of them.
        if cfg.updates * cfg.iterations > 1:
            with torch.no_grad():
                parts = [(b, r, a, token_logps(policy, b, r.tokens, r.mask)) for b, r, a, _ in parts]
        updates.append(parts)
    for i, parts in enumerate(updates * cfg.iterations):
        lr = learning_rate(step * cfg.updates * cfg.iterations + i, cfg)
        optimizer.param_groups[0]["lr"] = lr
        update_metrics.append(optimizer_step(policy, optimizer, parts, cfg, loss_function or grpo_loss))
    return {"lr": lr} | {name: mean(row[name] for row in update_metrics) for name in update_metrics[0]}


@dataclass(frozen=True)
class Task:
    """What the loop asks, rewards and learns from. The defaults are LOCUS; paper/variants.py has others."""

    name: str = "locus"
    encode: Callable = encode_example  # (processor, cue, index, cfg) -> EncodedPrompt
    sample: Callable = sample_completions  # (policy, batch, step, cfg) -> Rollout
    score: Callable = score  # (completions, example, cfg) -> list[Reward]
    update: Callable = update_policy  # (policy, optimizer, batch, rollouts, advantages, step, cfg) -> metrics


LOCUS = Task()


@dataclass
class Group:
    """The G completions of one prompt with their rewards and advantages, for logs and pictures."""

    example: Example
    completions: list[str]
    rewards: list[Reward]
    advantages: list[float]


def train_step(
    policy: Policy, optimizer: Any, cues: Cues, step: int, cfg: Config, task: Task = LOCUS, batch=None
) -> tuple[dict[str, float], Group]:
    """One step of GRPO: its metrics, and the group whose rewards differ most.

    batch: the result of `sample_batch` for this step, if it was prepared ahead.
    """
    started, _ = time.monotonic(), step_metrics()  # seconds are counted from here
    # 1. Sample a batch: cues of this step, each with its image, its crop and its target box.
    batch = batch or sample_batch(policy.processor, cues, step, cfg, task.encode)
    # 2. Roll out: G completions of each prompt.
    rollouts = task.sample(policy, batch, step, cfg)
    finite = rollouts.finite  # [B]
    # In float16 single images overflow. Their groups leave the step as if they had not been drawn. If no
    # group is finite, all stay, without tokens, and the update is skipped.
    if finite.any():
        batch, rollouts = list(compress(batch, finite.tolist())), rollouts.select(finite)
    # 3. Reward: a rule that reads text, namely how well the predicted box overlaps the crop's.
    completions = decode_completions(policy, rollouts)  # B × G texts
    scored = [task.score(texts, example, cfg) for texts, example in zip(completions, batch, strict=True)]
    rewards = torch.tensor([[r.total for r in row] for row in scored], device=policy.device)  # [B, G]
    # 4. Advantages: what is better than the rest of its own group, so no value model is needed.
    advantages = group_advantages(rewards, cfg.loss)  # [B, G]
    # 5. Update: raise the probability of what was better, within the clip range and near the reference.
    metrics = task.update(policy, optimizer, batch, rollouts, advantages, step, cfg)
    metrics = learning.completion_metrics(rewards, scored, rollouts, advantages) | metrics
    metrics = {"step": step, "frac_groups_not_finite": 1 - finite.float().mean().item()} | metrics
    # To show: the group that teaches most.
    b = int((rewards.amax(1) - rewards.amin(1)).argmax())
    group = Group(batch[b], completions[b], scored[b], advantages[b].tolist())
    return metrics | {"seconds": time.monotonic() - started} | step_metrics(), group


# ---------------------------------------------------------------- the training loop and the command line


def train(
    policy: Policy, cues: Cues, cfg: Config, folder: Path, state: dict, task: Task = LOCUS, evaluate=None
) -> None:
    """cfg.steps steps from the last checkpoint, if there is one; each is a line of metrics.jsonl.

    evaluate: (step) -> the metrics of an evaluation after it, {} where none is due (learning.evaluator).
    """
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params, lr=cfg.lr, weight_decay=cfg.weight_decay)
    first_step = run_folder.load_checkpoint(folder, policy.model, optimizer, state)
    log, metrics_history = run_folder.open_lines(folder / "metrics.jsonl", range(first_step))
    progress_bar = tqdm(total=cfg.steps, initial=first_step, desc="GRPO")
    interruption, tracker = run_folder.Interruption(), run_folder.open_tracker(cfg, folder, first_step)
    with log, progress_bar, tracker as report, interruption, ThreadPoolExecutor(1) as executor:
        # A thread reads and processes the next step's images while this step keeps the GPU busy.
        prepare = partial(executor.submit, sample_batch, policy.processor, cues, cfg=cfg, encode=task.encode)
        next_batch = prepare(step=first_step) if first_step < cfg.steps else None
        for step in range(first_step, cfg.steps):
            # Wait for this step's batch, then start on the next one.
            batch = next_batch.result()
            next_batch = prepare(step=step + 1) if step + 1 < cfg.steps else None
            metrics, group = train_step(policy, optimizer, cues, step, cfg, task, batch)
            metrics_history.append(metrics | (evaluate(step) if evaluate else {}))
            run_folder.log_step(log, progress_bar, metrics_history, group, cfg)
            learning.log_group(folder, step, group, cfg)
            report(metrics_history[-1])
            is_best = run_folder.has_best_score(metrics_history)
            diverged = checks.diverged(metrics_history, policy, cfg.lr)
            if step + 1 == cfg.steps:
                pictures.draw_group(group, folder / "group.png")
            elif not (interruption.requested or diverged or is_best or (step + 1) % cfg.save_every == 0):
                continue
            run_folder.save_checkpoint(folder, step + 1, policy.model, optimizer, state, is_best)
            if stop := diverged or interruption.requested:
                raise stop


def run(flags: dict[str, Any], task: Task = LOCUS) -> None:
    """A run, new or resumed: measure the base model on held-out cues, train, measure again."""
    run_experiment(flags, task.name, partial(train, task=task), task.encode)


def main() -> None:
    remedy = "make room or allow it, then start again with --resume"
    with exit_on_error(remedy, "Stopped before the run began."), run_folder.sigterm_as_keyboard_interrupt():
        flags = read_flags(__doc__)
        if flags.pop("dry_run", False):
            dry_run(flags, train_step, LOCUS)
        else:
            advise_16_bits(flags)
            run(flags)


if __name__ == "__main__":
    main()
