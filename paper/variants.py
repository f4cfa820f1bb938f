"""What else the same loop can be taught: the paper's SFT baseline, and the controls that a sceptic asks for.

    python -m paper.variants NAME [flags of locus_mini.py]     --help lists the names

What a gain is worth is its difference to what the same steps of something pointless give.
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
    """The question that stands for the index-th cue, on its scene: about places and attributes in turn."""
    possible = scenes.questions(cue.scene)
    some = [q for q in possible if q.kind == ("place", "attribute")[index % 2]]
    return random.Random(index).choice(some or possible)


def encode_question(processor: Processor, cue: Cue, index: int, cfg: Config) -> EncodedPrompt:
    """The question that stands for the index-th cue, on the full image and without its crop."""
    text = prompt_text(processor.family, "string", question=question_of(cue, index).text)
    return encode(processor, text, cue.image)


def score_randomly(completions: list[str], example: Example, cfg: Config) -> list[Reward]:
    """A number that has nothing to do with the answer; `iou` stays the true one.

    Nothing hangs on what was drawn before, so a resumed run continues with the same rewards.
    """
    rng = random.Random(f"random/{example.index}")
    return [replace(r, total=rng.random()) for r in score(completions, example, cfg)]


def score_shuffled_target(completions: list[str], example: Example, cfg: Config) -> list[Reward]:
    """The overlap with another thing of the scene; `iou` stays the true one."""
    rng = random.Random(f"shuffled/{example.index}")
    cue = example.cue
    other = rng.choice(
        [scene_object for scene_object in cue.scene.objects if scene_object != target_object(cue)]
    )
    wrong = [reward(text, example.prompt.frame.to_units(other.box), cfg.alpha) for text in completions]
    true = score(completions, example, cfg)
    return [replace(r, total=w.total) for r, w in zip(true, wrong, strict=True)]


def score_question(completions: list[str], example: Example, cfg: Config) -> list[Reward]:
    """0.9 · right + 0.1 · format of answers to a question; `iou` is 1 for a right one."""
    true = score(completions, example, cfg)
    question = question_of(example.cue, example.index)
    right = [is_right(text, question) for text in completions]
    return [
        Reward((1 - cfg.alpha) * hit + cfg.alpha * r.format, hit, r.format) for hit, r in zip(right, true)
    ]


# ---------------------------------------------------------------- imitation


def sft_loss(
    logps: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, weights: Tensor, cfg: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = −Σ w · A · log π with A ∈ {0, 1}: imitation, which has no bad answers to push away (Table 4).

    logps, weights: [B, 1, T]; advantages: [B, 1]. In place of grpo_loss, whose other arguments it ignores.
    """
    none = torch.zeros((), device=logps.device)
    return -(weights * advantages[..., None] * logps).sum(), {"kl": none, "clip_ratio": none}


def ground_truth_completions(policy: Policy, items: list[EncodedPrompt], cues: list[Cue]) -> Rollout:
    """What SFT imitates, as groups of one answer: what is in the window as the thought, then the true box.

    The paper's rationale is a teacher's; here it is what the cue is known to show, or nothing.
    """
    tokenizer, begun, rows = policy.processor.tokenizer, policy.processor.family.opening.strip(), []
    for item, cue in zip(items, cues, strict=True):
        thought = f"<think> {cue.text}" if cue.text else "<think>"
        text = f"{thought}</think><answer>{item.frame.to_text(cue.box)}</answer>".removeprefix(begun)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(torch.tensor(ids, device=policy.device))  # [T_b]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, None]  # [B, 1, T]
    length = torch.tensor([len(row) for row in rows], device=policy.device)[:, None, None]  # [B, 1, 1]
    mask = torch.arange(tokens.shape[-1], device=policy.device) < length  # [B, 1, T]
    return Rollout(tokens, mask, torch.zeros(tokens.shape, device=policy.device), mask.any(-1))


def rollout_ground_truth(policy: Policy, batch: list[Example], step: int, cfg: Config) -> Rollout:
    """SFT has no rollout: its completions are the true answers."""
    return ground_truth_completions(policy, *zip(*((example.prompt, example.cue) for example in batch)))


def imitate_all(
    policy: Policy,
    optimizer: Any,
    batch: list[Example],
    rollouts: Rollout,
    advantages: Tensor,
    step: int,
    cfg: Config,
) -> dict[str, float]:
    """One step of SFT: every completion is worth imitating."""
    metrics = update_policy(
        policy, optimizer, batch, rollouts, torch.ones_like(advantages), step, cfg, sft_loss
    )
    return metrics | {"rollout_gap": 0.0, "frac_reward_zero_std": 0.0}  # nothing was sampled


