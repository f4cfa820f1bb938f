"""Other tasks for the same training loop: the paper's SFT baseline, and the controls that a sceptic asks for.

    python -m paper.variants NAME [flags of locus_mini.py]     --help lists the names

A gain is worth its difference to what as many steps of something pointless give: hence the controls.
"""

import random
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from data import Cue
from evaluation.heldout import is_right, target_object
from files.errors import UserError, exit_on_error
from locus_mini import LOCUS, Example, Task, run, score, update_policy
from policy import Policy, Rollout
from prompts import EncodedPrompt, Processor, encode, prompt_text
from reward import Reward, reward
from tiny import scenes
from tiny.scenes import Question
from training import run_folder
from training.settings import Config, read_flags

# ---------------------------------------------------------------- other rewards


def question_of(cue: Cue, index: int) -> Question:
    """A question on a cue's scene: about a place for an even index, about an attribute for an odd one."""
    questions = scenes.questions(cue.scene)
    preferred = [q for q in questions if q.kind == ("place", "attribute")[index % 2]]
    return random.Random(index).choice(preferred or questions)


def encode_question(processor: Processor, cue: Cue, index: int, cfg: Config) -> EncodedPrompt:
    """The question in place of a cue, on the full image and without its crop."""
    text = prompt_text(processor.family, "string", question=question_of(cue, index).text)
    return encode(processor, text, cue.image)


def score_question(completions: list[str], example: Example, cfg: Config) -> list[Reward]:
    """0.9 · right + 0.1 · format of the answers to a question; `iou` is 1 for a right one."""
    question = question_of(example.cue, example.index)
    rewards = []
    for text, scored in zip(completions, score(completions, example, cfg), strict=True):
        right = is_right(text, question)
        rewards.append(Reward((1 - cfg.alpha) * right + cfg.alpha * scored.format, right, scored.format))
    return rewards


def score_randomly(completions: list[str], example: Example, cfg: Config) -> list[Reward]:
    """A random number as the reward; `iou` stays the true one.

    It is seeded by the cue alone, so a resumed run continues with the same rewards.
    """
    rng = random.Random(f"random/{example.index}")
    return [replace(scored, total=rng.random()) for scored in score(completions, example, cfg)]


def score_shuffled_target(completions: list[str], example: Example, cfg: Config) -> list[Reward]:
    """LOCUS's reward for the box of another object of the scene; `iou` stays the true one."""
    rng, cue = random.Random(f"shuffled/{example.index}"), example.cue
    other = rng.choice([o for o in cue.scene.objects if o != target_object(cue)])
    box = example.prompt.frame.to_units(other.box)
    true = score(completions, example, cfg)
    return [replace(r, total=reward(text, box, cfg.alpha).total) for r, text in zip(true, completions)]


# ---------------------------------------------------------------- imitation


