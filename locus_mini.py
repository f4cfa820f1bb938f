"""LOCUS with GRPO from scratch: train a multimodal model to find a crop in its image.

    python locus_mini.py                                          the embedded model, on a laptop, in minutes
    python locus_mini.py --model Qwen/Qwen2.5-VL-3B-Instruct --data coco --annotations FILE --images DIR

What differs from textbook GRPO:
- A group shares its prompt. The two images are read once per prompt, not once per completion (policy.py).
- π_old is the training pass's own first value, not the rollout's: the two use different kernels, and in
  4 bit their log-probabilities differ before anything has been learned.
- The loss is a mean over the tokens of the whole optimizer step, so the micro-batch size changes nothing.
- The clip range is wider above (0.3) than below (0.2), and a dual clip bounds negative advantages, as in the
  paper's framework.
- The reference model is the same model with its adapter switched off: it needs no memory of its own.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from files.errors import UserError, exit_on_error
from training.settings import Config, read_flags

if __name__ == "__main__":  # --help, a wrong flag and a missing file answer before torch takes its seconds
    with exit_on_error():
        read_flags(__doc__)

import torch
from torch import Tensor
from tqdm import tqdm

from data import Cue, Cues, encode_cue
from evaluation.scores import mean
from models import add_lora
from policy import Policy, Rollout, collate, rollout, texts, token_logps
from prompts import Encoded, Tools
from reward import Reward, reward
from training import checks, pictures, run_folder
from training.dry_run import dry_run
from training.experiment import open_experiment, run_experiment
from training.memory import phase

HALF_SCALE = 2.0**10  # of the loss in float16, whose smallest gradients would be lost

# ---------------------------------------------------------------- GRPO, as functions of tensors


def group_advantages(rewards: Tensor, loss: str = "token_mean") -> Tensor:
    """A_g = (r_g − mean r) / (std r + 1e-6) within each group, std with G − 1; [B, G] to [B, G].

    Dr. GRPO leaves the std out. Equal rewards give exactly 0: their float32 std is rounding, not spread.
    """
    spread = rewards - rewards.mean(1, keepdim=True)  # [B, G]
    if loss != "dr_grpo":
        spread = spread / (rewards.std(1, keepdim=True) + 1e-6)
    return torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, spread)


def token_weights(mask: Tensor, loss: str, tokens: float, answers: float, longest: int) -> Tensor:
    """What each token of an answer counts in the loss of its optimizer step, [B, G, T].

    tokens, answers: how many the whole optimizer step has, so that the micro-batch size changes nothing.
    token_mean  1 / Σ_i |o_i|         every token of the step alike; so do the losses that imitate
    grpo        1 / (N · |o_i|)       every answer alike (the GRPO paper)
    dr_grpo     1 / (N · longest)     no reward for being short or long (Dr. GRPO); longest = max_new_tokens
    """
    if loss == "grpo":
        return mask / (answers * mask.sum(-1, keepdim=True).clamp(min=1))
    if loss == "dr_grpo":
        return mask / (answers * longest)
    return mask / tokens


def grpo_loss(
    logps: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, weights: Tensor, cfg: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = Σ w · (−J + β · k3): the clipped surrogate and the KL to the reference, token by token.

    logps, old, ref: log-probabilities under the policy, the policy that sampled, the reference; and weights,
    0 outside the answers: [B, G, T]. advantages: [B, G]. ref may be None where β = 0.
    Also returns sums over tokens, unweighted, for the log: `kl` and `clipped`.
    """
    advantage = advantages[..., None]  # [B, G, 1]
    inside = weights > 0
    ratio = torch.exp(logps - old)  # ρ = π / π_old
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)  # J = min(ρA, clip(ρ)A)
    bounded = torch.maximum(surrogate, cfg.dual_clip * advantage)  # J ≥ cA where A < 0
    surrogate = torch.where(advantage < 0, bounded, surrogate)
    cut = ((ratio * advantage > clipped * advantage) & inside).sum()
    k3 = torch.zeros_like(logps)
    if ref is not None:
        gap = (ref - logps).clamp(-20, 20)
        k3 = (gap.exp() - gap - 1).clamp(max=10)  # an unbiased estimate of KL(π ‖ π_ref), never negative
    loss = (weights * (cfg.kl * k3 - surrogate)).sum()
    return loss, {"kl": (k3 * inside).sum().detach(), "clipped": cut}


