"""The folder of a run: whenever the run stops, --resume continues it as if it had not stopped.

inputs.json              size and date of each input file, before anything else
config.json              every setting
answers.jsonl            replies of the base model, later of the trained one, each as soon as it is generated
metrics.jsonl            one line per step
completions.jsonl        one group every --show-every steps, with the box and the reward of each completion
evaluations.jsonl        with --eval-every, one line per evaluation; evaluation.png shows the last one
adapter-best             with --eval-every, the adapter of the highest eval/iou, the earlier of two equal ones
tensorboard, wandb       with --report-to
checkpoints/step-NNNNNN  adapter and optimizer after N steps; the last two are kept
adapter with its model card, results.json, before_after.png, group.png, curve.png: at the end
learning.gif             at the end, with --eval-every
report.html              written by eval.py report, which draws curve.png and learning.gif again
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TextIO
from uuid import uuid4

import numpy as np
import peft
import torch
import transformers
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from files.coco import UNREADABLE, read_input
from files.disk import continue_lines, file_stats, fingerprint, read_json, read_lines, sync, write_json
from files.errors import UserError
from training.checks import step_warnings
from training.settings import MEMORY, Config, stored_flags

# ---------------------------------------------------------------- the folder and its settings


def new_folder(out: Path | None) -> Path:
    """Creates the folder of a new run: --out, or one under runs/. UserError if a run is in it already."""
    out = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if any((out / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints")):
        raise UserError(f"--out {out} already holds a run: give another folder, or --resume {out}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be created ({error.strerror}): give another folder.") from None
    return out


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Inside, no other process can lock the folder; the system drops the lock when the process ends."""
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"Another process is at work in {folder}: stop it, or wait until it ends.") from None


def write_config(folder: Path, stored: Any, cfg: Config, origin: dict, inputs: dict, files: Any = ()) -> dict:
    """Writes inputs.json and config.json of a new run; of a resumed run UserError if its inputs have changed.

    stored: config.json of a resumed run, else None; origin: of each setting; inputs: those of `fingerprints`;
    files: those of `input_files`. Returns the origins, of a resumed run the stored ones.
    """
    path, files_path = folder / "config.json", folder / "inputs.json"
    if stored is None:
        write_json(files_path, dict(files))
        tracker = {} if cfg.report_to == "none" else {"tracker_run": uuid4().hex[:8]}
        write_json(path, asdict(cfg) | inputs | {"origin": origin, "versions": versions()} | tracker)
        return origin
    change = read_input("resume", files_path, "inputs.json of a run", partial(first_change, new=files))
    require_same_settings(path, stored, inputs, change)
    return stored["origin"]


