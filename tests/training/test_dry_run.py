"""The memory of a run: predicted without a GPU, judged by what is reserved on one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from random_models import prompts, random_policy, with_adapter
from transformers import AutoConfig

import locus_mini
from policy import collate, token_logps
from prompts import FAMILIES
from training import memory
from training.dry_run import advise_16_bits, empty_model, predict, table
from training.settings import resolve

ROOT = Path(__file__).parents[2]

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
    (last,) = (line for line in lines if line.startswith("The predicted peak"))
    assert "8 GB" in last and "--micro-batch" in last


def test_the_table_compares_with_what_was_measured():
    predicted = {"loading": {"weights": 7 * 10**9}, "rollout": {"weights": 7 * 10**9, "cache": 10**6}}
    lines = table(predicted, {"loading": 8 * 10**9, "reserved": 8.5 * 10**9}).splitlines()
    assert lines[0].startswith("Measured")
    assert lines[2].split()[:3] == ["loading", "7.00", "8.00"]
    assert lines[3].split() == ["rollout", "7.00", "-", "weights", "7.00"], (
        "memory ran out before the rollout"
    )
    assert "8.50 GB" in lines[4] and "12 GB" in lines[4] and "--load-in-4bit" in lines[4]


def test_a_card_is_judged_by_reserved_memory_and_the_flag_by_the_largest_phase():
    predicted = {"loading": {"weights": 7 * 10**9}, "rollout": {"weights": 7 * 10**9, "cache": 10**9}}
    allocated = {"loading": 7 * 10**9, "rollout": 8 * 10**9}
    for reserved, card in ((11.3, "12 GB"), (11.5, "16 GB"), (90, "no single card")):
        last = table(predicted, allocated | {"reserved": int(reserved * 10**9)}).splitlines()[-1]
        assert card in last and f"{reserved:.2f} GB" in last and "--rollout-batch" in last


class Meter:
    """Stands for torch.cuda: an allocator that takes memory in steps of 100 and gives nothing back."""

    def __init__(self) -> None:
        self.allocated = self.peak = self.reserved = 0

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, -(-self.allocated // 100) * 100)

    def synchronize(self) -> None:
        """Nothing is in flight."""

    def max_memory_allocated(self) -> int:
        return self.peak

    def max_memory_reserved(self) -> int:
        return self.reserved

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated


def test_phases_are_measured_by_what_they_allocate_and_the_run_by_what_is_reserved(monkeypatch):
    meter, peaks = Meter(), {}
    monkeypatch.setattr(memory, "METER", meter)
    monkeypatch.setattr(memory, "PEAKS", peaks)
    with memory.phase("rollout"):
        meter.allocate(250)
        meter.allocate(-200)
    with memory.phase("policy pass"):
        meter.allocate(70)
        with memory.phase("optimizer"):
            meter.allocate(60)
            meter.allocate(-60)
    assert peaks == {"rollout": 250, "policy pass": 120, "optimizer": 180, "reserved": 300}


ON_IMPORT = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
            sys.exit()

sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", ["locus_mini.py --dry-run", "eval.py scenes"])
@pytest.mark.parametrize("given", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_set_before_torch_is_imported_unless_the_user_has(program, given):
    script, *flags = program.split()
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {given: "max_split_size_mb:64"} if given else {}
    command = [sys.executable, "-c", ON_IMPORT, str(ROOT / script), *flags]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    expected = {"": "expandable_segments:True None", names[0]: "max_split_size_mb:64 None"}
    assert done.stdout.strip() == expected.get(given, "None max_split_size_mb:64"), done.stderr


@pytest.mark.parametrize(
    ("flags", "card", "fits"),
    [
        ({}, 24e9, True),
        ({}, 19e9, False),
        ({"load_in_4bit": True}, 24e9, False),
        ({"cpu": True}, 24e9, False),
    ],
)
def test_16_bits_are_advised_where_they_fit_and_4_bits_are_not_asked_for(
    flags, card, fits, monkeypatch, capsys
):
    """7B at 307,200 pixels: 19.5 GB, and 0.6 for CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=card))
    name = str(families.FOLDER / "Qwen2.5-VL-7B-Instruct")
    advise_16_bits({"model": name, "image_pixels": 307_200} | flags)
    printed = capsys.readouterr().out
    assert printed.startswith("--no-load-in-4bit would fit this GPU (peak 19.54 GB, predicted)") == fits
    assert printed.count("\n") == fits and ("not measured" in printed) == fits


def test_without_checkpointing_every_layer_keeps_a_mask_of_its_own_and_the_prediction_counts_them():
    """What a pass in 16 bit keeps of the mask's size, against the part of the formula that grows with L²."""
    layers, G, T = 3, 4, 20
    policy = with_adapter(random_policy("qwen2_5_vl", layers=layers))
    policy.base_model.to(torch.bfloat16)
    batch = collate(policy, prompts(policy, 1))
    tokens = torch.arange(30, 30 + G * T).view(1, G, T)
    L, masks = batch.input_ids.shape[1] + G * T, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (L, L):
            masks[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logps(policy, batch, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert sum(masks.values()) == layers * 2 * L**2
    config = AutoConfig.from_pretrained(families.FOLDER / "Qwen2.5-VL-7B-Instruct")
    model, family = empty_model(config), FAMILIES["qwen2_5_vl"]
    inputs = []  # of the layers, at evenly spaced lengths: the second difference is that of the L² part
    for max_new_tokens in (100, 200, 300):
        flags = {"max_new_tokens": max_new_tokens, "num_generations": G, "gradient_checkpointing": False}
        inputs.append(predict(model, resolve(flags, family)[0], family)["policy pass"]["layers' inputs"])
    assert (
        inputs[2] - 2 * inputs[1] + inputs[0]
        == config.get_text_config().num_hidden_layers * 2 * 2 * (100 * G) ** 2
    )
