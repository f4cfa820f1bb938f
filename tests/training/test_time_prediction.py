"""Hours of a run: the formula's closed forms, what a dry run prints of it, and two real steps."""

import re
import sys
import time
from math import ceil

import families
import pytest
import torch

import locus_mini
from models import add_lora, load_policy, read_family
from training import dry_run
from training.dry_run import (
    CALL_SECONDS,
    CARDS,
    FUSED_CALLS,
    LAYER_CALLS,
    empty_model,
    measure_hours,
    predict_hours,
    summary,
)
from training.settings import Config, resolve

QWEN_3B = str(families.FOLDER / "Qwen2.5-VL-3B-Instruct")
CONFIG, FAMILY = read_family(QWEN_3B)
MODEL = empty_model(CONFIG)


def settings(**flags) -> Config:
    return resolve({"image_pixels": 640 * 480, "data": "photos"} | flags, FAMILY)[0]


def hours(card: str = "RTX 4090", **flags) -> tuple[float, float]:
    return predict_hours(MODEL, settings(**flags), card)


def add_card(monkeypatch, bandwidth: float, tflops: float) -> str:
    monkeypatch.setitem(CARDS, "imaginary", (80, bandwidth, tflops))
    return "imaginary"


def test_an_infinitely_fast_gpu_still_waits_for_python(monkeypatch):
    """Every pass takes one layer time per layer: to read the prompts, to sample T tokens, and to train.

    Sampling in training has fused layers, whose time is a share of the others'.
    """
    card, layer = add_card(monkeypatch, 1e30, 1e30), 36 * LAYER_CALLS * CALL_SECONDS / 3600
    rollout = 1 + 100 * FUSED_CALLS / LAYER_CALLS
    flags = dict(steps=10, prompts=20, rollout_batch=16, micro_batch=3, max_new_tokens=100, eval_cues=30)
    training, evaluation = hours(card, **flags, beta=0.1)
    assert training == pytest.approx(10 * (2 * rollout + 7 * 4) * layer), "reference, policy, again, backward"
    assert evaluation == pytest.approx(ceil(2 * 30 / 32) * (1 + 100) * layer)
    assert hours(card, **flags, beta=0)[0] == pytest.approx(10 * (2 * rollout + 7 * 3) * layer), (
        "no reference"
    )
    plain = hours(card, **flags, beta=0, gradient_checkpointing=False)[0]
    assert plain == pytest.approx(10 * (2 * rollout + 7 * 2) * layer), "nothing runs again"
    four = hours(card, **flags, beta=0, updates=4)[0]  # of five prompts each, with a pass for π_old
    assert four == pytest.approx(10 * (2 * rollout + 4 * 2 * 4) * layer)
    # On scenes there are eight replies a cue before and after, and two for the baselines.
    scenes = hours(card, **flags, data="scenes")[1]
    assert scenes == pytest.approx(ceil(18 * 30 / 32) * 101 * layer)


def test_a_slow_memory_waits_for_the_bytes_of_weights_and_cache(monkeypatch):
    """In 4 bits a weight is half a byte; with over 64 tokens 4½ bytes, through a 16-bit copy."""
    monkeypatch.setattr(dry_run, "CALL_SECONDS", 0.0)
    card = add_card(monkeypatch, 1.0, 1e30)
    in_layers = 36 * (2048 * (2048 + 2 * 256) + 2048**2 + 3 * 2048 * 11008 + 2 * 2048 + 2048 + 2 * 256)
    in_head, column, prompt = 2 * 151_936 * 2048, 36 * 4 * 2 * 128, 128 + (640 * 480 + 112**2) // 28**2
    flags = dict(steps=1, prompts=8, rollout_batch=8, micro_batch=8, max_new_tokens=10, beta=0)
    flags |= dict(gradient_checkpointing=False)
    reading = 4.5 * in_layers + in_head + 8 * prompt * column
    passes = 2 * (4.5 * in_layers + in_head + 8 * (prompt + 8 * 5) * column)
    sampling = 10 * (0.5 * in_layers + in_head + 8 * (prompt + 8 * 5) * column)
    expected = (reading + sampling + passes) / 0.8e9 / 3600
    assert hours(card, **flags)[0] == pytest.approx(expected, rel=1e-3)
    nine = 10 * (4.5 * in_layers + in_head + 8 * (prompt + 9 * 5) * column)
    passes = 2 * (4.5 * in_layers + in_head + 8 * (prompt + 9 * 5) * column)
    expected = (reading + nine + passes) / 0.8e9 / 3600
    assert hours(card, **flags, num_generations=9)[0] == pytest.approx(expected, rel=1e-3), "72 tokens a pass"


