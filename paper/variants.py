"""Other tasks for the same training loop: the paper's SFT baseline, and the controls that a sceptic asks for.

    python -m paper.variants NAME [flags of locus_mini.py]     --help lists the names

A gain is worth its difference to what as many steps of something pointless give: hence the controls.
"""

import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data import Cue, CueConfig, encode_cue, open_cues
from evaluation.heldout import is_right, target_object
from files.errors import UserError, exit_on_error
from locus_mini import LOCUS, Example, Task, run, score, update_policy
from policy import Policy, Rollout
from prompts import EncodedPrompt, Processor, encode, prompt_text
from reward import Reward, format_reward, reward
from tiny import scenes
from training import run_folder
from training.settings import Config, read_flags

# ---------------------------------------------------------------- other prompts


def encode_description(processor: Processor, cue: Cue, index: int, cfg: Config) -> EncodedPrompt:
    """The text cue with a description that no other object of the scene has: `--source text` says less."""
    return encode_cue(processor, replace(cue, text=target_object(cue).description), "text")


def encode_other_crop(processor: Processor, cue: Cue, index: int, cfg: Config) -> EncodedPrompt:
    """LOCUS's prompt with the crop of another scene; the target stays, so the crop tells nothing about it."""
    cues = open_cues("scenes", "train", cfg.seed, CueConfig(cfg.source, cfg.tiny_ratio))
    other = cues[index + 10**9]  # no run gets that far, so it never finds this crop
    return encode(processor, prompt_text(processor.family, "cue"), cue.image, crop=other.crop)


def question_of(cue: Cue, index: int) -> scenes.Question:
    """A question on a cue's scene, of each kind in turn; of another kind where the scene has none of it."""
    questions = scenes.questions(cue.scene)
    preferred = [q for q in questions if q.kind == scenes.KINDS[index % len(scenes.KINDS)]]
    return random.Random(index).choice(preferred or questions)


def encode_question(processor: Processor, cue: Cue, index: int, cfg: Config) -> EncodedPrompt:
    """The question in place of a cue, on the full image and without its crop."""
    text = prompt_text(processor.family, "string", question=question_of(cue, index).text)
    return encode(processor, text, cue.image)


# ---------------------------------------------------------------- other rewards


def score_question(completions: list[str], example: Example, cfg: Config) -> list[Reward]:
    """0.9 · right + 0.1 · format of the answers to a question; `iou` is 1 for a right one."""
    question = question_of(example.cue, example.index)
    pairs = [(is_right(text, question), format_reward(text)) for text in completions]
    return [Reward((1 - cfg.alpha) * right + cfg.alpha * form, right, form) for right, form in pairs]


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


def rationale(example: Example, wrong_share: float) -> str:
    """What SFT imitates as the thought, where the paper has a teacher's prose: what the crop shows.

    For a share of the cues it describes another object of the scene. A photo's is its text, if it has any.
    """
    rng, cue = random.Random(f"rationale/{example.index}"), example.cue
    if cue.scene is None:
        return cue.text or ""
    target = target_object(cue)
    others = [o for o in cue.scene.objects if o != target]
    return (rng.choice(others) if rng.random() < wrong_share else target).description


def rollout_ground_truth(
    policy: Policy, batch: list[Example], step: int, cfg: Config, wrong_share: float = 0.0
) -> Rollout:
    """What SFT imitates, in place of a rollout: one completion a prompt, a rationale and the true box."""
    tokenizer, opening, texts = policy.processor.tokenizer, policy.processor.family.opening.strip(), []
    for example in batch:
        thought = f"<think> {rationale(example, wrong_share)}".rstrip()
        text = f"{thought}</think><answer>{example.prompt.frame.to_text(example.cue.box)}</answer>"
        texts.append(text.removeprefix(opening) + tokenizer.eos_token)
    # Padded here: the tokenizer's own padding is a state that it shares with the thread of locus_mini.train.
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0] for text in texts]
    tokens = nn.utils.rnn.pad_sequence(ids, True, -1)[:, None].to(policy.device)  # [B, 1, T]
    mask = tokens >= 0  # [B, 1, T]: the padding token itself may be one that ends a text
    logps, finished = torch.zeros(tokens.shape, device=policy.device), mask.any(-1)  # [B, 1, T], [B, 1]
    return Rollout(tokens.clamp_min(0), mask, logps, finished, finished[:, 0])


def imitate_all(
    policy: Policy, optimizer: Any, batch: list, rollouts: Rollout, advantages: Tensor, *rest: Any
) -> dict[str, float]:
    """One step of SFT, as `update_policy` (rest: step, cfg): every completion is imitated."""
    imitated = torch.ones_like(advantages)  # [B, 1]
    metrics = update_policy(policy, optimizer, batch, rollouts, imitated, *rest, sft_loss)
    difference, ratio = "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"
    return metrics | {difference: 0.0, ratio: 1.0, "frac_reward_zero_std": 0.0}  # nothing was sampled


# ---------------------------------------------------------------- the variants, and the command line


@dataclass(frozen=True)
class Variant:
    """A task in place of LOCUS's."""

    note: str
    task: Task
    scenes_only: bool = True


def sft(name: str, wrong_share: float = 0.0) -> Task:
    """SFT, a share of whose rationales is wrong."""
    return Task(name, sample=partial(rollout_ground_truth, wrong_share=wrong_share), update=imitate_all)


TABLE = (
    Variant("cue search, rewarded by IoU", LOCUS, scenes_only=False),
    Variant("imitate a rationale and the true box (Table 4)", sft("sft"), scenes_only=False),
    Variant("the same, a quarter of the rationales wrong", sft("sft_quarter_wrong", 0.25)),
    Variant("the same, half of the rationales wrong", sft("sft_half_wrong", 0.5)),
    Variant("a random reward", Task("random", score=score_randomly), scenes_only=False),
    Variant("another object's box as the target", Task("shuffled", score=score_shuffled_target)),
    Variant("the crop of another scene, the same target", Task("other_crop", encode=encode_other_crop)),
    Variant("a unique description, no crop (Table 5)", Task("description", encode=encode_description)),
    Variant("questions, no cues", Task("questions", encode=encode_question, score=score_question)),
)
VARIANTS = {variant.task.name: variant for variant in TABLE}


def variant_flags(name: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a variant's run; UserError where they make no sense.

    Imitation has no KL to the reference, as in the paper.
    """
    variant, imitates = VARIANTS[name], VARIANTS[name].task.update is imitate_all
    if "dry_run" in flags:
        raise UserError(f"--dry-run measures LOCUS, not {name}: give it to locus_mini.py.")
    if imitates and flags.get("beta"):
        raise UserError(f"{name} trains with --beta 0, not {flags['beta']}: leave it out.")
    if variant.scenes_only and flags.get("data", "scenes") != "scenes":
        raise UserError(f"{name} needs scenes, not --data {flags['data']}: leave it out.")
    return flags | ({"beta": 0.0} if imitates and "resume" not in flags else {})


def main() -> None:
    usage = "\n".join([__doc__, *(f"    {name:18} {variant.note}" for name, variant in VARIANTS.items())])
    name, *flags = sys.argv[1:] or [""]
    with exit_on_error(), run_folder.sigterm_as_keyboard_interrupt():
        if name in ("-h", "--help"):
            read_flags(usage, ["--help"])  # prints the usage and exits
        if name not in VARIANTS:
            raise UserError(f"{name!r} is not a variant: give one of {', '.join(VARIANTS)}.")
        run(variant_flags(name, read_flags(usage, flags)), VARIANTS[name].task)


if __name__ == "__main__":
    main()
