"""What else the same loop can be taught: the paper's SFT baseline, and the controls that a sceptic asks for.

    --loss sft           imitate the true box, without a rollout (Table 4)
    --loss best          imitate the best of the G answers, without pushing any away
    --reward random      a number that has nothing to do with the answer
    --reward shuffled    the overlap with another thing of the scene
    --reward questions   the questions themselves, on the full image, instead of cues
    --alpha 1            the format alone
    --lora-rank 0        the text layers' own linear maps, instead of an adapter

What a gain is worth is its difference to what the same steps of something pointless give.
"""

import random
from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from data import Cue, encode_cue
from evaluation.heldout import is_right, thing_of
from policy import Policy, Rollout
from prompts import Encoded, Tools, encode, prompt_text
from reward import Reward, reward
from tiny import scenes
from tiny.scenes import Question

REWARDS = ("iou", "random", "shuffled", "questions")
IMITATION = ("sft", "best")  # losses that raise what they are shown, by its log-probability alone


def question_of(cue: Cue, index: int) -> Question:
    """The question that stands for the index-th cue, on its scene: about places and attributes in turn."""
    possible = scenes.questions(cue.scene)
    some = [q for q in possible if q.kind == ("place", "attribute")[index % 2]]
    return random.Random(index).choice(some or possible)


def encode_task(tools: Tools, cue: Cue, index: int, source: str, signal: str) -> Encoded:
    """The prompt of the index-th cue, or the question that stands for it."""
    if signal != "questions":
        return encode_cue(tools, cue, source)
    text = prompt_text(tools.family, "string", question=question_of(cue, index).text)
    return encode(tools, text, cue.image)


def score_group(
    answers: list[str], item: Encoded, cue: Cue, index: int, signal: str, alpha: float
) -> list[Reward]:
    """The rewards of a group's answers to the index-th cue; `iou` stays the true one, whatever `total` is.

    Where questions are rewarded, `iou` is 1 for a right answer. Nothing hangs on what was drawn before, so a
    run that was stopped goes on with the same rewards.
    """
    true = [reward(text, item.frame.to_units(cue.box), alpha) for text in answers]
    rng = random.Random(f"{signal}/{index}")
    if signal == "random":
        return [replace(r, total=rng.random()) for r in true]
    if signal == "shuffled":
        other = rng.choice([thing for thing in cue.scene.things if thing != thing_of(cue)])
        wrong = [reward(text, item.frame.to_units(other.box), alpha) for text in answers]
        return [replace(r, total=w.total) for r, w in zip(true, wrong, strict=True)]
    if signal == "questions":
        right = [is_right(text, question_of(cue, index)) for text in answers]
        return [Reward((1 - alpha) * hit + alpha * r.format, hit, r.format) for hit, r in zip(right, true)]
    return true


def true_answers(policy: Policy, items: list[Encoded], cues: list[Cue]) -> Rollout:
    """What SFT imitates, as groups of one answer: what is in the window as the thought, then the true box.

    The paper's rationale is a teacher's; here it is what the cue is known to show, or nothing.
    """
    tokenizer, begun, rows = policy.tools.tokenizer, policy.tools.family.opening.strip(), []
    for item, cue in zip(items, cues, strict=True):
        thought = f"<think> {cue.text}" if cue.text else "<think>"
        text = f"{thought}</think><answer>{item.frame.to_text(cue.box)}</answer>".removeprefix(begun)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(torch.tensor(ids, device=policy.device))  # [T_b]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, None]  # [B, 1, T]
    length = torch.tensor([len(row) for row in rows], device=policy.device)[:, None, None]  # [B, 1, 1]
    mask = torch.arange(tokens.shape[-1], device=policy.device) < length  # [B, 1, T]
    return Rollout(tokens, mask, torch.zeros(tokens.shape, device=policy.device), mask.any(-1))


def best_answers(roll: Rollout, rewards: Tensor) -> tuple[Rollout, Tensor]:
    """The best answer of each group, as groups of one; and whether it was better than another, [B, 1]."""
    row, best = torch.arange(len(rewards), device=rewards.device), rewards.argmax(1)  # [B]
    kept = Rollout(*(t[row, best][:, None] for t in (roll.tokens, roll.mask, roll.logps, roll.stopped)))
    return kept, (rewards.amax(1) > rewards.amin(1)).float()[:, None]


def all_weights(policy: Policy, seed: int = 0) -> Policy:
    """Every linear map of the text layers to be trained, beside a frozen copy: the reference, as ever.

    It is PEFT that keeps the copy, so checkpoints, adapter folder and reference work as with LoRA. For the
    embedded model only: a large one would need several times its own memory.
    """
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # PEFT asks for some LoRA as well: this one stays the nothing that it begins as.
    torch.manual_seed(seed)
    config = LoraConfig(r=1, target_modules=r".*visual\.merger\.linear_fc2", modules_to_save=names)
    model = get_peft_model(policy.model, config).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.requires_grad_(False)
    return replace(policy, model=model)