def learning_rate(update: int, cfg: Config) -> float:
    """Linear warm-up whose first step already moves, then linear to 0 or constant."""
    total = max(1, cfg.steps * cfg.updates * cfg.iterations)
    warm = max(1, round(cfg.warmup * total))
    fall = 1.0 if cfg.decay == "constant" else max(0.0, 1 - update / total)
    return cfg.lr * min((update + 1) / warm, 1.0) * fall


# ---------------------------------------------------------------- one step


@dataclass
class Example:
    """One cue of a step and its prompt; `index` is its number among all cues."""

    index: int
    cue: Cue
    prompt: Encoded


def encode_example(tools: Tools, cue: Cue, index: int, cfg: Config) -> Encoded:
    """LOCUS's prompt: the image, its crop, and the request for the crop's box."""
    return encode_cue(tools, cue, cfg.source)


def sample_batch(
    tools: Tools, cues: Cues, step: int, cfg: Config, encode: Callable = encode_example
) -> list[Example]:
    """The cues of a step and their prompts. Nothing here needs the model, so a thread prepares it ahead."""
    drawn = [(i, cues[i]) for i in range(step * cfg.prompts, (step + 1) * cfg.prompts)]
    return [Example(i, cue, encode(tools, cue, i, cfg)) for i, cue in drawn]


@phase("rollout")
def roll_out(policy: Policy, batch: list[Example], step: int, cfg: Config) -> Rollout:
    """G completions of each prompt of a step, cfg.rollout_batch prompts at a time."""
    generator = torch.Generator(policy.device).manual_seed(cfg.seed * 1_000_003 + step)
    prompts, size = [example.prompt for example in batch], cfg.rollout_batch
    parts = [collate(policy, prompts[i : i + size]) for i in range(0, len(prompts), size)]
    sampling = (cfg.group, cfg.max_new_tokens, generator)
    return Rollout.join([rollout(policy, part, *sampling) for part in parts])


def score(completions: list[str], example: Example, cfg: Config) -> list[Reward]:
    """LOCUS's reward of each completion: 0.9 · IoU + 0.1 · format, in the model's own box frame."""
    target = example.prompt.frame.to_units(example.cue.box)
    return [reward(text, target, cfg.alpha) for text in completions]


