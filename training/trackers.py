"""Trackers of experiments: TensorBoard and Weights & Biases, for --report-to.

Both get the keys of metrics.jsonl, which are TRL's names where TRL has them, and after each evaluation the
drawing of its boxes. A resumed run continues the same tracker run, in which no step comes twice. Neither
package is a requirement: without --report-to nothing here is imported.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from files.errors import UserError
from training.settings import Config


@contextmanager
def open_tracker(cfg: Config, folder: Path, first_step: int) -> Iterator[Callable[[dict], None]]:
    """A function that reports the metrics of a step to the tracker that the settings name, if any.

    first_step: the step with which the run starts or resumes. A killed run may have reported later ones:
    TensorBoard then shows only the new ones, and wandb only the old ones. UserError if wandb cannot start.
    """
    if cfg.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder / "tensorboard", purge_step=first_step) as writer:
            yield partial(report_to_tensorboard, writer, folder)
    elif cfg.report_to == "wandb":
        import wandb

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = {"project": os.environ.get("WANDB_PROJECT", "locus-mini"), "name": folder.name}
        try:
            run = wandb.init(id=config["tracker_run"], resume="allow", dir=folder, config=config, **names)
        except wandb.Error as error:
            problem = str(error).strip().partition("\n")[0]
            raise UserError(f"wandb cannot start ({problem}): log in, or set WANDB_MODE=offline.") from None
        with run:
            yield partial(report_to_wandb, run, folder)
    else:
        yield lambda metrics: None


def report_to_tensorboard(writer: Any, folder: Path, metrics: dict) -> None:
    """Writes the metrics of a step, and the drawing if it was evaluated, to the disk at once."""
    for name in metrics.keys() - {"step"}:
        writer.add_scalar(name, metrics[name], metrics["step"])
    if "eval/iou" in metrics:
        pixels = np.asarray(Image.open(folder / "evaluation.png"))  # [height, width, 3]
        writer.add_image("eval/boxes", pixels, metrics["step"], dataformats="HWC")
    writer.flush()


def report_to_wandb(run: Any, folder: Path, metrics: dict) -> None:
    """The same for Weights & Biases."""
    import wandb

    values = {name: metrics[name] for name in metrics.keys() - {"step"}}
    if "eval/iou" in metrics:
        values["eval/boxes"] = wandb.Image(str(folder / "evaluation.png"))
    run.log(values, step=metrics["step"])
