"""How a run learns: its completions, evaluations on the way, and two drawings, curve.png and learning.gif.

curve.png     reward, IoU, format, KL and entropy of every step, from metrics.jsonl
learning.gif  the first eight held-out cues, with the predicted box after every evaluation (evaluations.jsonl)

The drawings depend on these files and on the cues alone, so `python eval.py report runs/NAME` draws them
again to the same bytes.

evaluations.jsonl has one line per evaluation, for drawings of how a run learns:
step      as in metrics.jsonl: the evaluation came after this step
replies   the texts of the 50 held-out cues, in their order; null where memory ran out
boxes     their boxes (x1, y1, x2, y2) in pixels of the full image; null without a valid box
ious      their IoU with the true boxes; null without a reply
Cue i is `Cues[i]` of the run's held-out cues, so its image and its true box need no copy here.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from data import Cue, Cues
from evaluation.heldout import build_heldout_set, evaluate
from evaluation.scores import mean
from files.disk import read_lines
from policy import Policy, Rollout
from training.pictures import BLUE, below, beside, draw_cues, group_boxes, image_block, legend, text_block
from training.run_folder import write_line
from training.settings import Config

# completions.jsonl: at most 100 lines of 50,000 bytes, 5 MB, whatever the run. The numbers of a completion
# need up to 400 bytes.
MOST_GROUPS, MOST_COMPLETIONS, GROUP_BYTES, NUMBER_BYTES = 100, 100, 49_000, 400
NUM_CUES, NUM_QUESTIONS = 50, 100  # of an evaluation on the way
MOST_FRAMES = 24
PANELS = {  # key of metrics.jsonl: title
    "reward": "reward",
    "iou": "IoU of the predicted boxes",
    "format": "format: share with a thought and an answer",
    "kl": "KL to the base model, nats per token",
    "entropy": "entropy of the policy, nats per token",
    "eval/iou": "IoU on 50 held-out cues, every evaluation",
}


# ---------------------------------------------------------------- metrics, and one group every few steps


def completion_metrics(rewards: Tensor, scored: list, rollouts: Rollout, advantages: Tensor) -> dict:
    """What metrics.jsonl records of a step's completions, in TRL's names where it has them.

    `optimizer_step` adds what it measures.
    """
    flat = [r for row in scored for r in row]
    return {
        "reward": rewards.mean().item(),
        "iou": mean(r.iou for r in flat),
        "format": mean(r.format for r in flat),
        "completions/mean_length": rollouts.mask.sum(-1).float().mean().item(),
        "completions/clipped_ratio": 1 - rollouts.finished.float().mean().item(),
        "frac_reward_zero_std": 1 - advantages.any(1).float().mean().item(),
    }


def shorten(text: str, limit: int) -> str:
    """The beginning of a text whose JSON has at most `limit` bytes (16 or more), with "…" where it was cut.

    >>> shorten("left of the red star", 15)
    'left of…'
    """
    while len(json.dumps(text)) > limit:
        text = f"{text[: len(text) * 3 // 4 - 1]}…"
    return text


def log_group(folder: Path, step: int, group: Any, cfg: Config) -> None:
    """Adds the group of a step to completions.jsonl, every cfg.show_every steps; in long runs fewer groups.

    cue: its number among the training cues; box: in pixels of its image, null without a valid box.
    """
    every = cfg.show_every * math.ceil(cfg.steps / max(1, cfg.show_every * MOST_GROUPS))
    if not every or step % every:
        return
    limit = GROUP_BYTES // min(MOST_COMPLETIONS, len(group.completions)) - NUMBER_BYTES
    columns = zip(group.completions, group_boxes(group), group.advantages, group.rewards, strict=True)
    rows = [
        {"text": shorten(text, limit), "box": box, "advantage": advantage, **asdict(reward)}
        for text, box, advantage, reward in columns
    ]
    line = {"step": step, "cue": group.example.index, "completions": rows[:MOST_COMPLETIONS]}
    write_line(folder / "completions.jsonl", range(0, step, every), line)


# ---------------------------------------------------------------- evaluation on the way


def evaluator(policy: Policy, cues: Cues, cfg: Config, folder: Path, base_boxes: list) -> Callable | None:
    """A function of a step that evaluates the policy after it, every --eval-every steps; None without it.

    cues: held-out ones; base_boxes: those that the base model predicts for the first of them. Decoding is
    greedy and draws no random number, so the training is the same with and without it.
    """
    if not (every := cfg.eval_every):
        return None
    held, n = build_heldout_set(policy, cues, NUM_CUES), min(8, len(base_boxes))
    # Of the four tasks on scenes, the one that is trained and the one that it should help.
    held = replace(held, find_prompts=[], suppressed_prompts=[])
    del held.scene_questions[NUM_QUESTIONS:], held.question_prompts[NUM_QUESTIONS:]

    def evaluate_step(step: int) -> dict[str, float]:
        """The scores after a step, as keys of its line in metrics.jsonl; {} where no evaluation is due.

        evaluations.jsonl gets a line, and evaluation.png the boxes of the first cues.
        """
        if (step + 1) % every:
            return {}
        replies = {}
        scores = evaluate(policy, held, cfg.max_new_tokens, cache=replies)
        texts = [text for key, (text, *_) in replies.items() if "/cue search/" in key]
        line = {"step": step, "replies": texts, "boxes": scores.boxes, "ious": scores.samples["cue"]}
        write_line(folder / "evaluations.jsonl", range(every - 1, step, every), line)
        draw_cues(held.cues, base_boxes, scores.boxes, folder / "evaluation.png", n)
        cue, questions = scores.summary["cue"], scores.summary.get("questions")
        metrics = {"eval/iou": cue["mean_iou"], "eval/format": cue["format"]}
        return metrics | ({"eval/accuracy": questions["accuracy"]} if questions else {})

    return evaluate_step


# ---------------------------------------------------------------- curve.png


def panel(title: str, points: list[tuple[int, float]], window: int, last_step: int) -> Image.Image:
    """A metric over the steps: a dot for each (step, value), and a line of the means of `window` dots."""
    values = [value for _, value in points]
    top = max(1e-9, *values)

    def place(step: int, value: float) -> tuple[float, float]:
        return 120 + 680 * step / max(1, last_step), 400 - 380 * value / top

    # Twice as large as it is shown: halving it smooths lines and letters.
    block = Image.new("RGB", (840, 460), "white")
    draw = ImageDraw.Draw(block)
    for value in (0, top / 2, top):
        draw.line([place(0, value), place(max(1, last_step), value)], "#dcdcdc", 2)
        draw.text((108, place(0, value)[1]), f"{value:.2g}", "black", font_size=26, anchor="rm")
    for x, text in ((120, "0"), (460, "step"), (800, str(last_step))):
        draw.text((x, 412), text, "black", font_size=26, anchor="ma")
    for point in points:
        draw.circle(place(*point), 4, "#a0a0a0")
    means = [mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    draw.line([place(step, value) for (step, _), value in zip(points, means)], BLUE, 6, joint="curve")
    return below([text_block(title, 420), block.reduce(2)])


def draw_curve(history: list[dict], path: Path) -> None:
    """curve.png of the metrics of a run; no file where it has no step yet."""
    panels = []
    for name, title in PANELS.items():
        # Of a step without a training pass, the entropy is written as 0.
        values = [(m["step"], m[name]) for m in history if name in m and (m[name] or name != "entropy")]
        if points := [(step, value) for step, value in values if math.isfinite(value)]:
            panels.append(panel(title, points, 1 if name == "eval/iou" else 10, len(history) - 1))
    if panels:
        note = "Grey: one step. Blue: the mean of the last ten steps; on held-out cues, every evaluation."
        rows = [beside(panels[i : i + 3]) for i in range(0, len(panels), 3)]
        below([text_block(note, rows[0].width), *rows]).save(path)


# ---------------------------------------------------------------- learning.gif


def draw_frame(cues: list[Cue], first: dict, now: dict, num_closer: int) -> Image.Image:
    """The sheet of one evaluation: a row for each cue, with its crop, its image and its IoU."""
    title = f"Held-out cues 0 to 7: {num_closer} of the eight close in, that is, their IoU after the last "
    title += f"evaluation is above that at first, after {first['step'] + 1} steps. A row: crop, image, IoU."
    scores = f"After {now['step'] + 1} steps: mean IoU {mean(now['ious']):.3f} over {len(now['ious'])} cues"
    rows = [text_block(title, 480), legend(["ground truth", "prediction"]), text_block(scores, 480, 18)]
    for i, cue in enumerate(cues):
        boxes = [("prediction", now["boxes"][i]), ("ground truth", cue.box)]
        text = f"IoU {now['ious'][i] or 0.0:.2f}, at first {first['ious'][i] or 0.0:.2f}"
        blocks = [image_block(cue.crop, 84), image_block(cue.image, 160, boxes), text_block(text, 200)]
        rows.append(beside(blocks, 0.5))
    return below(rows)


def draw_learning(heldout_cues: Cues, evaluations: list[dict], path: Path) -> None:
    """learning.gif of the lines of evaluations.jsonl.

    It has a frame for each evaluation, or for 24 of them, evenly spread: so it stays below 1.5 MB.
    """
    cues, first, last = [heldout_cues[i] for i in range(8)], evaluations[0], evaluations[-1]
    num_closer = sum((b or 0.0) > (a or 0.0) for a, b in zip(first["ious"][:8], last["ious"]))
    shown = sorted({round(i * (len(evaluations) - 1) / (MOST_FRAMES - 1)) for i in range(MOST_FRAMES)})
    frames = [draw_frame(cues, first, evaluations[i], num_closer) for i in shown]
    # The same palette in all frames: pixels that do not change take no room then.
    palette = frames[-1].quantize(255)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [*[700] * (len(frames) - 1), 3000]  # in milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def draw_run(folder: Path, heldout_cues: Cues | None) -> None:
    """Draws curve.png and, of a run that was evaluated while it trained, learning.gif if there are cues."""
    draw_curve(read_lines(folder / "metrics.jsonl"), folder / "curve.png")
    if heldout_cues and (evaluations := read_lines(folder / "evaluations.jsonl")):
        draw_learning(heldout_cues, evaluations, folder / "learning.gif")
