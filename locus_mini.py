"""LOCUS with GRPO from scratch: train a multimodal model to find a crop in its image.

    python locus_mini.py                                          the embedded model, on a laptop, in minutes
    python locus_mini.py --model Qwen/Qwen2.5-VL-3B-Instruct --data coco --annotations FILE --images DIR

A step: rollout → rewards → group_advantages → token_logps (policy, reference) → grpo_loss → optimizer step.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from shutil import which
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import check
import heldout
import pictures
from data import SOURCES, CueConfig, Cues, UserError, encode_cue, open_cues
from policy import Policy, add_lora, collate, load_policy, rollout, texts, token_logps
from reward import reward

FORMAT = argparse.RawTextHelpFormatter
LOSSES = ("token_mean", "grpo", "dr_grpo")


def setting(default: Any, note: str, choices: tuple = (), low: float = 0, high: float = 1e9) -> Any:
    """A field of Config that is also a flag; `note` says what it is and whether it is the paper's or ours."""
    return field(default=default, metadata={"note": note, "choices": choices, "range": (low, high)})


@dataclass
class Config:
    """Every setting of a run, and so every flag. None: the model family's row decides."""

    model: str = setting("tiny", "tiny, a model folder or a hub id; ours")
    data: str = setting("scenes", "scenes, coco or a folder of images; the paper: coco")
    annotations: Path | None = setting(None, "COCO instances JSON")
    images: Path | None = setting(None, "folder of the COCO images")
    exclude: Path | None = setting(None, "image ids to leave out, one a line (RefCOCO's); ours")
    expressions: Path | None = setting(None, "JSON of annotation id: expression, for text cues; ours")
    source: str = setting("object", "what a cue is; paper: object (Tables 5 to 7)", SOURCES)
    tiny_ratio: float = setting(0.7, "share of tiny cues, the rest is small; paper", high=1)
    out: Path | None = setting(None, "run folder; default a new one under runs/")
    preset: str = setting("", "paper: Table 8; qlora: one 24 GB card in a weekend", ("", "paper", "qlora"))
    steps: int = setting(300, "rollouts; paper: about 400 optimizer steps")
    prompts: int | None = setting(None, "prompts a rollout; paper: 512", low=1)
    group: int = setting(8, "answers a prompt, G; paper", low=2)
    updates: int = setting(1, "optimizer steps a rollout, each on a share of the prompts; paper: 4", low=1)
    iterations: int = setting(1, "passes over a rollout; paper: 1", low=1)
    micro_batch: int = setting(8, "prompts in one forward and backward pass; memory only; ours", low=1)
    max_new_tokens: int | None = setting(None, "longest answer in tokens; ours", low=1)
    lr: float | None = setting(None, "learning rate; paper: 1e-6, for full fine-tuning")
    decay: str = setting("linear", "learning rate after warm-up; paper: constant", ("linear", "constant"))
    warmup: float = setting(0.05, "share of the optimizer steps that warm up; paper", high=1)
    weight_decay: float = setting(0.01, "AdamW's; paper")
    max_grad_norm: float = setting(1.0, "clipping of the gradient norm; paper")
    loss: str = setting("token_mean", "how tokens are averaged; paper: token_mean", LOSSES)
    kl: float = setting(0.02, "coefficient of the KL to the reference; paper: 0.01")
    clip_low: float = setting(0.2, "the ratio's lower clip; paper's framework")
    clip_high: float = setting(0.3, "the ratio's upper clip; paper's framework")
    dual_clip: float = setting(3.0, "the ratio's bound at negative advantages; paper's framework", low=1)
    alpha: float = setting(0.1, "weight of the format reward; paper", high=1)
    lora_rank: int = setting(16, "rank of the adapter; ours (the paper trains all weights)", low=1)
    box_frame: str | None = setting(None, "coordinates of the model's boxes", ("resized", "relative1000"))
    load_in_4bit: bool | None = setting(None, "NF4 weights; default where CUDA is; ours")
    seed: int = setting(0, "of cues, adapter and sampling; ours")
    eval_cues: int = setting(1000, "held-out cues before and after; paper: 500", low=1)
    show_every: int = setting(30, "steps between completions on the screen, 0 for none; ours")


