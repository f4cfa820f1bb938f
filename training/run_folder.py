"""A run folder that survives: stopped at whatever moment, `--resume` goes on as if it had not been.

config.json         every setting, written before anything else
answers.jsonl       what the base model answered, later the trained one, as soon as it did (journal.py)
metrics.jsonl       a line a step
checkpoints/step-N  adapter and optimizer after N steps; the last two
adapter, results.json, pictures: at the end
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from pickle import UnpicklingError
from shutil import which
from typing import Any, TextIO

import peft
import torch
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from files.disk import file_stats, fingerprint, sync, write_json
from files.errors import UserError
from training.checks import step_warnings
from training.settings import MEMORY, Config, stored_flags


class Stopped(KeyboardInterrupt):
    """The user stopped a run; what it has done is in its folder."""


# ---------------------------------------------------------------- files that are whole or not there


def checksums(folder: Path) -> dict[str, str]:
    """Of the files that hold tensors."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".pt")]
    return {path.name: fingerprint([path.read_bytes()]) for path in files}


def save_adapter(
    model: peft.PeftModel, folder: Path, optimizer: Any = None, state: dict | None = None
) -> None:
    """An adapter folder in PEFT's format, of a checkpoint with what training needs; whole or not there.

    UserError where it cannot be written, on a full disk above all; what was there before stays.
    """
    new = folder.with_name(f"{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
        new.mkdir(parents=True)
        model.save_pretrained(new)
        if optimizer is not None:
            torch.save(optimizer.state_dict(), new / "optimizer.pt")
            write_json(new / "state.json", state | checksums(new))
        for path in (*new.iterdir(), new):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        why = str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be written ({why}): make room, then go on with --resume.") from None


# ---------------------------------------------------------------- a run


def new_folder(out: Path | None) -> Path:
    """The run folder that was asked for, if it holds no run yet, or a new one under runs/."""
    out = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if any((out / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints")):
        raise UserError(
            f"--out {out} already holds a run: go on with --resume {out}, or give another folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): give another folder.") from None
    return out


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """One process at a time in a run folder; the lock goes with the process, however that ends."""
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"Another process is at work in {folder}: stop it, or wait for it.") from None


def read_config(folder: Path) -> dict[str, Any]:
    """What a run wrote before anything else: its settings by name, their origin, what it works on."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        names = [*(f.name for f in fields(Config)), "origin", "weights"]
        return config | {name: config[name] for name in names}
    except OSError:
        raise UserError(f"--resume {folder} holds no config.json: give the folder of a run.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not of a run of this program ({error!r}): begin a new run.") from None


def write_config(
    folder: Path, stored: dict[str, Any], cfg: Config, origin: dict[str, str], inputs: dict[str, str]
) -> dict[str, str]:
    """config.json of a new run; of a resumed one UserError if the inputs have changed. Returns the origins.

    inputs: what the run works on, by `fingerprints`; stored: the config.json of a resumed run, else empty.
    """
    if not stored:
        more = {"origin": origin, "versions": versions()}
        write_json(folder / "config.json", asdict(cfg) | inputs | more)
        return origin
    require_same_settings(folder / "config.json", stored, inputs)
    overridden = {name: "flag" for name in MEMORY if str(stored[name]) != str(getattr(cfg, name))}
    return stored["origin"] | overridden


def resume_flags(folder: Path, flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json of a run, and the flags that continue it: its own, and those about memory if given."""
    stored = read_config(folder)
    overrides = {name: value for name, value in flags.items() if name in MEMORY}
    require_same_settings(folder / "config.json", stored, {k: v for k, v in flags.items() if k not in MEMORY})
    return stored, stored_flags(stored) | overrides


def require_same_settings(where: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """UserError for the first setting in which a run and what it is to go on with differ."""
    for name in wanted:
        if str(found.get(name)) != str(wanted[name]):
            raise UserError(
                f"{where} was begun with {name} {found.get(name)}, not {wanted[name]}: resume it with the "
                "same, or begin a new run."
            )


def weight_samples(model: nn.Module) -> Iterator[bytes]:
    """64 numbers of each of a model's weights, for `fingerprint`."""
    for weight in (p.detach().flatten() for p in model.parameters()):
        sample = weight[:: max(1, len(weight) // 64)].contiguous().view(torch.uint8)
        yield sample.cpu().numpy().tobytes()


def fingerprints(model: nn.Module, *paths: Path | None) -> dict[str, str]:
    """What a run works on, for its config.json: the model's weights, and each file or folder that exists."""
    there = [path for path in paths if path and path.exists() and str(path) not in ("scenes", "coco")]
    weights = {"weights": fingerprint(weight_samples(model))}
    return weights | {f"{path} as of": fingerprint(file_stats(path)) for path in there}


def versions() -> dict[str, str]:
    """What one needs to know to run this again."""
    git = ["git", "-C", str(Path(__file__).parents[1]), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if which("git") else ""
    modules = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    return modules | {"python": platform.python_version(), "commit": commit or "unknown"}


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, step: int, model: peft.PeftModel, optimizer: Any, state: dict) -> None:
    """Adapter and optimizer after `step` steps of the run `state` describes; the last two are kept."""
    save_adapter(model, folder / "checkpoints" / f"step-{step:06}", optimizer, state | {"step": step})
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("checkpoints/step-*") if path.suffix != ".new")


def last_checkpoint_step(folder: Path, state: dict) -> int:
    """The step of a run's last checkpoint, 0 without one; UserError if it is of another run than `state`."""
    if not (found := checkpoints(folder)):
        return 0
    try:
        saved = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
        require_same_settings(found[-1], saved, state)
        return int(saved["step"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{found[-1]} is damaged ({error!r}): delete it to go on from the one before."
        ) from None


def load_checkpoint(folder: Path, model: peft.PeftModel, optimizer: Any, state: dict) -> int:
    """The last checkpoint into model and optimizer; returns its step, 0 where there is none yet."""
    for torn in folder.glob("checkpoints/*.new"):  # by a kill
        shutil.rmtree(torn, ignore_errors=True)
    if not (step := last_checkpoint_step(folder, state)):
        return 0
    last, device = checkpoints(folder)[-1], next(model.parameters()).device
    try:
        saved = json.loads((last / "state.json").read_text(encoding="utf-8"))
        if bad := [name for name, crc in checksums(last).items() if saved[name] != crc]:
            raise ValueError(f"{bad[0]} is not as it was written")
        peft.set_peft_model_state_dict(model, load_file(last / "adapter_model.safetensors", str(device)))
        moments = torch.load(last / "optimizer.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(moments)
        return step
    except torch.OutOfMemoryError:
        raise
    except (FileNotFoundError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{last} is damaged ({why}): delete it to go on from the one before.") from None


def open_metrics(folder: Path, steps: int) -> tuple[TextIO, list[dict]]:
    """metrics.jsonl to go on with after `steps` steps, and their lines.

    What was done after the last checkpoint is done again, and a kill can have torn the last line.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)[:steps] if path.exists() else []
    try:
        known = [json.loads(line) for line in lines]
        whole = [row["step"] for row in known] == list(range(steps))
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path} lacks some of the {steps} steps of the last checkpoint: begin a new run.")
    new = path.with_name("metrics.jsonl.new")
    new.write_bytes(b"".join(lines))
    sync(new)
    new.replace(path)
    return path.open("a", encoding="utf-8"), known


def log_step(log: TextIO, bar: tqdm, history: list[dict], group: Any, cfg: Config) -> None:
    """Writes the last step of the history to metrics.jsonl, and shows it with its warnings on the screen."""
    metrics = history[-1]
    log.write(json.dumps(metrics) + "\n")
    log.flush()
    names = ("reward", "iou", "format", "kl", "completions/mean_length", "seconds")
    bar.set_postfix({name.rpartition("/")[2]: f"{metrics[name]:.3g}" for name in names}, refresh=False)
    bar.update()
    for warning in step_warnings(history, cfg.kl_limit):
        bar.write(f"step {metrics['step']}: {warning}", file=sys.stderr)
    if cfg.show_every and metrics["step"] % cfg.show_every == 0:
        reward = group.rewards[0].total
        bar.write(f"step {metrics['step']}: {group.completions[0]!r}, reward {reward:.2f}")


@contextmanager
def sigterm_as_keyboard_interrupt() -> Iterator[None]:
    """Inside, a SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


class Interruption:
    """Inside, Ctrl-C or SIGTERM is only noted, so that a step can be finished; a second one stops at once."""

    def __enter__(self) -> "Interruption":
        self.requested = False
        self.usual = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: Any) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        print("\nThe step will be finished and saved; once more stops at once.", file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)