@phase("optimizer")
def apply_gradients(optimizer: Any, loss_scale: float, max_norm: float, finite: bool) -> tuple[float, bool]:
    """Unscales, clips and applies the gradients; returns their norm, and whether they were applied."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= loss_scale
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if applied := finite and math.isfinite(norm):
        optimizer.step()
    return norm, applied


def optimizer_step(
    policy: Policy, optimizer: Any, passes: list[tuple], cfg: Config, loss_function: Callable = grpo_loss
) -> dict[str, float]:
    """One optimizer step on micro-batches (batch, rollout, advantages, old); old None: the pass's own value.

    Their gradients add up to that of the whole, since the weights divide by the tokens of the whole.
    """
    tokens = sum(roll.mask.sum() for _, roll, _, _ in passes).item()
    answers = sum(roll.stopped.numel() for _, roll, _, _ in passes)
    sums = {"loss": 0.0, "kl": 0.0, "clipped": 0.0, "rollout_gap": 0.0}
    finite, scale = True, HALF_SCALE if policy.whole.dtype == torch.float16 else 1.0
    optimizer.zero_grad(set_to_none=True)
    for batch, roll, advantages, old in passes:
        if cfg.kl == 0 and not advantages.any():
            continue  # nothing to learn here; its tokens are in the denominator all the same
        ref = None
        if cfg.kl > 0:
            with torch.no_grad(), policy.reference():
                ref = token_logps(policy, batch, roll.tokens, roll.mask)  # [B, G, T]
        logps = token_logps(policy, batch, roll.tokens, roll.mask)  # [B, G, T]
        old = logps.detach() if old is None else old
        weights = token_weights(roll.mask, cfg.loss, tokens, answers, cfg.max_new_tokens)
        loss, stats = loss_function(logps, old, ref, advantages, weights, cfg)
        (scale * loss).backward()
        finite = finite and math.isfinite(loss.item())
        sums["loss"] += loss.item()
        sums["kl"] += stats["kl"].item() / tokens
        sums["clipped"] += stats["clipped"].item() / tokens
        sums["rollout_gap"] = max(sums["rollout_gap"], (old - roll.logps).abs().max().item())
    norm, applied = apply_gradients(optimizer, scale, cfg.max_grad_norm, finite)
    return sums | {"grad_norm": norm, "skipped": float(not applied)}


def micro_batches(cfg: Config) -> list[list[slice]]:
    """The prompts of each optimizer step of a rollout, as slices that fit in one pass."""
    share, size = cfg.prompts // cfg.updates, cfg.micro_batch
    updates = [(start, start + share) for start in range(0, cfg.prompts, share)]
    return [[slice(i, min(i + size, end)) for i in range(start, end, size)] for start, end in updates]


@phase("policy pass")
def update_policy(
    policy: Policy,
    optimizer: Any,
    batch: list[Example],
    roll: Rollout,
    advantages: Tensor,
    step: int,
    cfg: Config,
    loss_function: Callable | None = None,
) -> dict[str, float]:
    """All optimizer steps on one rollout; returns the mean of their metrics."""
    prompts, updates, stats = [example.prompt for example in batch], [], []
    for slices in micro_batches(cfg):
        passes = [(collate(policy, prompts[s]), roll.rows(s), advantages[s], None) for s in slices]
        if cfg.updates * cfg.iterations > 1:  # π_old is the policy before the first of several steps
            with torch.no_grad():
                passes = [(b, r, a, token_logps(policy, b, r.tokens, r.mask)) for b, r, a, _ in passes]
        updates.append(passes)
    for i, passes in enumerate(updates * cfg.iterations):
        lr = learning_rate(step * cfg.updates * cfg.iterations + i, cfg)
        optimizer.param_groups[0]["lr"] = lr
        stats.append(optimizer_step(policy, optimizer, passes, cfg, loss_function or grpo_loss))
    return {"lr": lr} | {name: mean(row[name] for row in stats) for name in stats[0]}


@dataclass(frozen=True)
class Task:
    """What the loop asks, rewards and learns from. The defaults are LOCUS; paper/variants.py has others."""

    name: str = "locus"
    encode: Callable = encode_example  # (tools, cue, index, cfg) -> Encoded
    roll_out: Callable = roll_out  # (policy, batch, step, cfg) -> Rollout
    score: Callable = score  # (completions, example, cfg) -> list[Reward]
    update: Callable = update_policy  # (policy, optimizer, batch, roll, advantages, step, cfg) -> metrics
    adapt: Callable = add_lora  # (policy, rank, seed) -> Policy with something to train


LOCUS = Task()


@dataclass
class Group:
    """The G completions of one prompt, to be shown: texts, rewards, advantages."""

    example: Example
    completions: list[str]
    rewards: list[Reward]
    advantages: list[float]


def train_step(
    policy: Policy, optimizer: Any, cues: Cues, step: int, cfg: Config, task: Task = LOCUS, batch=None
) -> tuple[dict[str, float], Group]:
    """One rollout and the optimizer steps on it: its metrics, and the group whose rewards differ most.

    batch: what `sample_batch` gives for the step, if it was called ahead.
    """
    started = time.monotonic()
    batch = batch or sample_batch(policy.tools, cues, step, cfg, task.encode)
    roll = task.roll_out(policy, batch, step, cfg)
    completions = texts(policy, roll)  # B × G
    scored = [task.score(group, example, cfg) for group, example in zip(completions, batch, strict=True)]
    rewards = torch.tensor([[r.total for r in row] for row in scored], device=policy.device)  # [B, G]
    advantages = group_advantages(rewards, cfg.loss)  # [B, G]
    metrics = {"step": step} | completion_metrics(rewards, scored, roll, advantages)
    metrics |= task.update(policy, optimizer, batch, roll, advantages, step, cfg)
    b = int((rewards.amax(1) - rewards.amin(1)).argmax())
    group = Group(batch[b], completions[b], scored[b], advantages[b].tolist())
    return metrics | {"seconds": time.monotonic() - started}, group


def completion_metrics(
    rewards: Tensor, scored: list[list[Reward]], roll: Rollout, advantages: Tensor
) -> dict[str, float]:
    """What metrics.jsonl says of a step's completions."""
    flat = [r for row in scored for r in row]
    metrics = {"reward": rewards.mean().item(), "iou": mean(r.iou for r in flat)}
    metrics |= {"format": mean(r.format for r in flat), "length": roll.mask.sum(-1).float().mean().item()}
    metrics["truncated"] = 1 - roll.stopped.float().mean().item()
    return metrics | {"zero_variance": 1 - advantages.any(1).float().mean().item()}


