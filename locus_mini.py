"""LOCUS with GRPO from scratch: train a multimodal model to find a crop in its image.

    python locus_mini.py                                          the embedded model, on a laptop, in minutes
    python locus_mini.py --model Qwen/Qwen2.5-VL-3B-Instruct --data coco --annotations FILE --images DIR

A step: rollout → rewards → group_advantages → token_logps (policy, reference) → grpo_loss → optimizer step.
"""

import json
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data import Cue, CueConfig, Cues, UserError, open_cues
from evaluation import heldout
from evaluation.journal import Journal, fingerprint
from paper.variants import IMITATION, best_answers, encode_task, score_group, true_answers
from policy import Policy, Rollout, collate, rollout, texts, token_logps
from prompts import Encoded, Tools
from training import checks, memory, pictures, run_folder
from training.memory import phase, prepare
from training.settings import MEMORY, Config, begun_settings, print_settings, read_flags

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


def sft_loss(logps: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """L = −Σ w · A · log π with A ∈ {0, 1}: imitation, which has no bad answers to push away (Table 4).

    logps, weights: [B, 1, T]; advantages: [B, 1].
    """
    return -(weights * advantages[..., None] * logps).sum()


def learning_rate(update: int, cfg: Config) -> float:
    """Linear warm-up whose first step already moves, then linear to 0 or constant."""
    total = max(1, cfg.steps * cfg.updates * cfg.iterations)
    warm = max(1, round(cfg.warmup * total))
    fall = 1.0 if cfg.decay == "constant" else max(0.0, 1 - update / total)
    return cfg.lr * min((update + 1) / warm, 1.0) * fall


# ---------------------------------------------------------------- one step


def update_policy(policy: Policy, optimizer: Any, passes: list[tuple], cfg: Config) -> dict[str, float]:
    """One optimizer step on micro-batches (batch, rollout, advantages, old); old None: the pass's own value.

    Their gradients add up to that of the whole, since the weights divide by the tokens of the whole.
    """
    tokens = sum(roll.mask.sum() for _, roll, _, _ in passes).item()
    answers = sum(roll.stopped.numel() for _, roll, _, _ in passes)
    sums = {"loss": 0.0, "kl": 0.0, "clipped": 0.0, "rollout_gap": 0.0}
    finite, trained = True, optimizer.param_groups[0]["params"]
    scale = HALF_SCALE if policy.whole.dtype == torch.float16 else 1.0
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
        if cfg.loss in IMITATION:
            loss = sft_loss(logps, advantages, weights)
        else:
            loss, stats = grpo_loss(logps, old, ref, advantages, weights, cfg)
            sums["kl"] += stats["kl"].item() / tokens
            sums["clipped"] += stats["clipped"].item() / tokens
        (scale * loss).backward()
        finite = finite and math.isfinite(loss.item())
        sums["loss"] += loss.item()
        if cfg.loss != "sft":
            sums["rollout_gap"] = max(sums["rollout_gap"], (old - roll.logps).abs().max().item())
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm)
    finite = finite and math.isfinite(norm.item())
    if finite:
        with phase("optimizer"):
            optimizer.step()
    return sums | {"grad_norm": norm.item(), "skipped": float(not finite)}


def micro_batches(cfg: Config) -> list[list[slice]]:
    """The prompts of each optimizer step of a rollout, as slices that fit in one pass."""
    share, size = cfg.prompts // cfg.updates, cfg.micro_batch
    updates = [(start, start + share) for start in range(0, cfg.prompts, share)]
    return [[slice(i, min(i + size, end)) for i in range(start, end, size)] for start, end in updates]


def draw_step(tools: Tools, cues: Cues, step: int, cfg: Config) -> tuple[range, list[Cue], list[Encoded]]:
    """The numbers of a step's cues, the cues, their prompts. Nothing here needs the model."""
    numbers = range(step * cfg.prompts, (step + 1) * cfg.prompts)
    drawn = [cues[i] for i in numbers]
    items = [encode_task(tools, cue, i, cfg.source, cfg.reward) for cue, i in zip(drawn, numbers)]
    return numbers, drawn, items


def roll_out(policy: Policy, items: list[Encoded], step: int, cfg: Config) -> Rollout:
    """G answers to each prompt of a step, cfg.rollout_batch prompts at a time."""
    generator = torch.Generator(policy.device).manual_seed(cfg.seed * 1_000_003 + step)
    some = [items[i : i + cfg.rollout_batch] for i in range(0, len(items), cfg.rollout_batch)]
    ways = (cfg.group, cfg.max_new_tokens, generator)
    return Rollout.join([rollout(policy, collate(policy, part), *ways) for part in some])


