"""The metrics of a step that describe its completions; locus_mini.py adds those of its optimizer steps."""

from torch import Tensor

from evaluation.scores import mean
from policy import Rollout


def completion_metrics(rewards: Tensor, scored: list, rollouts: Rollout, advantages: Tensor) -> dict:
    """What metrics.jsonl records of a step's completions; TRL's names where TRL has them."""
    flat = [r for row in scored for r in row]
    return {
        "reward": rewards.mean().item(),
        "iou": mean(r.iou for r in flat),
        "format": mean(r.format for r in flat),
        "completions/mean_length": rollouts.mask.sum(-1).float().mean().item(),
        "completions/clipped_ratio": 1 - rollouts.finished.float().mean().item(),
        "frac_reward_zero_std": 1 - advantages.any(1).float().mean().item(),
    }
