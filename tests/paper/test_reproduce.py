"""The rows of the protocol: what a row writes, its KL, bases and protocols that do not fit, attempts."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data import CueConfig, encode_cue, scene_cues
from evaluation.heldout import build_heldout_set
from files.errors import UserError
from models import add_lora, make_policy
from paper import reproduce, verdicts
from paper.variants import variant_flags
from policy import Policy, collate, token_logps
from prompts import FAMILIES, Processor
from tiny.architecture import build_image_processor, build_model, build_tokenizer
from tiny.scenes import KINDS, SIDES
from training.settings import resolve

ROOT = Path(__file__).parents[2]
MEASURED = {"held_out": 5, "n": 6, "twins": 6}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The folder of an untrained base."""
    torch.manual_seed(0)
    out, tokenizer = tmp_path_factory.mktemp("base"), build_tokenizer()
    model = build_model(tokenizer)
    model.config.locus_family, model.generation_config.do_sample = "tiny", False
    for part in (model, tokenizer, build_image_processor()):
        part.save_pretrained(out)
    return out


def small_row(base: Path, folder: Path, variant: str = "locus", steps: int = 1) -> reproduce.Row:
    flags = {"steps": steps, "seed": 3, "prompts": 2, "num_generations": 2}
    return reproduce.Row(str(base), variant, flags, MEASURED, folder / "run", folder / "row.json.gz", "abc")


def trained_and_reference(base: Path, size: float) -> tuple[Policy, list]:
    """A policy whose adapter is not 0, and prompts."""
    policy = add_lora(reproduce.load_policy(str(base)), 4)
    torch.manual_seed(1)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=size)
    cues = scene_cues(CueConfig(), "heldout", 1)
    return policy, [encode_cue(policy.processor, cues[i], "object") for i in range(3)]


def test_the_kl_is_exact_over_the_vocabulary(base):
    """The same sum from one-token completions: every token of the vocabulary, scored by token_logps."""
    policy, prompts = trained_and_reference(base, 0.05)
    found = reproduce.realised_kl(policy, prompts, 1)
    batch, vocabulary = collate(policy, prompts), (policy.logit_bias == 0).nonzero()[:, 0]
    tokens = vocabulary.expand(3, -1)[..., None]  # [3, V, 1]: V completions of one token
    with torch.no_grad():
        logps = token_logps(policy, batch, tokens, torch.ones_like(tokens, dtype=torch.bool))
        with policy.reference():
            reference = token_logps(policy, batch, tokens, torch.ones_like(tokens, dtype=torch.bool))
    expected = (logps.exp() * (logps - reference)).sum((1, 2)).mean().item()
    assert found == pytest.approx(expected, rel=1e-3) and found > 1e-4


def test_the_kl_is_zero_without_training_and_grows_with_the_adapter(base):
    values = []
    for size in (0.0, 0.02, 0.1):
        policy, prompts = trained_and_reference(base, size)
        values.append(reproduce.realised_kl(policy, prompts, 6))
        assert values[-1] == reproduce.realised_kl(policy, prompts, 6), "the completions are fixed"
    assert values[0] == 0 and 0 < values[1] < values[2]


def test_a_row_keeps_every_answer_and_is_not_run_again(base, tmp_path, monkeypatch):
    row = small_row(base, tmp_path)
    content = reproduce.run_row(row)
    samples = content["samples"]
    for kind in KINDS:
        assert [len(samples[f"questions_{kind}_{size}"]) for size in SIDES] == [6, 6, 6]
    assert len(samples["cue_tiny"]) + len(samples["cue_small"]) == 6
    assert len(samples["twins_swap_tiny"]) + len(samples.get("twins_swap_small", [])) == 6
    assert not [name for name in samples if name.startswith("suppressed")], "of the base alone"
    assert set(content["kl"]) == {"cue", "find", "questions", "all"} and len(content["curve"]) == 1
    assert verdicts.read_row(row.out, "abc") == json.loads(json.dumps(content))
    monkeypatch.setattr(reproduce, "train", None)
    assert reproduce.run_row(row) == json.loads(json.dumps(content))
    with pytest.raises(UserError, match="another protocol"):
        reproduce.run_row(replace(row, protocol="def"))


def test_the_base_is_a_row_of_no_steps_with_its_evidence_alone(base, tmp_path):
    content = reproduce.run_row(small_row(base, tmp_path, steps=0))
    assert content["kl"]["all"] == 0 and content["curve"] == []
    for kind in KINDS:
        for size in SIDES:
            assert len(content["samples"][f"suppressed_{kind}_{size}"]) == 6


def test_every_row_of_the_protocol_can_be_trained():
    protocol = verdicts.read_json(ROOT / "paper" / "protocol.json")
    for entry in protocol["rows"].values():
        flags = variant_flags(entry["variant"], {"steps": protocol["steps"]} | entry["flags"])
        cfg, _ = resolve(flags, FAMILIES["tiny"])
        assert cfg.beta == 0 if entry["variant"].startswith("sft") else cfg.beta > 0