PRESETS = {
    "": {},
    "paper": dict(steps=100, prompts=512, updates=4, lr=1e-6, kl=0.01, decay="constant"),
    "qlora": dict(steps=400, prompts=16, lr=1e-5, kl=0.01, decay="constant", micro_batch=1),
}


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
    token_mean  1 / Σ_i |o_i|         every token of the step alike
    grpo        1 / (N · |o_i|)       every answer alike (the GRPO paper)
    dr_grpo     1 / (N · longest)     no reward for being short or long (Dr. GRPO); longest = max_new_tokens
    """
    if loss == "token_mean":
        return mask / tokens
    if loss == "grpo":
        return mask / (answers * mask.sum(-1, keepdim=True).clamp(min=1))
    return mask / (answers * longest)


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


def update_policy(policy: Policy, optimizer: Any, passes: list[tuple], cfg: Config) -> dict[str, float]:
    """One optimizer step on micro-batches (batch, rollout, advantages, old); old None: the pass's own value.

    Their gradients add up to that of the whole, since the weights divide by the tokens of the whole.
    """
    tokens = sum(roll.mask.sum() for _, roll, _, _ in passes).item()
    answers = sum(roll.stopped.numel() for _, roll, _, _ in passes)
    sums = {"kl": 0.0, "clipped": 0.0, "rollout_gap": 0.0}
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
        loss, stats = grpo_loss(logps, old, ref, advantages, weights, cfg)
        loss.backward()
        sums["kl"] += stats["kl"].item() / tokens
        sums["clipped"] += stats["clipped"].item() / tokens
        sums["rollout_gap"] = max(sums["rollout_gap"], (old - roll.logps).abs().max().item())
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.max_grad_norm)
    if torch.isfinite(norm):
        optimizer.step()
    return sums | {"grad_norm": norm.item(), "skipped": float(not torch.isfinite(norm))}


def micro_batches(cfg: Config) -> list[list[slice]]:
    """The prompts of each optimizer step of a rollout, as slices that fit in one pass."""
    share, size = cfg.prompts // cfg.updates, cfg.micro_batch
    updates = [(start, start + share) for start in range(0, cfg.prompts, share)]
    return [[slice(i, min(i + size, end)) for i in range(start, end, size)] for start, end in updates]


def train_step(policy: Policy, optimizer: Any, cues: Cues, step: int, cfg: Config) -> tuple[dict, dict]:
    """One rollout and the optimizer steps on it. Returns the metrics and, to show, one group."""
    began = time.monotonic()
    drawn = [cues[step * cfg.prompts + i] for i in range(cfg.prompts)]
    items = [encode_cue(policy.tools, cue, cfg.source) for cue in drawn]
    generator = torch.Generator(policy.device).manual_seed(cfg.seed * 1_000_003 + step)
    roll = rollout(policy, collate(policy, items), cfg.group, cfg.max_new_tokens, generator)
    answers = texts(policy, roll)  # B × G
    boxes = [item.frame.to_units(cue.box) for item, cue in zip(items, drawn, strict=True)]
    scored = [[reward(text, box, cfg.alpha) for text in row] for row, box in zip(answers, boxes, strict=True)]
    rewards = torch.tensor([[r.total for r in row] for row in scored], device=policy.device)  # [B, G]
    advantages = group_advantages(rewards, cfg.loss)  # [B, G]
    updates = []
    for slices in micro_batches(cfg):
        share = [(collate(policy, items[s]), roll.rows(s), advantages[s], None) for s in slices]
        if cfg.updates * cfg.iterations > 1:  # π_old is the policy before the first of several steps
            with torch.no_grad():
                share = [(b, r, a, token_logps(policy, b, r.tokens, r.mask)) for b, r, a, _ in share]
        updates.append(share)
    found = []
    for i, share in enumerate(updates * cfg.iterations):
        lr = learning_rate(step * cfg.updates * cfg.iterations + i, cfg)
        optimizer.param_groups[0]["lr"] = lr
        found.append(update_policy(policy, optimizer, share, cfg))
    flat = [r for row in scored for r in row]
    metrics = {"step": step, "reward": rewards.mean().item(), "iou": heldout.mean(r.iou for r in flat)}
    metrics |= {"format": heldout.mean(r.format for r in flat), "lr": lr}
    metrics |= {name: heldout.mean(f[name] for f in found) for name in found[0]}
    metrics["length"] = roll.mask.sum(-1).float().mean().item()
    metrics["truncated"] = 1 - roll.stopped.float().mean().item()
    metrics["zero_variance"] = 1 - advantages.any(1).float().mean().item()
    b = int(rewards.std(1).argmax())  # the group that teaches most
    shown = {"cue": drawn[b], "frame": items[b].frame, "answers": answers[b], "rewards": scored[b]}
    shown["advantages"] = advantages[b].tolist()
    return metrics | {"seconds": time.monotonic() - began}, shown


# ---------------------------------------------------------------- a run


def resolve(flags: dict[str, Any], policy: Policy) -> tuple[Config, dict[str, str]]:
    """Settings and where each came from: flag, else preset, else the family's row, else default."""
    family, preset = policy.tools.family, PRESETS[flags.get("preset", "")]
    row = {"prompts": family.prompts_a_step, "lr": family.lr, "max_new_tokens": family.max_new_tokens}
    row["box_frame"] = family.box_frame
    cfg = Config(**(row | preset | flags))
    origin = dict.fromkeys((f.name for f in fields(Config)), "default") | dict.fromkeys(row, "model family")
    origin |= dict.fromkeys(preset, f"preset {cfg.preset}") | dict.fromkeys(flags, "flag")
    for f in fields(Config):
        value, flag = getattr(cfg, f.name), f"--{f.name.replace('_', '-')}"
        low, high = f.metadata["range"]
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"{flag} {value} cannot be: give a number from {low} to {high}.")
    if cfg.prompts % cfg.updates:
        raise UserError(f"--updates {cfg.updates} does not divide --prompts {cfg.prompts}: give a divisor.")
    return cfg, origin


