"""Fixtures of all tests. None of them reaches for a hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub fails at once
# On one thread models this small are no slower, and much faster where other programs want the cores. On
# several, a test that sets their number, as paper.reproduce does, changes the last digits of those after it.
os.environ["OMP_NUM_THREADS"] = "1"
# The server of tests/programs.py must not start CUDA when it asks for a GPU: its forks could not use it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import programs
import pytest
from random_models import KINDS, random_policy, with_adapter

from policy import Policy

programs.start_server()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts what several tests share and what takes long, so that it runs beside the first tests."""
    modules = dict.fromkeys(getattr(item, "module", None) for item in session.items)
    for module in modules if not session.config.option.collectonly else ():
        getattr(module, "start_early_programs", lambda: None)()


def pytest_sessionfinish() -> None:
    programs.stop()


@pytest.fixture(params=KINDS)
def policy(request) -> Policy:
    return with_adapter(random_policy(request.param))


# --doctest-modules is for the seven root files: the scripts beside the tests are not imported for it.
collect_ignore = ["bench_group.py", "bench_rollout.py", "bench_trl.py", "count_dispatches.py"]
collect_ignore += ["gpu_check.py", "kill_many.py", "names.py"]