def test_samples_of_every_claim_are_among_those_of_a_row(base, tmp_path):
    """Names of lists in the protocol, against those that a policy's evaluation gives."""
    tokenizer = build_tokenizer()
    processor = Processor(tokenizer, build_image_processor(), FAMILIES["tiny"], "")
    policy = make_policy(build_model(tokenizer).eval(), processor, torch.device("cpu"))
    held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 5), 6)
    names = set(reproduce.evaluate(policy, held, 2).samples)
    for claim in verdicts.read_json(ROOT / "paper" / "protocol.json")["claims"]:
        for metric in (claim["metric"], claim.get("other_metric", claim["metric"])):
            assert {f"{metric}_{size}" for size in claim["sizes"]} <= names, claim["title"]


def test_other_weights_than_the_protocols_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RUNS", tmp_path)
    protocol, out = reproduce.open_protocol({"A": str(base)}, quick=True)
    assert protocol["bases"] == {"A": verdicts.sha256(base / "model.safetensors")}
    assert out == tmp_path / "quick" and verdicts.read_json(out / "protocol.json") == protocol
    with pytest.raises(UserError, match="--base-a FOLDER"):
        reproduce.open_protocol({"A": str(base)}, quick=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--jobs 0", "--jobs: 0"),
        ("--base-b none", "none"),
        ("--base-c x", "--base-"),
        ("--quik", "--quik (did you mean --quick?)"),
        ("--variant sft", "without --attempt, unrecognized arguments: --variant"),
        ("--lr 1", "without --attempt, unrecognized arguments: --lr 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def short_protocol(tmp_path, monkeypatch) -> dict:
    """A protocol of three rows of one step, in a folder that takes the place of paper/."""
    protocol = verdicts.read_json(ROOT / "paper" / "protocol.json")
    protocol["rows"] = {name: protocol["rows"][name] for name in ("base", "LOCUS", "SFT, a quarter wrong")}
    protocol["claims"] = [c for c in protocol["claims"] if {c["row"], c["other"]} <= set(protocol["rows"])]
    protocol["measured"] = protocol["development"]["measured"] = MEASURED
    protocol |= {"steps": 1, "seeds": [31]}
    (tmp_path / "protocol.json").write_text(json.dumps(protocol))
    monkeypatch.setattr(verdicts, "HERE", tmp_path)
    monkeypatch.setattr(verdicts, "ATTEMPTS", tmp_path / "attempts.jsonl")
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    return protocol


def test_quick_rows_become_a_report_that_can_be_checked(base, tmp_path, short_protocol, monkeypatch, capsys):
    """The real command in processes of its own: rows, RESULTS.json, RESULTS.md, python -m paper.verdicts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # run_rows sets these, and monkeypatch restores them
    monkeypatch.setenv("TQDM_DISABLE", "1")
    command = ["reproduce.py", "--quick", "--base-a", str(base), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", command)
    reproduce.main()
    out = tmp_path / "runs" / "quick"
    assert len(list((out / "samples").iterdir())) == 3 and verdicts.check(out) == ""
    results = verdicts.read_json(out / "RESULTS.json")
    assert {claim["verdict"] for claim in results["claims"]} <= {"undecided", "no difference", "not testable"}
    assert not math.isnan(sum(claim.get("p", 0) for claim in results["claims"]))
    # None is run again (see above): run_row returns what its file holds.
    rows = reproduce.rows_of(verdicts.read_json(out / "protocol.json"), {"A": str(base)}, out)
    monkeypatch.setattr(reproduce, "train", None)
    assert [reproduce.run_row(row)["seconds"] for row in rows] == [
        verdicts.read_row(row.out, row.protocol)["seconds"] for row in rows
    ]


# ---------------------------------------------------------------- attempts


def test_an_attempt_is_a_line_with_its_figures(base, tmp_path, short_protocol, monkeypatch, capsys):
    flags = ["--variant", "random", "--prompts", "2", "--num-generations", "2", "--beta", "0.5"]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--attempt", "a try", "--base-a", str(base), *flags])
    reproduce.main()
    (line,) = map(json.loads, verdicts.ATTEMPTS.read_text().splitlines())
    assert line["note"] == "a try" and line["seeds"] == [0] and line["variant"] == "random"
    assert line["settings"] == {"steps": 1, "prompts": 2, "num_generations": 2, "beta": 0.5}
    assert line["base"] == verdicts.sha256(base / "model.safetensors")
    assert {"kl", "seconds", "commit"} <= line.keys()
    assert line["figures"]["cue_tiny"]["n"] + line["figures"]["cue_small"]["n"] == 6
    for kind in KINDS:
        assert {"before", "change", "error", "n"} == line["figures"][f"questions_{kind}_tiny"].keys()
    for name in ("twins_forced_tiny", "twins_right_tiny", "twins_named_detail_tiny", "named_detail_tiny"):
        assert name in line["figures"]


@pytest.mark.parametrize(
    "flags",
    ["--seed 31", "--out x", "--model tiny", "--dry-run", "--crop-pixels 9", "--images .", "--temperature 2"],
)
def test_an_attempt_stays_away_from_the_run_that_decides(flags, base, short_protocol, monkeypatch, capsys):
    command = ["reproduce.py", "--attempt", "x", "--base-a", str(base)]
    monkeypatch.setattr(sys, "argv", [*command, *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    assert stopped.value.code == 2 and flags.split()[0] in capsys.readouterr().err
    assert not verdicts.ATTEMPTS.exists()
