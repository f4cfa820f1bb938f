"""The model card: its table is written from card.json, into the place that README.md has for it."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from files.errors import UserError
from tiny import card

MODEL = Path(card.__file__).with_name("model")


def test_the_table_of_the_card_is_that_of_card_json():
    readme = (MODEL / "README.md").read_text(encoding="utf-8")
    measured = json.loads((MODEL / "card.json").read_text(encoding="utf-8"))
    assert list(measured) == list(card.CARD_SCENES)
    assert card.MEASURED.search(readme)[0] == card.card_table(measured)


def test_a_card_is_measured_and_the_rest_of_the_readme_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "CARD_SCENES", {"4–8 things": ((4, 8), False)})
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    card.write_card(str(folder), 2)
    old, new = ((path / "README.md").read_text(encoding="utf-8") for path in (MODEL, folder))
    assert card.MEASURED.sub("", old) == card.MEASURED.sub("", new) and "n = 2; held-out scenes." in new
    assert json.loads((folder / "card.json").read_text(encoding="utf-8"))["4–8 things"]["questions"]["n"] == 4


def test_a_readme_without_a_place_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# A model")
    with pytest.raises(UserError, match="no place for the table"):
        card.write_card(str(tmp_path), 2)


def test_no_samples_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["card.py", "--n", "0"])
    with pytest.raises(SystemExit) as stopped:
        card.main()
    assert stopped.value.code == 2 and "--n 0" in capsys.readouterr().err
