"""Settings at their ends: out of range is one sentence, and relative paths become absolute."""

from dataclasses import replace
from pathlib import Path

import pytest
from random_models import noise
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from files.errors import UserError
from prompts import FAMILIES, PROMPTS, process_image, prompt_text
from training.experiment import prepare
from training.settings import Config, absolute_paths, read_cue_prompt, read_flags, resolve

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
    "temperature": (0.0, -1.0, float("nan")),
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
    "crop_min_pixels": (0, -1),
    "lora_rank": (0,),
    "save_every": (0,),
    "eval_cues": (0,),
    "eval_every": (-1,),
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


def test_the_least_area_of_a_crop_is_the_familys_unless_a_flag_says_otherwise():
    family = FAMILIES["qwen2_5_vl"]
    default, origin = resolve({}, family)
    assert (default.crop_min_pixels, default.crop_pixels) == family.crop_pixels
    assert origin["crop_min_pixels"] == "model family"
    assert resolve({"crop_pixels": 5000}, family)[0].crop_min_pixels == 5000, "lowered with the other"
    assert resolve({"crop_min_pixels": 504**2}, family)[0].crop_min_pixels == 504**2
    with pytest.raises(UserError, match="Lower --crop-min-pixels 262144: --crop-pixels is 254016"):
        resolve({"crop_min_pixels": 512**2}, family)


def test_a_small_crop_is_enlarged_to_the_least_area():
    """To the framework's size, within the rounding to whole image tokens; the larger image stays as it is."""
    area = 504**2
    policy, _, _ = prepare({"image_pixels": 300_000, "crop_pixels": area, "crop_min_pixels": area})
    family = policy.processor.family
    assert (family.image_pixels, family.crop_pixels) == ((64**2, 300_000), (area, area))
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)
    for size in ((16, 16), (40, 30), (100, 300), (600, 700)):
        processed = process_image(processor, noise(size, 0), *family.crop_pixels)
        assert 0.9 * area < processed.grid_thw.prod() * 14**2 < 1.15 * area, size


def test_a_cue_prompt_is_read_and_its_placeholders_are_filled_in(tmp_path):
    path = tmp_path / "cue.txt"
    path.write_bytes(b'\xef\xbb\xbfWhere? Use {units} as {"bbox_2d": [x1, y1]}.\r\nBe brief.{think}\n\n')
    text = read_cue_prompt(path)
    assert text == 'Where? Use {units} as {"bbox_2d": [x1, y1]}.\nBe brief.{think}'
    for name, units in (("qwen2_5_vl", "pixel coordinates"), ("qwen3_vl", "coordinates from 0 to 1000")):
        family = replace(FAMILIES[name], cue_text=text)
        think = PROMPTS["paper"]["think"]
        expected = f'Where? Use {units} as {{"bbox_2d": [x1, y1]}}.\nBe brief.{think}'
        assert prompt_text(family, "cue") == expected
        for task in ("text", "name"):
            assert prompt_text(family, task, text="a cup") == prompt_text(FAMILIES[name], task, text="a cup")
    assert read_cue_prompt(None) == ""


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"Find {text}.", "contains {text}"),
        (b"Find it in {}.", "contains {}"),
        (b"<image><image>Find it.", "contains <image>"),
        (b"<|vision_start|>Find it.", "contains <|vision_start|>"),
        ("Où est-ce ?".encode("latin-1"), "give UTF-8 text"),
    ],
)
def test_a_cue_prompt_that_cannot_be_used_is_one_sentence(content, problem, tmp_path):
    (tmp_path / "cue.txt").write_bytes(content)
    for read in (read_cue_prompt, lambda path: read_flags("", ["--cue-prompt", str(path)])):
        with pytest.raises(UserError) as raised:
            read(tmp_path / "cue.txt")
        assert problem in str(raised.value) and "cue.txt" in str(raised.value)
        assert "{units} and {think}" in str(raised.value) and "\n" not in str(raised.value)


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "scenes", "photos"):
        Path(name).mkdir()
    Path("ids.txt").touch()
    flags = {"data": "photos", "model": "photos", "images": Path("photos"), "exclude": Path("ids.txt")}
    flags["cue_prompt"] = Path("ids.txt")
    assert absolute_paths(flags) == {
        "data": str(tmp_path / "photos"),
        "model": str(tmp_path / "photos"),
        "images": tmp_path / "photos",
        "exclude": tmp_path / "ids.txt",
        "cue_prompt": tmp_path / "ids.txt",
    }
    names = {"data": "scenes", "model": "tiny", "expressions": None, "lr": 0.1}
    assert absolute_paths(names) == names
    assert absolute_paths({"model": "Qwen/Qwen2.5-VL-3B-Instruct"}) == {
        "model": "Qwen/Qwen2.5-VL-3B-Instruct"
    }
