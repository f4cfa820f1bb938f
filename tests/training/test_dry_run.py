"""A dry run without a GPU says at once that it predicts, and prints nothing that is too small to see."""

import re
import sys

import pytest
import torch

import locus_mini
from training.dry_run import table

SMALLEST = ["--num-generations", "2", "--max-new-tokens", "2", "--micro-batch", "1", "--rollout-batch", "1"]


@pytest.mark.parametrize("flags", [[], SMALLEST])
def test_a_dry_run_of_the_embedded_model_prints_no_zeros(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", "--dry-run", *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    locus_mini.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Predicted, not measured")
    assert "policy pass" in [line[:14].rstrip() for line in lines], "the largest phase has a row"
    assert "loading" not in [line[:14].rstrip() for line in lines], "2.5 M weights are less than 0.01 GB"
    numbers = [float(number) for line in lines for number in re.findall(r"\d+\.\d+", line)]
    assert numbers and min(numbers) >= 0.01
    (last,) = (line for line in lines if line.startswith("The peak"))
    assert "8 GB" in last and "--micro-batch" in last


def test_the_table_compares_with_what_was_measured():
    predicted = {"loading": {"weights": 7 * 10**9}, "rollout": {"weights": 7 * 10**9, "cache": 10**6}}
    lines = table(predicted, {"loading": 8 * 10**9}).splitlines()
    assert lines[0].startswith("Measured")
    assert lines[2].split()[:3] == ["loading", "7.00", "8.00"]
    assert lines[3].split() == ["rollout", "7.00", "-", "weights", "7.00"], (
        "memory ran out before the rollout"
    )
    assert "8.00 GB" in lines[4] and "12 GB" in lines[4] and "--load-in-4bit" in lines[4]
