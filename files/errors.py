"""The error for bad input, how a program ends on it, and checks of the paths that flags name."""

import argparse
import difflib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

# bitsandbytes reports an optional CPU kernel as missing on every start; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class UserError(Exception):
    """Bad input: one sentence that names the file, the value and the remedy. Programs exit with code 2."""


def require_file(flag: str, path: Path | None, folder: bool = False) -> None:
    """UserError unless the file (or the folder) that a flag names exists; None passes."""
    if path is not None and not (path.is_dir() if folder else path.exists()):
        raise UserError(f"{flag} {path}: no such {'folder' if folder else 'file'}: check the path.")


def model_folder(name: str) -> str:
    """The folder that --model names (`tiny`: the embedded model's), or its hub id; UserError otherwise."""
    folder = Path(__file__).resolve().parents[1] / "tiny" / "model" if name == "tiny" else Path(name)
    if not folder.is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise UserError(f"--model {name} is no folder: give tiny, a model folder or an id like Qwen/NAME.")
    return str(folder) if folder.is_dir() else name


@contextmanager
def exit_on_error(remedy: str = "check the path and the disk", stopped: str = "") -> Iterator[None]:
    """Turns the errors that a user can fix into one sentence on stderr and exit code 2, Ctrl-C into code 130.

    remedy: what to do about a file that cannot be read or written. stopped: the sentence after Ctrl-C, if
    the same command does not continue.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(stopped or "Stopped. Run the same command again to continue.", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            problem = f"cannot be read or written ({error.strerror or error})"
            error = UserError(f"{error.filename or 'A file'} {problem}: {remedy}.")
        print(error, file=sys.stderr)
        sys.exit(2)


def one_or_more(text: str) -> int:
    """The type of a flag that counts samples or the like: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of 1 or more: give one.")
    return int(text)


class FlagParser(argparse.ArgumentParser):
    """argparse without abbreviated flags; for an unknown flag it suggests the most similar one.

    A wrong flag ends the program with one sentence, not with the whole usage: some programs have 40 flags.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2].split()
        unknown_flag = next((word.partition("=")[0] for word in words if word.startswith("--")), "")
        for similar_flag in difflib.get_close_matches(unknown_flag, self._option_string_actions, 1):
            message += f" (did you mean {similar_flag}?)"
        self.exit(2, f"{self.prog}: {message}\n")
