"""Programs in processes of their own, without the seconds of their imports: a server forks them after these.

So a test can kill a program or limit its files. test_program.py starts the programs as a user does.
"""

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from threading import Lock

CONTEXT = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
MAIN = "import locus_mini; locus_mini.main()"
EARLY = ThreadPoolExecutor(1)  # it runs one program after the other, beside the tests
LOCK = Lock()  # a process that starts asks after all others, and the exit code of one can be read only once


def start_server() -> None:
    """Starts the server. It imports the programs on the second core, while the first tests run."""
    if os.name != "nt":
        CONTEXT.set_forkserver_preload(["eval", "locus_mini"])
        forkserver.ensure_running()


@cache
def scratch() -> tempfile.TemporaryDirectory:
    """The folder of all programs, which is removed when the tests end."""
    return tempfile.TemporaryDirectory(prefix="locus-mini-tests-")


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=scratch().name))


def run_code(code: str, arguments: list[str], folder: Path, max_file_size: int | None) -> None:
    """What the process does: runs the code with its output in files of the folder."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    if max_file_size is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    sys.argv = ["locus_mini.py", *arguments]
    exec(compile(code, "the code of a test", "exec"), {"__name__": "__main__"})


class Program:
    """Python code that runs in a process of its own; by default it is the main program."""

    def __init__(self, *arguments: object, code: str = MAIN, max_file_size: int | None = None):
        self.folder = new_folder()
        words = [str(word) for word in arguments]
        self.process = CONTEXT.Process(target=run_code, args=(code, words, self.folder, max_file_size))
        with LOCK:
            self.process.start()

    def wait(self, timeout: float = 300) -> int | None:
        """The exit code, below 0 after a signal; None if it is still running."""
        connection.wait([self.process.sentinel], timeout)
        with LOCK:
            return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")


def stop() -> None:
    """Ends what still runs, and starts nothing that waits."""
    EARLY.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.kill()


def start_early(*arguments: object, code: str = MAIN, exit_code: int = 0) -> Future:
    """A program that is to end with this code; the result of the future is the program."""

    def run() -> Program:
        program = Program(*arguments, code=code)
        assert program.wait() == exit_code, program.stderr
        return program

    return EARLY.submit(run)
