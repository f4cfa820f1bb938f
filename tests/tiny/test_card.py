"""The model card: its text is written from card.json, into the place that README.md has for it."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from files.disk import sha256
from files.errors import UserError
from tiny import card, scenes

MODEL = Path(card.__file__).with_name("model")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_text_of_the_card_is_that_of_card_json_and_of_these_weights():
    readme, measured = (MODEL / "README.md").read_text(encoding="utf-8"), read_json(MODEL / "card.json")
    assert card.MEASURED.search(readme)[0] == card.card_text(measured)
    assert list(measured["scores"]) == list(card.CARD_SCENES)
    assert measured["build"] == read_json(MODEL / "config.json")["locus_build"]
    assert measured["build"]["sha256"] == sha256(MODEL / "model.safetensors")
    assert measured["build"]["sha256"] in readme


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A copy of the model whose card has been measured on very little."""
    folder = tmp_path_factory.mktemp("card") / "model"
    shutil.copytree(MODEL, folder)
    card.write_card(str(folder), 3)
    return folder


def test_a_card_is_measured_and_the_rest_of_the_readme_stays(measured):
    old, new = ((path / "README.md").read_text(encoding="utf-8") for path in (MODEL, measured))
    assert card.MEASURED.sub("", old) == card.MEASURED.sub("", new) and "3 cues a row" in new
    for name, (fewest, most) in card.CARD_SCENES.items():
        scores = read_json(measured / "card.json")["scores"][name]
        assert scores["questions"]["n"] == scores["suppressed"]["n"] == 9 and scores["cue"]["n"] == 3
        assert all(fewest <= int(number) <= most for number in scores["questions"]["by_objects"])


def test_the_tables_show_every_kind_size_and_number_of_tokens(measured):
    """Each cell against card.json, found by the titles of its row and column."""
    content, text = read_json(measured / "card.json"), (measured / "README.md").read_text(encoding="utf-8")
    tables = [part for part in card.MEASURED.search(text)[0].split("\n\n") if part.startswith("|")]
    by_scene, by_tokens = ([line.strip("|").split("|") for line in t.splitlines()] for t in tables)
    assert len(by_scene) == 2 + 3 * (1 + len(scenes.SIDES))
    for i, (name, scores) in enumerate(content["scores"].items()):
        for j, size in enumerate(("", *scenes.SIDES)):
            title, *cells = by_scene[2 + 4 * i + j]
            assert title.strip() == (size or name)
            for k, kind in enumerate(scenes.KINDS):
                key = f"{kind}_{size}" if size else kind
                for task, cell in zip(("questions", "suppressed"), cells[2 * k : 2 * k + 2], strict=True):
                    assert float(cell) == round(100 * scores[task]["by_kind"][key]["accuracy"], 1)
            found = [scores["find"]["mean_iou"], scores["cue"]["mean_iou"]]
            assert size or list(map(float, cells[-2:])) == [round(100 * value, 1) for value in found]
    crowds = content["scores"]["8–12 objects"]
    for task, row in zip(("questions", "suppressed"), by_tokens[2:], strict=True):
        shown = dict(zip((cell.strip() for cell in by_tokens[0][1:]), map(float, row[1:]), strict=True))
        assert shown == {key: round(100 * v, 1) for key, v in crowds[task]["by_tokens"].items()}
    few = content["scores"]["1–4 objects"]["questions"]["by_kind"]
    for kind in scenes.KINDS:
        salient = (few[f"{kind}_small"]["accuracy"] + few[f"{kind}_large"]["accuracy"]) / 2
        assert f"{kind} {100 * salient:.1f}" in text


def test_other_weights_than_those_of_the_config_are_refused(measured, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(measured, folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not what config\.json tells about"):
        card.write_card(str(folder), 3)
    assert (folder / "card.json").read_bytes() == (measured / "card.json").read_bytes()


def test_a_readme_without_a_place_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# A model")
    with pytest.raises(UserError, match="no place for the tables"):
        card.write_card(str(tmp_path), 2)


def test_no_samples_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["card.py", "--n", "0"])
    with pytest.raises(SystemExit) as stopped:
        card.main()
    assert stopped.value.code == 2 and "--n: 0" in capsys.readouterr().err
