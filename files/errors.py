"""The one error for bad input, how programs end on it, and checks of what a command line names."""

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

STOPPED = "Stopped. The same command goes on from here."


class UserError(Exception):
    """Wrong use: one sentence that names the file, the value and the remedy; the programs exit with 2."""


def require_file(flag: str, path: Path | None, folder: bool = False) -> None:
    """UserError unless the file or folder that a flag names exists; None passes."""
    if path is not None and not (path.is_dir() if folder else path.exists()):
        raise UserError(f"{flag} {path}: no such {'folder' if folder else 'file'}.")


def model_folder(name: str) -> str:
    """The folder that --model names (`tiny` is the embedded model's), or a hub id as it is; or UserError."""
    folder = Path(__file__).resolve().parents[1] / "tiny" / "model" if name == "tiny" else Path(name)
    if not folder.is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise UserError(f"--model {name} is no folder: give tiny, a model folder or an id like Qwen/NAME.")
    return str(folder) if folder.is_dir() else name


@contextmanager
def exit_on_error(remedy: str = "", stopped: str = STOPPED) -> Iterator[None]:
    """Turns the errors of a program into one sentence on stderr: exit code 2, or 130 after Ctrl-C.

    remedy: what to do about a file that cannot be read or written; stopped: what Ctrl-C leaves.
    """
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        what = f"{error.filename or 'A file'} cannot be read or written ({error.strerror or error})"
        print(f"{what}{remedy and ': '}{remedy}.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)


class FlagParser(argparse.ArgumentParser):
    """argparse without abbreviated flags; an unknown flag names the known one that is nearest to it."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            message += f" (did you mean {near[0]}?)" if near else ""
        super().error(message)