def new_folder(out: Path | None) -> Path:
    """The run folder that was asked for, if it holds no run yet, or a new one under runs/."""
    out = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if (out / "config.json").exists():
        raise UserError(f"--out {out} already holds a run: give another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): give another folder.") from None
    return out


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """What one needs to know to run this again."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if which("git") else ""
    modules = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    return modules | {"python": platform.python_version(), "commit": commit or "unknown"}


def train(policy: Policy, cues: Cues, cfg: Config, folder: Path) -> dict:
    """cfg.steps rollouts, each a line of metrics.jsonl. Returns a group of the last one, to draw."""
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
    shown: dict = {}
    log, bar = (folder / "metrics.jsonl").open("w", encoding="utf-8"), tqdm(total=cfg.steps, desc="GRPO")
    with log, bar:
        for step in range(cfg.steps):
            metrics, shown = train_step(policy, optimizer, cues, step, cfg)
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            names = ("reward", "iou", "format", "kl", "length", "seconds")
            bar.set_postfix({name: f"{metrics[name]:.3g}" for name in names}, refresh=False)
            bar.update()
            if metrics["truncated"] > 0.1:
                bar.write(
                    f"step {step}: {metrics['truncated']:.0%} of the answers cut; raise --max-new-tokens"
                )
            if cfg.show_every and step % cfg.show_every == 0:
                bar.write(f"step {step}: {shown['answers'][0]!r}, reward {shown['rewards'][0].total:.2f}")
    return shown


def run(flags: dict[str, Any]) -> None:
    """Load, check, measure, train, measure again, and leave it all in the run folder."""
    began = time.monotonic()
    policy = load_policy(flags.get("model", "tiny"), flags.get("load_in_4bit"), flags.get("box_frame"))
    cfg, origin = resolve(flags, policy)
    files = {name: getattr(cfg, name) for name in ("annotations", "images", "exclude", "expressions")}
    cues = open_cues(cfg.data, "train", cfg.seed, CueConfig(cfg.source, cfg.tiny_ratio), **files)
    unseen = open_cues(cfg.data, "heldout", 0, CueConfig(), **files)
    folder = new_folder(cfg.out)
    for f in fields(Config):
        print(f"{f.name:>16} = {getattr(cfg, f.name)!s:<12} {origin[f.name]}")
    if cfg.preset == "paper":
        print("Note: 1e-6 is the paper's rate for all weights; an adapter needs about ten times as much.")
    write_json(folder / "config.json", asdict(cfg) | {"origin": origin, "versions": versions()})
    policy = add_lora(policy, cfg.lora_rank, cfg.seed)
    first = [encode_cue(policy.tools, cues[i], cfg.source) for i in range(min(4, cfg.prompts))]
    checked = check.self_check(policy, first, cfg.group, cfg.max_new_tokens, cfg.seed)
    print("self-check passed: " + ", ".join(f"{name} {value:.2g}" for name, value in checked.items()))
    held = heldout.held_out(policy, unseen, cfg.eval_cues)
    before = heldout.evaluate(policy, held, cfg.max_new_tokens, "before")
    check.check_frame(policy, held, before)
    floor = heldout.baselines(policy, held, cfg.max_new_tokens)
    training = time.monotonic()
    shown = train(policy, cues, cfg, folder)
    training = time.monotonic() - training
    policy.model.save_pretrained(folder / "adapter")
    after = heldout.evaluate(policy, held, cfg.max_new_tokens, "after")
    pictures.draw_cues(held.cues, before.boxes, after.boxes, folder / "before_after.png")
    if shown:
        pictures.draw_group(shown, folder / "group.png")
    results = {"before": before.summary, "after": after.summary, "change": heldout.compare(before, after)}
    results |= {"baselines": floor, "self_check": checked, "seed": cfg.seed, "settings": asdict(cfg)}
    results["seconds"] = {"training": round(training, 1), "all": round(time.monotonic() - began, 1)}
    write_json(folder / "results.json", results)
    print(heldout.table(before, after))
    print("cue search without searching (IoU): " + ", ".join(f"{k} {100 * v:.1f}" for k, v in floor.items()))
    print(f"{results['seconds']['all']:.0f} seconds; adapter, results.json and pictures are in {folder}")


def read_flags(arguments: list[str] | None = None) -> dict[str, Any]:
    """The flags that were given, by the name of their field of Config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMAT, allow_abbrev=False)
    for f in fields(Config):
        note = f.metadata["note"] + ("" if f.default is None else f" (default {f.default})")
        ways: dict[str, Any] = {"help": note, "default": argparse.SUPPRESS}
        if "bool" in str(f.type):
            ways["action"] = argparse.BooleanOptionalAction
        else:
            ways["type"] = next(t for t in (int, float, Path, str) if t.__name__ in str(f.type))
            ways["choices"] = f.metadata["choices"] or None
        parser.add_argument(f"--{f.name.replace('_', '-')}", **ways)
    return vars(parser.parse_args(arguments))


def main() -> None:
    try:
        run(read_flags())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