def train_step(
    policy: Policy, optimizer: Any, cues: Cues, step: int, cfg: Config, ready: tuple | None = None
) -> tuple[dict, dict]:
    """One rollout and the optimizer steps on it. Returns the metrics and, to show, one group.

    ready: what `draw_step` gives, if it was asked before.
    """
    began = time.monotonic()
    numbers, drawn, items = ready or draw_step(policy.tools, cues, step, cfg)
    if cfg.loss == "sft":
        roll = true_answers(policy, items, drawn)
    else:
        with phase("rollout"):
            roll = roll_out(policy, items, step, cfg)
    answers = texts(policy, roll)  # B × G
    rows = zip(answers, items, drawn, numbers, strict=True)
    scored = [score_group(*row, cfg.reward, cfg.alpha) for row in rows]
    rewards = torch.tensor([[r.total for r in row] for row in scored], device=policy.device)  # [B, G]
    b = int((rewards.amax(1) - rewards.amin(1)).argmax())  # a group that teaches
    good = torch.ones_like(rewards)  # [B, G]
    advantages = good if cfg.loss == "sft" else group_advantages(rewards, cfg.loss)  # [B, G]
    shown = {"cue": drawn[b], "frame": items[b].frame, "answers": answers[b], "rewards": scored[b]}
    shown["advantages"] = advantages[b].tolist()
    if cfg.loss == "best":
        roll, advantages = best_answers(roll, rewards)  # [B, 1]
    updates = []
    for slices in micro_batches(cfg):
        share = [(collate(policy, items[s]), roll.rows(s), advantages[s], None) for s in slices]
        if cfg.updates * cfg.iterations > 1:  # π_old is the policy before the first of several steps
            with torch.no_grad(), phase("policy pass"):
                share = [(b, r, a, token_logps(policy, b, r.tokens, r.mask)) for b, r, a, _ in share]
        updates.append(share)
    found = []
    for i, share in enumerate(updates * cfg.iterations):
        lr = learning_rate(step * cfg.updates * cfg.iterations + i, cfg)
        optimizer.param_groups[0]["lr"] = lr
        with phase("policy pass"):
            found.append(update_policy(policy, optimizer, share, cfg))
    flat = [r for row in scored for r in row]
    metrics = {"step": step, "reward": rewards.mean().item(), "iou": heldout.mean(r.iou for r in flat)}
    metrics |= {"format": heldout.mean(r.format for r in flat), "lr": lr}
    metrics |= {name: heldout.mean(f[name] for f in found) for name in found[0]}
    metrics["length"] = roll.mask.sum(-1).float().mean().item()
    metrics["truncated"] = 1 - roll.stopped.float().mean().item()
    metrics["zero_variance"] = 1 - advantages.any(1).float().mean().item()
    return metrics | {"seconds": time.monotonic() - began}, shown


# ---------------------------------------------------------------- a run


def train(policy: Policy, cues: Cues, cfg: Config, folder: Path, state: dict) -> None:
    """cfg.steps rollouts, each a line of metrics.jsonl, from the last checkpoint on if there is one."""
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
    start = run_folder.load_checkpoint(folder, policy.model, optimizer, state)
    log, history = run_folder.open_metrics(folder, start)
    bar = tqdm(total=cfg.steps, initial=start, desc="GRPO")
    with log, bar, run_folder.Interruption() as interruption, ThreadPoolExecutor(1) as beside:
        # The next step's pictures are read and cut into patches while this one keeps the GPU busy.
        draw = partial(beside.submit, draw_step, policy.tools, cues, cfg=cfg)
        ahead = draw(step=start) if start < cfg.steps else None
        for step in range(start, cfg.steps):
            ready, ahead = ahead.result(), draw(step=step + 1) if step + 1 < cfg.steps else None
            metrics, shown = train_step(policy, optimizer, cues, step, cfg, ready)
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            history.append(metrics)
            names = ("reward", "iou", "format", "kl", "length", "seconds")
            bar.set_postfix({name: f"{metrics[name]:.3g}" for name in names}, refresh=False)
            bar.update()
            for warning in checks.watch(history, cfg.kl_limit):
                bar.write(f"step {step}: {warning}", file=sys.stderr)
            if cfg.show_every and step % cfg.show_every == 0:
                bar.write(f"step {step}: {shown['answers'][0]!r}, reward {shown['rewards'][0].total:.2f}")
            diverged = checks.diverged(history)
            if step + 1 == cfg.steps:
                pictures.draw_group(shown, folder / "group.png")
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