def resume_flags(folder: Path, flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of a run, and the flags to resume it: its own, and those of MEMORY that are given now.

    UserError for any other flag whose value differs from the run's.
    """
    path, overrides = folder / "config.json", {name: flags[name] for name in flags if name in MEMORY}

    def parse(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
        stored = json.loads(text)
        stored["origin"] |= dict.fromkeys(overrides, "flag")
        require_same_settings(path, stored, {name: flags[name] for name in flags if name not in MEMORY})
        return stored, stored_flags(stored) | overrides

    return read_input("resume", path, "config.json of a run", parse)


def command_of(task: str) -> str:
    """The command that starts a run of a task, and that resumes it."""
    return "python locus_mini.py" if task == "locus" else f"python -m paper.variants {task}"


def require_same_settings(path: Path, found: dict, wanted: dict, note: str = "") -> None:
    """UserError for the first setting in `wanted` that differs from the one found in the file `path`.

    note: which input file differs, if one does.
    """
    for name, value in wanted.items():
        if str(old := found.get(name)) != str(value):
            # A task is no flag: it has a command of its own.
            remedy = f"run {command_of(old)} --resume {path.parent}" if name == "task" else "give the same"
            raise UserError(f"{path} has {name} {old}, not {value}{note}: {remedy}, or start a new run.")


def first_change(text: str, new: dict[str, dict]) -> str:
    """The input file that was added, removed or changed, or "". text: inputs.json; new: of `input_files`."""
    old = json.loads(text)
    for path in old.keys() & new.keys():
        for name in sorted(dict(old[path].items() ^ new[path].items())):
            change = "was added" if name not in old[path] else "has changed"
            return f" ({path if name == '.' else name} {change if name in new[path] else 'was removed'})"
    return ""


def input_files(*paths: Path | None) -> dict[str, dict[str, str]]:
    """Size and date of each file in the inputs of a run, by path and name, for inputs.json."""
    existing = [path for path in paths if path and path.exists() and str(path) not in ("scenes", "coco")]
    return {str(path): {name: s.decode() for name, s in file_stats(path).items()} for path in existing}


def fingerprints(model: torch.nn.Module, files: dict[str, dict[str, str]]) -> dict[str, str]:
    """The inputs of a run, for config.json: fingerprints of the weights and of each of `input_files`."""
    prints = {f"{path} as of": fingerprint(map(str.encode, stats.values())) for path, stats in files.items()}
    # About 64 values of each weight.
    samples = (p.detach().flatten()[:: max(1, p.numel() // 64)].contiguous() for p in model.parameters())
    weights = fingerprint(sample.view(torch.uint8).cpu().numpy().tobytes() for sample in samples)
    return {"weights": weights} | prints


def versions() -> dict[str, str]:
    """Versions of Python, the libraries and this project (its commit), to repeat a run."""
    git = ["git", "-C", str(Path(__file__).parents[1]), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    modules = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    return modules | {"python": sys.version.split()[0], "commit": commit or "unknown"}


# ---------------------------------------------------------------- checkpoints


def checksums(folder: Path) -> dict[str, str]:
    """Checksums of the files that hold tensors, by name."""
    files = (*folder.glob("*.safetensors"), *folder.glob("*.pt"))
    return {path.name: fingerprint([path.read_bytes()]) for path in files}


def save_adapter(model: peft.PeftModel, folder: Path, optimizer: Any = None, state: Any = None) -> None:
    """Writes an adapter folder in PEFT's format; a checkpoint also has the optimizer and its state.json.

    The folder is complete or does not exist. UserError if it cannot be written, mostly on a full disk; then
    an older folder of the same name stays.
    """
    new = folder.with_name(f"{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)  # a kill may have left one
        model.save_pretrained(new)
        if optimizer is not None:
            torch.save(optimizer.state_dict(), new / "optimizer.pt")
            write_json(new / "state.json", state | checksums(new))
        # The files must be on the disk before their folder gets its name.
        for path in (*new.iterdir(), new):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({error!r:.99}): make room and use --resume.") from None


def save_checkpoint(
    folder: Path, step: int, model: peft.PeftModel, optimizer: Any, state: dict, is_best: bool = False
) -> None:
    """Saves adapter and optimizer after `step` steps of the run that `state` describes; keeps two.

    The metrics reach the disk before the checkpoint: resuming needs a line for each of its steps.

    is_best: the adapter becomes adapter-best too, after the checkpoint, so that there is always a checkpoint
    that knows it. If a kill comes between the two, `load_checkpoint` makes up for it.
    """
    sync(folder / "metrics.jsonl")
    state = state | {"step": step, "is_best": is_best}
    save_adapter(model, folder / "checkpoints" / f"step-{step:06}", optimizer, state)
    if is_best:
        save_adapter(model, folder / "adapter-best")
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("checkpoints/step-*") if path.suffix != ".new")


def load_checkpoint(folder: Path, model: peft.PeftModel, optimizer: Any, state: dict) -> int:
    """Loads the last checkpoint into model and optimizer; returns its step, 0 without one.

    UserError if the checkpoint is damaged, or of a run that `state` does not describe.
    """
    for incomplete in folder.glob("checkpoints/*.new"):  # left by a kill
        shutil.rmtree(incomplete, ignore_errors=True)
    if (last := max(checkpoints(folder), default=None)) is None:
        return 0
    try:
        saved = read_json(last / "state.json")
        require_same_settings(last, saved, state)
        if changed := [name for name, checksum in checksums(last).items() if saved[name] != checksum]:
            raise ValueError(f"{changed[0]} is not as it was written")
        weights = load_file(last / "adapter_model.safetensors")
        # weights_only: any other pickle could run code.
        moments = torch.load(last / "optimizer.pt", weights_only=True, map_location="cpu")
    except (*UNREADABLE, OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise UserError(f"{last} is damaged ({error!r:.99}): delete it to use the one before.") from None
    peft.set_peft_model_state_dict(model, weights)
    optimizer.load_state_dict(moments)
    if saved.get("is_best"):
        save_adapter(model, folder / "adapter-best")
    return saved["step"]


# ---------------------------------------------------------------- metrics


def open_lines(path: Path, steps: range) -> tuple[TextIO, list[dict]]:
    """A file of one JSON object a step, open to continue after `steps`, and the objects of these steps.

    Later lines are cut off: their steps come after the last checkpoint, so they are repeated, and a kill can
    tear the last line.
    """
    try:
        history = read_lines(path, len(steps))
        if [metrics["step"] for metrics in history] != list(steps):
            raise ValueError
    except UNREADABLE:
        raise UserError(f"{path} lacks some of the first {steps.stop} steps: start a new run.") from None
    return continue_lines(path, len(steps)), history


def write_line(path: Path, earlier_steps: range, line: dict) -> None:
    """Adds the line of a step, on the disk before its checkpoint: resuming needs it. See `open_lines`."""
    log, _ = open_lines(path, earlier_steps)
    with log:
        log.write(json.dumps(line) + "\n")
    sync(path)


def has_best_score(history: list[dict]) -> bool:
    """Whether the last step of a run has been evaluated, with a higher eval/iou than all steps before it."""
    scores = [metrics.get("eval/iou", -1.0) for metrics in history]
    return scores[-1] > max(scores[:-1], default=-1.0)


def log_step(log: TextIO, bar: tqdm, history: list[dict], group: Any, cfg: Config) -> None:
    """Writes the last metrics of the history to metrics.jsonl, and prints them with their warnings.

    group: the completions of one prompt; the first is printed every cfg.show_every steps.
    """
    metrics = history[-1]
    log.write(json.dumps(metrics) + "\n")
    names = ("reward", "iou", "format", "kl", "completions/mean_length", "seconds")
    bar.set_postfix({name.rpartition("/")[2]: f"{metrics[name]:.3g}" for name in names}, refresh=False)
    bar.update()
    for warning in step_warnings(history, cfg.kl_limit):
        bar.write(f"step {metrics['step']}: {warning}", file=sys.stderr)
    if cfg.show_every and metrics["step"] % cfg.show_every == 0:
        bar.write(f"step {metrics['step']}: {group.completions[0]!r}, reward {group.rewards[0].total:.2f}")


# ---------------------------------------------------------------- trackers, for --report-to

# Trackers get the keys of metrics.jsonl, which are TRL's names where TRL has them, and after each evaluation
# the drawing of its boxes. Their packages are no requirement: without --report-to none is imported.


@contextmanager
def open_tracker(cfg: Config, folder: Path, first_step: int) -> Iterator[Callable[[dict], None]]:
    """A function that reports the metrics of a step to the tracker that the settings name, if any.

    A resumed run continues the same tracker run, in which no step comes twice.

    first_step: the step with which the run starts or resumes. A killed run may have reported later ones:
    TensorBoard then shows only the new ones, and wandb only the old ones. UserError if wandb cannot start.
    """
    if cfg.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder / "tensorboard", purge_step=first_step) as writer:
            yield partial(report_to_tensorboard, writer, folder)
    elif cfg.report_to == "wandb":
        import wandb

        config = read_json(folder / "config.json")
        names = {"project": os.environ.get("WANDB_PROJECT", "locus-mini"), "name": folder.name}
        try:
            run = wandb.init(id=config["tracker_run"], resume="allow", dir=folder, config=config, **names)
        except wandb.Error as error:
            problem = f"--report-to wandb cannot start ({str(error).strip().splitlines()[0]})"
            raise UserError(f"{problem}: run wandb login, or set WANDB_MODE=offline.") from None
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


# ---------------------------------------------------------------- signals


def sigterm_as_keyboard_interrupt() -> ExitStack:
    """A context in which a SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    stack, previous = ExitStack(), signal.signal(signal.SIGTERM, signal.default_int_handler)
    stack.callback(signal.signal, signal.SIGTERM, previous)
    return stack


class Interruption(ExitStack):
    """A context in which Ctrl-C or SIGTERM fills `requested`, which is raised once the step is saved.

    A second signal ends the process at once.
    """

    requested: KeyboardInterrupt | None = None

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.callback(signal.signal, number, signal.signal(number, self.request))
        return self

    def request(self, number: int, frame: Any) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = KeyboardInterrupt()
        print("\nStopping after this step. Interrupt again to stop at once.", file=sys.stderr, flush=True)
