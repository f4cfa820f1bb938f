"""Settings at their ends: out of range is one sentence, and relative paths become absolute."""

from pathlib import Path

import pytest

from files.errors import UserError
from prompts import FAMILIES
from training.settings import Config, absolute_paths, resolve

FAMILY = next(iter(FAMILIES.values()))
REFUSED = {
    "lr": (float("nan"), float("inf"), -1e-6, 1e9),
    "beta": (float("nan"), -0.1),
    "alpha": (float("nan"), 1.1),
    "max_grad_norm": (0.0, -1.0, float("nan")),
    "warmup": (-0.1, 1.1, float("nan")),
    "tiny_ratio": (float("nan"), 2.0),
    "weight_decay": (-1.0, float("inf")),
    "kl_limit": (float("nan"), -1.0),
    "clip_low": (-0.1, float("nan")),
    "importance_sampling_cap": (-1.0, float("nan")),
    "dual_clip": (0.5, float("nan")),
    "seed": (-1, 2**70),
    "steps": (-1,),
    "prompts": (0, -4),
    "num_generations": (0, 1),
    "updates": (0,),
    "iterations": (0,),
    "max_new_tokens": (0, -1),
    "image_pixels": (0, -1),
    "crop_pixels": (0, -1),
    "lora_rank": (0,),
    "save_every": (0,),
    "eval_cues": (0,),
    "show_every": (-1,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]])
def test_a_value_out_of_range_is_one_sentence(name, value):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(
        UserError, match=rf"{flag} \S+ is out of range: give a number from \S+ to \d+"
    ) as raised:
        resolve({name: value}, FAMILY)
    assert len(str(raised.value)) <= 400


@pytest.mark.parametrize(("name", "value"), [("lr", 0.0), ("steps", 0), ("beta", 0.0), ("warmup", 1.0)])
def test_an_end_that_means_something_is_accepted(name, value):
    assert getattr(resolve({name: value}, FAMILY)[0], name) == value


@pytest.mark.parametrize(("name", "meaning"), [("lr", "0: "), ("steps", "0: "), ("max_grad_norm", "above 0")])
def test_the_note_of_a_setting_says_what_its_end_means(name, meaning):
    assert meaning in Config.__dataclass_fields__[name].metadata["note"]


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "scenes", "photos"):
        Path(name).mkdir()
    Path("ids.txt").touch()
    flags = {"data": "photos", "model": "photos", "images": Path("photos"), "exclude": Path("ids.txt")}
    assert absolute_paths(flags) == {
        "data": str(tmp_path / "photos"),
        "model": str(tmp_path / "photos"),
        "images": tmp_path / "photos",
        "exclude": tmp_path / "ids.txt",
    }
    names = {"data": "scenes", "model": "tiny", "expressions": None, "lr": 0.1}
    assert absolute_paths(names) == names
    assert absolute_paths({"model": "Qwen/Qwen2.5-VL-3B-Instruct"}) == {
        "model": "Qwen/Qwen2.5-VL-3B-Instruct"
    }
