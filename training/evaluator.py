"""Evaluation on the way: every --eval-every steps, greedy replies to the same held-out prompts.

evaluations.jsonl has one line per evaluation, for drawings of how a run learns:
step      as in metrics.jsonl: the evaluation came after this step
replies   the texts of the 50 held-out cues, in their order; null where memory ran out
boxes     their boxes (x1, y1, x2, y2) in pixels of the full image; null without a valid box
ious      their IoU with the true boxes; null without a reply
Cue i is `Cues[i]` of the run's held-out cues, so its image and its true box need no copy here.
"""

import json
from dataclasses import replace
from pathlib import Path

from data import Cues
from evaluation.heldout import build_heldout_set, evaluate
from files.disk import sync
from policy import Policy
from training.pictures import draw_cues
from training.run_folder import open_lines
from training.settings import Config

NUM_CUES, NUM_QUESTIONS = 50, 100


def no_scores(step: int) -> dict[str, float]:
    """What `train` calls in place of an Evaluator where nothing is evaluated."""
    return {}


class Evaluator:
    """Evaluates a policy in training, and keeps the replies.

    Decoding is greedy and draws no random number, so the training is the same with and without it.
    """

    def __init__(self, policy: Policy, cues: Cues, cfg: Config, folder: Path, base_boxes: list):
        """cues: held-out ones; base_boxes: those that the base model predicts for the first of them."""
        self.policy, self.cfg, self.folder, self.base_boxes = policy, cfg, folder, base_boxes
        if cfg.eval_every:
            held = build_heldout_set(policy, cues, NUM_CUES)
            # Of the four tasks on scenes, the one that is trained and the one that it should help.
            self.held = replace(held, find_prompts=[], suppressed_prompts=[])
            del self.held.scene_questions[NUM_QUESTIONS:], self.held.question_prompts[NUM_QUESTIONS:]

    def __call__(self, step: int) -> dict[str, float]:
        """The scores after a step, as keys of its line in metrics.jsonl; {} where no evaluation is due.

        evaluations.jsonl gets a line, and evaluation.png the boxes of the first cues.
        """
        every, path, replies = self.cfg.eval_every, self.folder / "evaluations.jsonl", {}
        if not every or (step + 1) % every:
            return {}
        scores = evaluate(self.policy, self.held, self.cfg.max_new_tokens, cache=replies)
        texts = [text for key, (text, *_) in replies.items() if "/cue search/" in key]
        line = {"step": step, "replies": texts, "boxes": scores.boxes, "ious": scores.samples["cue"]}
        # Earlier evaluations stay; what a killed run wrote after its checkpoint is replaced.
        log, _ = open_lines(path, range(every - 1, step, every))
        with log:
            log.write(json.dumps(line) + "\n")
        # Before the checkpoint, as metrics.jsonl: resuming needs a line for each of its evaluations.
        sync(path)
        n = min(8, len(self.base_boxes))
        draw_cues(self.held.cues, self.base_boxes, scores.boxes, self.folder / "evaluation.png", n)
        cue, questions = scores.summary["cue"], scores.summary.get("questions")
        metrics = {"eval/iou": cue["mean_iou"], "eval/format": cue["format"]}
        return metrics | ({"eval/accuracy": questions["accuracy"]} if questions else {})
