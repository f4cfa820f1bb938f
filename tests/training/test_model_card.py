"""The model card of an adapter: what its head says to the hub, and code that runs as it stands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from programs import new_folder, start_early
from random_models import random_policy

from data import CueConfig, scene_cues
from evaluation.reply_cache import generate_replies
from evaluation.scores import ROWS
from models import load_adapter, load_policy
from prompts import encode
from training.experiment import QUESTION, write_model_card
from training.settings import resolve

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--steps",
    1,
    "--prompts",
    2,
    "--num-generations",
    3,
    "--eval-cues",
    2,
    "--max-new-tokens",
    24,
    "--lr",
    0.01,
]


def head_of(card: str) -> dict:
    """The YAML between the first two lines of dashes."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


EARLY = {}


def start_early_programs() -> None:
    EARLY["folder"] = new_folder() / "my-run"
    EARLY["run"] = start_early("--out", EARLY["folder"], *FLAGS)


@pytest.fixture(scope="module")
def run() -> Path:
    """The folder of a small run of the program."""
    (EARLY["folder"] / "printed.txt").write_text(EARLY["run"].result().stdout)
    return EARLY["folder"]


@pytest.fixture(scope="module")
def card(run) -> str:
    return (run / "adapter" / "README.md").read_text(encoding="utf-8")


def test_the_card_of_a_run_describes_it(run, card):
    """It replaces PEFT's own card. The embedded model is on no hub, so the head names no base model."""
    head = head_of(card)
    assert head == {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["grpo", "locus", "lora"],
    }
    assert "rank 16" in card and "`tiny/model`" in card and "`scenes`" in card and "float32" in card
    rows = dict(re.findall(r"^\| `--([\w-]+)` \| (.*) \|$", card, re.MULTILINE))
    assert rows["steps"] == "1 | flag" and rows["max-new-tokens"] == "24 | flag" and "out" not in rows
    assert rows["image-pixels"].endswith("| model family") and "seed" not in rows, "the seed is the default"
    titles = ROWS.keys() - {"  large windows"}  # held-out cues are tiny and small
    table = re.search(r"```\n(held-out.*?)\n```", card, re.DOTALL)[1]
    assert table in (run / "printed.txt").read_text() and all(title in table for title in titles)
    assert (run / "adapter" / "before_after.png").read_bytes() == (run / "before_after.png").read_bytes()
    assert "](before_after.png)" in card and "$" not in card


def test_the_card_names_no_folder_and_no_date(run, card):
    assert str(run.parent) not in card and str(ROOT) not in card and run.name not in card
    assert not re.search(r"\b20\d\d-\d\d|\d\d:\d\d", card)


def test_the_code_of_the_card_runs_as_it_stands(run, card, tmp_path):
    """In a folder with the adapter, the base model and an image; the reply is that of this project's code."""
    image = scene_cues(CueConfig(), "heldout", 5)[0].image
    image.save(tmp_path / "image.png")
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    (tmp_path / "adapter").symlink_to(run / "adapter")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "locus" not in code.lower(), "plain transformers and PEFT"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    policy = load_adapter(load_policy("tiny", load_in_4bit=False), run / "adapter")
    expected, _ = next(generate_replies(policy, [encode(policy.processor, QUESTION, image)], 24))
    assert done.stdout == f"{expected}\n"


def card_with(folder: Path, **flags: object) -> str:
    """The card of a run with these flags; only what a card reads is in its folder."""
    policy = random_policy("qwen2_5_vl")
    cfg, origin = resolve(flags, policy.processor.family)
    settings = vars(cfg) | {"origin": origin, "task": "locus"}
    (folder / "adapter").mkdir()
    (folder / "config.json").write_text(json.dumps(settings, default=str))
    (folder / "before_after.png").touch()
    write_model_card(folder, policy, "held-out")
    return (folder / "adapter" / "README.md").read_text(encoding="utf-8")


def test_a_hub_id_and_coco_are_in_the_head(tmp_path):
    files = dict(annotations=Path("/home/someone/instances.json"), images=Path("/home/someone/train2014"))
    model = "Qwen/Qwen2.5-VL-3B-Instruct"
    card = card_with(tmp_path, model=model, data="coco", preset="qlora", **files)
    assert head_of(card)["base_model"] == model and head_of(card)["datasets"] == ["coco"]
    assert f'base = "{model}"' in card and "someone" not in card
    assert (
        "| `--annotations` | instances.json | flag |" in card and "| `--lr` | 1e-05 | preset qlora |" in card
    )


def test_of_a_local_base_only_the_name_is_shown(tmp_path):
    (model := tmp_path / "someone" / "my-qwen").mkdir(parents=True)
    card = card_with(tmp_path, model=str(model), data=str(tmp_path))
    assert "base_model" not in head_of(card) and "datasets" not in head_of(card)
    assert 'base = "my-qwen"' in card and "someone" not in card and str(tmp_path) not in card
