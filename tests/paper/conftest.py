"""A folder of drawn rows for the tests of verdicts and of the report."""

from pathlib import Path

import pytest
from drawn_rows import draw_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_rows(tmp_path)
    return tmp_path