# ---------------------------------------------------------------- a run


def train(policy: Policy, cues: Cues, cfg: Config, folder: Path, state: dict, task: Task = LOCUS) -> None:
    """cfg.steps rollouts, each a line of metrics.jsonl, from the last checkpoint on if there is one."""
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
    start = run_folder.load_checkpoint(folder, policy.model, optimizer, state)
    log, history = run_folder.open_metrics(folder, start)
    bar = tqdm(total=cfg.steps, initial=start, desc="GRPO")
    with log, bar, run_folder.Interruption() as interruption, ThreadPoolExecutor(1) as executor:
        # The next step's pictures are read and cut into patches while this one keeps the GPU busy.
        sample = partial(executor.submit, sample_batch, policy.tools, cues, cfg=cfg, encode=task.encode)
        next_batch = sample(step=start) if start < cfg.steps else None
        for step in range(start, cfg.steps):
            batch, next_batch = next_batch.result(), sample(step=step + 1) if step + 1 < cfg.steps else None
            metrics, group = train_step(policy, optimizer, cues, step, cfg, task, batch)
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            history.append(metrics)
            names = ("reward", "iou", "format", "kl", "length", "seconds")
            bar.set_postfix({name: f"{metrics[name]:.3g}" for name in names}, refresh=False)
            bar.update()
            for warning in checks.watch(history, cfg.kl_limit):
                bar.write(f"step {step}: {warning}", file=sys.stderr)
            if cfg.show_every and step % cfg.show_every == 0:
                bar.write(f"step {step}: {group.completions[0]!r}, reward {group.rewards[0].total:.2f}")
            diverged = checks.diverged(history)
            if step + 1 == cfg.steps:
                pictures.draw_group(group, folder / "group.png")
            elif not (interruption.asked or diverged or (step + 1) % cfg.save_every == 0):
                continue
            run_folder.sync(folder / "metrics.jsonl")
            run_folder.save_checkpoint(folder, step + 1, policy.model, optimizer, state)
            if diverged:
                raise UserError(
                    f"Five steps in a row were not finite: begin anew with less than --lr {cfg.lr}."
                )
            if interruption.asked:
                raise run_folder.Stopped


def run(flags: dict[str, Any], task: Task = LOCUS) -> None:
    """A run, new or resumed: measure the base on held-out cues, train, measure again."""
    experiment = open_experiment(flags, task.name, task.adapt)
    run_experiment(experiment, partial(train, task=task), task.encode)


def main() -> None:
    remedy = "make room or allow it, then start again with --resume"
    with exit_on_error(remedy, stopped="Stopped, before anything was done."), run_folder.sigterm_is_ctrl_c():
        flags = read_flags(__doc__)
        dry_run(flags, train_step, LOCUS) if flags.pop("dry_run", False) else run(flags)


if __name__ == "__main__":
    main()