def test_a_slow_processor_waits_for_products(monkeypatch):
    """2 FLOPs per weight and token: 16 prompts take twice as long as 8, and 7B longer than 3B by its size."""
    card = add_card(monkeypatch, 1e30, 1e-3)
    assert hours(card, prompts=16)[0] == pytest.approx(2 * hours(card, prompts=8)[0])
    config, _ = read_family(str(families.FOLDER / "Qwen2.5-VL-7B-Instruct"))
    larger = predict_hours(empty_model(config), settings(), card)[0]
    assert larger / hours(card)[0] == pytest.approx((6.53 + 0.54) / (2.77 + 0.31), rel=0.1)


@pytest.mark.parametrize("card", CARDS)
def test_what_makes_a_run_longer(card):
    training, evaluation = hours(card)
    assert evaluation > 0 and 0 < training < 20
    assert hours(card, steps=600) == pytest.approx((2 * training, evaluation))
    assert hours(card, eval_cues=1200) == pytest.approx((training, 2 * evaluation), rel=0.02), "whole batches"
    for flags in (dict(prompts=16), dict(max_new_tokens=512), dict(beta=0.01)):
        assert hours(card, **({"beta": 0.0} | flags))[0] > hours(card, beta=0.0)[0], flags
    for faster, slower in (("H100", "RTX 4090"), ("RTX 4090", "RTX 3090"), ("RTX 3090", "RTX 3060")):
        assert hours(faster, prompts=16)[0] < hours(slower, prompts=16)[0]


def test_a_dry_run_predicts_the_hours_of_cards_with_enough_memory(monkeypatch, capsys):
    flags = ["--dry-run", "--image-pixels", "307200", "--steps", "400", "--data", str(families.FOLDER)]
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", "--model", QWEN_3B, "--no-load-in-4bit", *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    locus_mini.main()
    out = capsys.readouterr().out
    assert "completions have 128 tokens on average" in out, "the assumed length"
    rows = re.findall(r"^(\w[\w ]*?) +(\d+) GB  .*, predicted$", out, re.MULTILINE)
    peak = float(re.search(r"The predicted peak is ([\d.]+) GB", out)[1])
    assert [name for name, _ in rows] == [name for name, card in CARDS.items() if card[0] >= peak + 0.6]
    assert ("RTX 4060", "8") not in rows and ("RTX 3090", "24") in rows, "3B takes 9 GB in 16 bits"
    training, evaluation = hours("RTX 3090", steps=400, load_in_4bit=False)
    assert summary(training, evaluation) in out


def test_hours_are_measured_on_real_cues_with_natural_stops(monkeypatch):
    """The second of two real steps of the embedded model counts, and so does an evaluation of two cues."""
    monkeypatch.setattr(dry_run, "default_batch_size", lambda policy: 2)
    policy = add_lora(load_policy("tiny", load_in_4bit=False), 2)
    flags = {"prompts": 2, "num_generations": 2, "eval_cues": 50_000, "steps": 50_000}
    cfg, _ = resolve(flags, policy.processor.family)
    recorded = []

    def recording_step(*args) -> tuple:
        recorded.append((args, locus_mini.train_step(*args)))
        return recorded[-1][1]

    started = time.monotonic()
    line = measure_hours(policy, cfg, recording_step, locus_mini.LOCUS)
    seconds = time.monotonic() - started - sum(result[0]["seconds"] for _, result in recorded)
    assert [args[3] for args, _ in recorded] == [0, 1]
    metrics, group = recorded[1][1]
    assert metrics["completions/mean_length"] < 40 == cfg.max_new_tokens, "they end by themselves"
    assert group.example.cue.scene is not None and group.example.index in (2, 3)
    assert f"{metrics['completions/mean_length']:.0f} tokens on average" in line
    training, evaluation = map(float, re.findall(r"(?:training|evaluation) ([\d.]+) h", line))
    assert training == pytest.approx(50_000 * metrics["seconds"] / 3600, abs=0.06)
    # Two cues took nearly all other seconds; the run evaluates 50,000 before training and again after it.
    assert 0.5 < evaluation * 3600 / (50_000 * seconds) < 1.01


def test_less_than_an_hour_is_in_minutes():
    assert summary(0.004, 0.5) == "31 min (training 1 min, evaluation 30 min), predicted"
    assert summary(12.04, 0.96) == "13.0 h (training 12.0 h, evaluation 1.0 h), predicted"