def run(flags: dict[str, Any]) -> None:
    """Settings, model, cues and folder of a run, new or begun; then all of it."""
    began, names = time.monotonic(), [f.name for f in fields(Config)]
    folder, begun, less = flags.pop("resume", None), {}, {}
    if folder is not None:
        begun = run_folder.read_config(folder, names)
        less = {name: value for name, value in flags.items() if name in MEMORY}
        asked = {name: value for name, value in flags.items() if name not in MEMORY}
        run_folder.refuse_difference(folder / "config.json", begun, asked)
        flags = begun_settings(begun) | less
    policy, cfg, origin = prepare(flags)
    files = {name: getattr(cfg, name) for name in ("annotations", "images", "exclude", "expressions")}
    cues = open_cues(cfg.data, "train", cfg.seed, CueConfig(cfg.source, cfg.tiny_ratio), **files)
    unseen = open_cues(cfg.data, "heldout", 0, CueConfig(), **files)
    folder = folder or run_folder.new_folder(cfg.out)
    origin = begun.get("origin", origin) | dict.fromkeys(less, "flag")
    print_settings(cfg, policy.tools.family, origin)
    if cfg.preset == "paper":
        print("Note: 1e-6 is the paper's rate for all weights; an adapter needs about ten times as much.")
    for part in (part for part in cues.left_out if part.reasons):
        print(part)
    paths = [path for path in (*files.values(), Path(cfg.data)) if path and path.exists()]
    inputs = {f"{path} as of": fingerprint(path) for path in paths if str(path) not in ("scenes", "coco")}
    about = {"weights": run_folder.fingerprint(policy.whole)} | inputs
    if begun:
        run_folder.refuse_difference(folder / "config.json", begun, about)
    else:
        more = {"origin": origin, "versions": run_folder.versions()}
        run_folder.write_json(folder / "config.json", asdict(cfg) | about | more)
    state = about | {name: str(v) for name, v in asdict(cfg).items() if name not in ("out", *MEMORY)}
    try:
        with run_folder.at_work(folder):
            before_train_after(policy, cues, unseen, cfg, folder, state, began)
    except (KeyboardInterrupt, run_folder.Stopped):
        print(f"Stopped. It goes on with: python locus_mini.py --resume {folder}", file=sys.stderr)
        sys.exit(130)


def before_train_after(
    policy: Policy, cues: Cues, unseen: Cues, cfg: Config, folder: Path, state: dict, began: float
) -> None:
    """Check, measure, train, measure again, and leave it all in the run folder."""
    if (folder / "results.json").exists():
        print(f"{folder} is complete: its results.json is there.")
        return
    run_folder.last_step(folder, state)
    few = min(4, cfg.prompts, max(2, cfg.micro_batch))
    first = [encode_task(policy.tools, cues[i], i, cfg.source, cfg.reward) for i in range(few)]
    with phase("rollout"):
        checked = checks.self_check(policy, first, cfg.group, cfg.max_new_tokens, cfg.seed)
    print("self-check passed: " + ", ".join(f"{name} {value:.2g}" for name, value in checked.items()))
    known, longest = Journal(folder / "answers.jsonl", state), cfg.max_new_tokens
    held = heldout.held_out(policy, unseen, cfg.eval_cues)
    before = heldout.evaluate(policy, held, longest, "before", known)
    checks.check_frame(policy, held, before)
    floor = heldout.baselines(policy, held, longest, known)
    train(policy, cues, cfg, folder, state)
    run_folder.save_adapter(policy.model, folder / "adapter")
    after = heldout.evaluate(policy, held, longest, "after", known)
    pictures.draw_cues(held.cues, before.boxes, after.boxes, folder / "before_after.png")
    results = {"before": before.summary, "after": after.summary, "change": heldout.compare(before, after)}
    results |= {"baselines": floor, "self_check": checked, "seed": cfg.seed, "settings": asdict(cfg)}
    training = sum(json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").open(encoding="utf-8"))
    results["seconds"] = {"training": round(training, 1), "all": round(time.monotonic() - began, 1)}
    results["left_out"] = {part.what: dict(part.reasons) for part in (*cues.left_out, *unseen.left_out)}
    run_folder.write_json(folder / "results.json", results)
    print(heldout.table(before, after))
    print("cue search without searching (IoU): " + ", ".join(f"{k} {100 * v:.1f}" for k, v in floor.items()))
    print(f"{results['seconds']['all']:.0f} seconds; adapter, results.json and pictures are in {folder}")


def main() -> None:
    flags, usual = read_flags(__doc__), signal.signal(signal.SIGTERM, run_folder.interrupt)
    work = partial(memory.dry_run, train_step=train_step) if flags.pop("dry_run", False) else run
    try:
        work(flags)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        what = f"{error.filename or 'A file'} cannot be read or written ({error.strerror or error})"
        print(f"{what}: make room or allow it, then start again with --resume.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped, before anything was done.", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, usual)


if __name__ == "__main__":
    main()