def sft_loss(
    logps: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = −Σ w · A · log π with A ∈ {0, 1}: imitation, which pushes no completion away (Table 4).

    logps, weights: [B, 1, T]; advantages: [B, 1]. It takes the place of grpo_loss and ignores the rest.

    >>> logps, weights = torch.tensor([[[-1.0, -3.0]]]), torch.full((1, 1, 2), 0.5)
    >>> sft_loss(logps, logps, None, torch.ones(1, 1), weights)[0]  # the mean of 1 and 3
    tensor(2.)
    """
    zero = torch.zeros((), device=logps.device)
    return -(weights * advantages[..., None] * logps).sum(), {"kl": zero, "clip_ratio": zero}


def rollout_ground_truth(policy: Policy, batch: list[Example], step: int, cfg: Config) -> Rollout:
    """What SFT imitates, in place of a rollout: for each prompt one completion, which ends in the true box.

    The paper's rationale is written by a teacher; here the thought is the cue's description, or empty.
    """
    tokenizer, opening, rows = policy.processor.tokenizer, policy.processor.family.opening.strip(), []
    for example in batch:
        thought = f"<think> {example.cue.text}" if example.cue.text else "<think>"
        answer = example.prompt.frame.to_text(example.cue.box)
        text = f"{thought}</think><answer>{answer}</answer>".removeprefix(opening)
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append(torch.tensor(ids, device=policy.device))  # [T_b]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, None]  # [B, 1, T]
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)[:, None, None]  # [B, 1, 1]
    mask = torch.arange(tokens.shape[-1], device=policy.device) < lengths  # [B, 1, T]
    logps, finished = torch.zeros(tokens.shape, device=policy.device), mask.any(-1)  # [B, 1, T], [B, 1]
    return Rollout(tokens, mask, logps, finished, finished[:, 0])


def imitate_all(
    policy: Policy, optimizer: Any, batch: list, rollouts: Rollout, advantages: Tensor, *rest: Any
) -> dict[str, float]:
    """One step of SFT, as `update_policy` (rest: step, cfg): every completion is imitated."""
    imitated = torch.ones_like(advantages)  # [B, 1]
    metrics = update_policy(policy, optimizer, batch, rollouts, imitated, *rest, sft_loss)
    difference, ratio = "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"
    return metrics | {difference: 0.0, ratio: 1.0, "frac_reward_zero_std": 0.0}  # nothing was sampled


def best_completions(rollouts: Rollout, advantages: Tensor) -> tuple[Rollout, Tensor]:
    """The best completion of each group, as groups of one; and 1 where it is better than another, [B, 1]."""
    row, best = torch.arange(len(advantages), device=advantages.device), advantages.argmax(1)  # [B] each
    tensors = (rollouts.tokens, rollouts.mask, rollouts.logps, rollouts.finished)
    better = (advantages.amax(1) > advantages.amin(1)).float()[:, None]  # [B, 1]
    return Rollout(*(tensor[row, best][:, None] for tensor in tensors), rollouts.finite), better


def imitate_best(
    policy: Policy, optimizer: Any, batch: list, rollouts: Rollout, advantages: Tensor, *rest: Any
) -> dict[str, float]:
    """The same with the best of each prompt's G completions; the others are not pushed away."""
    best, better = best_completions(rollouts, advantages)
    return update_policy(policy, optimizer, batch, best, better, *rest, sft_loss)


# ---------------------------------------------------------------- the variants, and the command line


@dataclass(frozen=True)
class Variant:
    """A task in place of LOCUS's, and the settings that it fixes."""

    note: str
    task: Task
    settings: dict[str, Any] = field(default_factory=dict)
    scenes_only: bool = False


SFT = Task("sft", sample=rollout_ground_truth, update=imitate_all)
QUESTIONS = Task("questions", encode=encode_question, score=score_question)
SHUFFLED = Task("shuffled", score=score_shuffled_target)
VARIANTS = {
    "locus": Variant("cue search, rewarded by IoU", LOCUS),
    "sft": Variant("imitate the true box, without a rollout (Table 4)", SFT, {"beta": 0.0}),
    "best": Variant("imitate the best of G completions", Task("best", update=imitate_best), {"beta": 0.0}),
    "random": Variant("a random reward", Task("random", score=score_randomly)),
    "shuffled": Variant("the box of another object of the scene as the target", SHUFFLED, scenes_only=True),
    "questions": Variant("questions on the full image instead of cues", QUESTIONS, scenes_only=True),
}


def variant_flags(name: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a variant's run with the settings that it fixes; UserError where the two disagree."""
    variant = VARIANTS[name]
    if "dry_run" in flags:
        raise UserError(f"--dry-run measures LOCUS, not {name}: give it to locus_mini.py.")
    for setting, value in variant.settings.items():
        if flags.get(setting, value) != value:
            raise UserError(f"{name} trains with --{setting} {value}, not {flags[setting]}: leave it out.")
    if variant.scenes_only and flags.get("data", "scenes") != "scenes":
        raise UserError(f"{name} needs scenes, not --data {flags['data']}: leave it out.")
    return flags if "resume" in flags else flags | variant.settings


def main() -> None:
    usage = "\n".join([__doc__, *(f"    {name:12} {variant.note}" for name, variant in VARIANTS.items())])
    name, *flags = sys.argv[1:] or [""]
    with exit_on_error(), run_folder.sigterm_as_keyboard_interrupt():
        if name in ("-h", "--help"):
            read_flags(usage, ["--help"])  # prints the usage and exits
        if name not in VARIANTS:
            raise UserError(f"{name!r} is not a variant: give one of {', '.join(VARIANTS)}.")
        run(variant_flags(name, read_flags(usage, flags)), VARIANTS[name].task)


if __name__ == "__main__":
    main()