def best_completions(rollouts: Rollout, advantages: Tensor) -> tuple[Rollout, Tensor]:
    """The best answer of each group, as groups of one; and whether it was better than another, [B, 1]."""
    row, best = torch.arange(len(advantages), device=advantages.device), advantages.argmax(1)  # [B]
    kept = Rollout(
        *(t[row, best][:, None] for t in (rollouts.tokens, rollouts.mask, rollouts.logps, rollouts.finished))
    )
    return kept, (advantages.amax(1) > advantages.amin(1)).float()[:, None]


def imitate_best(
    policy: Policy,
    optimizer: Any,
    batch: list[Example],
    rollouts: Rollout,
    advantages: Tensor,
    step: int,
    cfg: Config,
) -> dict[str, float]:
    """Imitates the best of the G answers, without pushing any away."""
    return update_policy(
        policy, optimizer, batch, *best_completions(rollouts, advantages), step, cfg, sft_loss
    )


# ---------------------------------------------------------------- all weights


def all_weights(policy: Policy, rank: int = 0, seed: int = 0) -> Policy:
    """Every linear map of the text layers to be trained, beside a frozen copy: the reference.

    It is PEFT that keeps the copy, so checkpoints, adapter folder and reference work as with LoRA. For the
    embedded model only: a large one would need several times its own memory.
    """
    if policy.processor.family.template != "short":
        raise UserError("The variant all_weights is for the embedded model alone: leave out --model.")
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # PEFT asks for some LoRA as well: this one stays the nothing that it begins as.
    torch.manual_seed(seed)
    config = LoraConfig(r=1, target_modules=r".*visual\.merger\.linear_fc2", modules_to_save=names)
    model = get_peft_model(policy.model, config).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.requires_grad_(False)
    return replace(policy, model=model)


# ---------------------------------------------------------------- the table, and the command


@dataclass(frozen=True)
class Variant:
    """A task in place of LOCUS's, and the settings that it fixes."""

    note: str
    task: Task
    settings: dict[str, Any] = field(default_factory=dict)
    scenes_only: bool = False


VARIANTS = {
    "locus": Variant("cue search, rewarded by IoU", LOCUS),
    "sft": Variant(
        "imitate the true box, without a rollout (Table 4)",
        replace(LOCUS, name="sft", sample=rollout_ground_truth, update=imitate_all),
        {"beta": 0.0},
    ),
    "best": Variant(
        "imitate the best of the G answers", replace(LOCUS, name="best", update=imitate_best), {"beta": 0.0}
    ),
    "random": Variant("a reward by chance", replace(LOCUS, name="random", score=score_randomly)),
    "shuffled": Variant(
        "the overlap with another thing of the scene",
        replace(LOCUS, name="shuffled", score=score_shuffled_target),
        scenes_only=True,
    ),
    "questions": Variant(
        "the questions themselves, on the full image, instead of cues",
        replace(LOCUS, name="questions", encode=encode_question, score=score_question),
        scenes_only=True,
    ),
    "all_weights": Variant(
        "the text layers' own linear maps, instead of an adapter",
        replace(LOCUS, name="all_weights", adapt=all_weights),
    ),
}


def variant_flags(name: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a variant's run with the settings that it fixes; UserError where the two disagree."""
    variant = VARIANTS[name]
    for setting, value in variant.settings.items():
        if flags.get(setting, value) != value:
            raise UserError(f"{name} trains with --{setting} {value}, not {flags[setting]}: leave it out.")
    if variant.scenes_only and flags.get("data", "scenes") != "scenes":
        raise UserError(f"{name} needs scenes, which --data {flags['data']} has not: leave it out.")
    return flags if "resume" in flags else flags | variant.settings


def main() -> None:
    usage = "\n".join([__doc__, *(f"    {name:12} {variant.note}" for name, variant in VARIANTS.items())])
    name = next(iter(sys.argv[1:]), "")
    with exit_on_error(), run_folder.sigterm_as_keyboard_interrupt():
        if name in VARIANTS:
            run(variant_flags(name, read_flags(usage, sys.argv[2:])), VARIANTS[name].task)
        else:
            read_flags(usage, [name] if name in ("-h", "--help") else [])
            raise UserError(f"{name or 'nothing'} is no variant: give one of {', '.join(VARIANTS)}.")


if __name__ == "__main__":
    main()
