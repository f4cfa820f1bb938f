"""What engines that scale get: the reward by its path, and the loop's cues as files."""

import importlib.util
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import families
import pytest
import yaml
from jinja2 import Template
from PIL import Image
from test_data import Corpus, an_id, exif_6, noise
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
from data import CueConfig, encode_cue, open_cues
from files.errors import UserError
from prompts import FAMILIES, Processor, prompt_text
from reward import iou, parse_box, reward
from scale import export
from scale.export import EASYR1_PIXELS, QWEN, Target, easyr1_size, export_cues, find_target
from scale.rewards import box_reward, compute_score
from tiny import architecture
from training.settings import PRESETS

ROOT = Path(__file__).parents[2]
GOOD = "<think> left</think><answer>[10, 20, 50, 80]</answer>"

# ---------------------------------------------------------------- the reward, as engines call it


def test_easyr1_loads_the_reward_by_its_path():
    """As verl/workers/reward/function.py does: a module name of its own, the function by its name."""
    spec = importlib.util.spec_from_file_location("custom_reward_fn", ROOT / "scale" / "rewards.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_reward_fn"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["custom_reward_fn"]
    assert (module.REWARD_NAME, module.REWARD_TYPE) == ("locus", "batch")
    given = {"response": GOOD, "response_length": 17, "ground_truth": "[10, 20, 50, 60]"}
    (score,) = module.compute_score([given])
    assert {name: type(value) for name, value in score.items()} == dict.fromkeys(
        ("overall", "format", "accuracy"), float
    )
    assert score == pytest.approx({"overall": 0.7, "format": 1, "accuracy": 2 / 3})
    assert module.compute_score([]) == []
    assert module.compute_score([given], alpha=0.5)[0]["overall"] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_the_opening_that_the_template_wrote_counts():
    box, rest = "[10, 20, 50, 80]", GOOD.removeprefix("<think>")
    given = [{"response": rest, "response_length": 9, "ground_truth": box}]
    assert [compute_score(given, opening=start)[0]["format"] for start in ("", "<think>\n")] == [0, 1]
    assert box_reward([rest, rest], [box, box], opening=["", "<think>\n"]) == pytest.approx([0.9, 1])


def test_trl_gets_a_reward_for_plain_and_for_conversational_completions():
    plain = [GOOD, "nothing", "<answer>[0, 0, 5, 5]</answer>"]
    boxes = [[10.0, 20.0, 50.0, 60.0], [0, 0, 5, 5], [0, 0, 5.25, 5]]
    conversational = [[{"role": "assistant", "content": text}] for text in plain]
    in_parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in plain]
    expected = [reward(text, tuple(box)).total for text, box in zip(plain, boxes)]
    columns = {"box": boxes, "frame": [[1, 1, 1, 1]] * 3, "prompts": ["x"] * 3, "trainer_state": None}
    for completions in (plain, conversational, in_parts):
        assert box_reward(completions=completions, **columns) == expected
    assert expected[0] == pytest.approx(0.7) and expected[1] == 0


@pytest.mark.parametrize(
    "completion", [None, "", 7, [], {}, [None], [{}], [{"content": None}], "[" * 10**5, "\ud800"]
)
def test_no_completion_raises(completion):
    box = "[1, 2, 3, 4]"
    (score,) = compute_score([{"response": completion, "response_length": 0, "ground_truth": box}])
    assert score == {"overall": 0, "format": 0, "accuracy": 0}
    assert box_reward([completion], [box]) == [0]


@pytest.mark.parametrize(
    "truth", [None, "", "1234", "[1, 2, 3]", [4, 3, 2, 1], [1, 2, math.nan, 4], {}, "a box"]
)
def test_a_broken_ground_truth_is_named(truth):
    for call in (
        lambda: compute_score([{"response": GOOD, "response_length": 3, "ground_truth": truth}]),
        lambda: box_reward([GOOD], [truth]),
    ):
        with pytest.raises(ValueError, match="ground truth") as error:
            call()
        assert repr(truth) in str(error.value)


def test_rewards_and_boxes_must_be_as_many():
    with pytest.raises(ValueError):
        box_reward([GOOD, GOOD], [[1, 2, 3, 4]])


# ---------------------------------------------------------------- the export


def run(monkeypatch, *typed: object) -> int:
    """`python -m scale.export …` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["scale.export", *map(str, typed)])
    try:
        export.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def rows(out: Path, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.fixture
def coco(tmp_path) -> list[str]:
    """The flags of a small COCO of twelve pictures."""
    corpus = Corpus(tmp_path)
    for k in range(12):
        corpus.image(an_id(False, k), noise(640, 480, k))
        corpus.box(an_id(False, k), 40 * k, 30, 50, 44)
        corpus.box(an_id(False, k), 20 * k, 200, 90, 60)
    files = ["--annotations", corpus.file, "--images", corpus.images, "--exclude", tmp_path / "none.txt"]
    (tmp_path / "none.txt").write_text("")
    return ["--data", "coco", *map(str, files)]


def qwen_tools(kind: str) -> Processor:
    patch = 14 if kind == "qwen2_5_vl" else 16
    return Processor(
        architecture.build_tokenizer(),
        Qwen2VLImageProcessorPil(patch_size=patch),
        FAMILIES[kind],
        "<|image_pad|>",
    )


def test_easyr1_rows_hold_its_contract(tmp_path, monkeypatch, coco, capsys):
    out = tmp_path / "out"
    assert run(monkeypatch, out, "--format", "easyr1", "--frame", "resized", "--limit", 30, *coco) == 0
    assert "30 cues" in capsys.readouterr().out
    template = Template((out / "format.jinja").read_text().strip())
    assert (out / "images").is_symlink() and not (out / "turned").exists()
    found = rows(out)
    assert len(found) == 30
    for row in found:
        assert set(row) == {"problem", "images", "answer"}
        prompt = template.render(content=row["problem"])
        assert prompt.count("<image>") == len(row["images"]) == 2
        assert prompt.replace("<image>", "") == prompt_text(FAMILIES["qwen2_5_vl"], "cue")
        assert all((out / name).is_file() and not Path(name).is_absolute() for name in row["images"])
        box = parse_box(f"<answer>{row['answer']}</answer>")
        with Image.open(out / row["images"][0]) as full, Image.open(out / row["images"][1]) as crop:
            # 640 × 480 lies within EasyR1's limits, so the processor alone resizes it, to multiples of 28.
            assert full.size == (640, 480)
            x, y = 640 / 644, 480 / 476
            window = tuple(round(v) for v in (box[0] * x, box[1] * y, box[2] * x, box[3] * y))
            assert iou(window, (*window[:2], window[0] + crop.width, window[1] + crop.height)) > 0.9
        given = {"response": f"<think></think><answer>{row['answer']}</answer>", "response_length": 1}
        assert compute_score([given | {"ground_truth": row["answer"]}])[0]["overall"] == 1


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_trl_rows_are_the_cues_of_the_loop(tmp_path, monkeypatch, coco, kind):
    out, loop_processor = tmp_path / "out", qwen_tools(kind)
    frame = loop_processor.family.box_frame
    assert run(monkeypatch, out, "--format", "trl", "--frame", frame, "--limit", 6, "--seed", 3, *coco) == 0
    files = dict(zip(("annotations", "images", "exclude"), map(Path, coco[3::2])))
    cues = open_cues("coco", "train", 3, CueConfig(), expressions=None, **files)
    (low, high), processor = loop_processor.family.image_pixels, loop_processor.image_processor
    for i, row in enumerate(rows(out)):
        item = encode_cue(loop_processor, cues[i], "object")
        assert row["box"] == pytest.approx(item.frame.to_units(cues[i].box), abs=1e-5)
        assert row["frame"] == [item.frame.width, item.frame.height, item.frame.units_x, item.frame.units_y]
        (message,) = row["prompt"]
        assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
        assert message["content"][-1]["text"] == prompt_text(loop_processor.family, "cue")
        for name, picture in zip(row["images"], item.images):
            with Image.open(out / name) as image:  # TRL has one pair of limits, that of full images
                size = {"shortest_edge": low, "longest_edge": high}
                seen = processor(image.convert("RGB"), size=size, return_tensors="pt")
            assert (seen["image_grid_thw"][0] == picture.grid_thw).all()
            assert (seen["pixel_values"] - picture.pixel_values).abs().max() < 0.02  # a rounding to 8 bits


@pytest.mark.parametrize("frame", ["resized", "relative1000"])
def test_boxes_survive_what_the_engine_does_to_the_image(frame):
    """EasyR1's rule as written in its documentation, then the real processor; back through its grid."""
    kind, patch = ("qwen2_5_vl", 14) if frame == "resized" else ("qwen3_vl", 16)
    own = {"shortest_edge": 4 * patch**2, "longest_edge": 2**24}
    processor = Qwen2VLImageProcessorPil(patch_size=patch, size=own)
    rng, (low, high) = random.Random(0), EASYR1_PIXELS
    for i in range(60):
        width, height = (round(2 ** rng.uniform(6, 11.5)) for _ in range(2))
        shown = (width, height)
        if width * height > high:
            shown = [int(side * math.sqrt(high / (width * height))) for side in shown]
        if shown[0] * shown[1] < low:
            area = shown[0] * shown[1]
            shown = [int(side * math.sqrt(low / area)) for side in shown]
        assert easyr1_size(width, height, low, high) == tuple(shown)
        target = Target("easyr1", FAMILIES[kind], 2 * patch, tuple(own.values()), EASYR1_PIXELS)
        box_frame = target.frame(width, height)
        if i % 10 == 0:  # the real thing, on real pixels
            _, high_, wide = processor(Image.new("RGB", tuple(shown)), return_tensors="pt")["image_grid_thw"][
                0
            ]
            units = (1000, 1000) if frame == "relative1000" else (int(wide) * patch, int(high_) * patch)
            assert (box_frame.units_x, box_frame.units_y) == units
        w, h = 40 * width / box_frame.units_x, 40 * height / box_frame.units_y  # of 40 units
        if w > width or h > height:
            continue
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        box = (x, y, x + w, y + h)
        answer = parse_box(f"<answer>{box_frame.to_text(box)}</answer>")
        assert iou(box_frame.to_pixels(answer), box) > 0.95


@pytest.mark.parametrize("engine", ["easyr1", "trl"])
def test_an_interrupted_export_goes_on_to_the_same_files(tmp_path, monkeypatch, capsys, engine):
    complete, interrupted, flags = tmp_path / "whole", tmp_path / "cut", ["--format", engine, "--seed", 5]
    assert run(monkeypatch, complete, *flags, "--limit", 12) == 0
    assert run(monkeypatch, interrupted, *flags, "--limit", 7) == 0
    lines = (interrupted / "train.jsonl").read_bytes().splitlines(keepends=True)
    (interrupted / "train.jsonl").write_bytes(
        b"".join(lines[:5]) + lines[5][:40]
    )  # killed in the middle of row 5
    (interrupted / "crops" / "train-000005.png").write_bytes(b"half a crop")
    assert run(monkeypatch, interrupted, *flags, "--limit", 12) == 0
    assert contents(interrupted) == contents(complete)
    before = (interrupted / "train.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert run(monkeypatch, interrupted, *flags, "--limit", 12) == 0  # complete
    assert "complete: 12 cues" in capsys.readouterr().out
    assert (interrupted / "train.jsonl").stat().st_mtime_ns == before or contents(interrupted) == contents(
        complete
    )


def test_a_stop_while_rows_are_written_is_no_traceback(tmp_path, monkeypatch, capsys):
    drawn_indices = []

    def draw(self, index):
        drawn_indices.append(index)
        if index == 3:
            raise KeyboardInterrupt
        return drawn(self, index)

    drawn = data.Cues.__getitem__
    monkeypatch.setattr(data.Cues, "__getitem__", draw)
    assert run(monkeypatch, tmp_path / "out", "--format", "trl", "--limit", 9) == 130
    assert "same command" in capsys.readouterr().err and len(rows(tmp_path / "out")) == 3
    monkeypatch.setattr(data.Cues, "__getitem__", drawn)
    assert run(monkeypatch, tmp_path / "out", "--format", "trl", "--limit", 9) == 0
    assert len(rows(tmp_path / "out")) == 9


def test_both_splits_share_a_folder_and_no_scene(tmp_path, monkeypatch):
    for split in ("train", "heldout"):
        assert run(monkeypatch, tmp_path, "--format", "easyr1", "--limit", 5, "--split", split) == 0
    pictures = [
        (tmp_path / row["images"][0]).read_bytes() for s in ("train", "heldout") for row in rows(tmp_path, s)
    ]
    assert len(set(pictures)) == 10


def test_a_text_cue_has_one_image_and_one_tag(tmp_path, monkeypatch):
    words = {"easyr1": lambda row: row["problem"], "trl": lambda row: row["prompt"][0]["content"][-1]["text"]}
    for engine, text in words.items():
        out = tmp_path / engine
        assert run(monkeypatch, out, "--format", engine, "--source", "text", "--limit", 3) == 0
        assert [len(row["images"]) for row in rows(out)] == [1, 1, 1] and not (out / "crops").exists()
        assert all("Find the " in text(row) for row in rows(out))


def test_a_tag_in_a_description_takes_no_image(tmp_path, monkeypatch, coco):
    annotations = Path(coco[3])
    numbers = [row["id"] for row in json.loads(annotations.read_text())["annotations"]]
    (tmp_path / "texts.json").write_text(json.dumps([[str(n), "the <image> {{ 7 * 7 }}"] for n in numbers]))
    flags = ["--source", "text", "--frame", "resized", "--expressions", tmp_path / "texts.json", *coco]
    assert run(monkeypatch, tmp_path / "out", "--format", "easyr1", "--limit", 4, *flags) == 0
    template = Template((tmp_path / "out" / "format.jinja").read_text().strip())
    for row in rows(tmp_path / "out"):
        prompt = template.render(content=row["problem"])
        assert prompt.count("<image>") == 1 == len(row["images"]) and "{{ 7 * 7 }}" in prompt


def test_only_images_that_engines_would_show_otherwise_are_written_anew(tmp_path, monkeypatch):
    """EasyR1 never turns an image as EXIF says, `datasets` always does; a link will do for neither."""
    photos = tmp_path / "photos"
    photos.mkdir()
    turned = {}
    for k in range(12):
        turned[name := f"{k}.png"] = k % 2
        noise(300, 200, k).save(photos / name, **(exif_6() if k % 2 else {}))
    out = tmp_path / "out"
    assert run(monkeypatch, out, "--format", "trl", "--data", photos, "--limit", 30) == 0
    cues = open_cues(str(photos), "train", 0, CueConfig())
    seen = set()
    for i, row in enumerate(rows(out)):
        cue, name = cues[i], row["images"][0]
        assert name == (f"turned/train-{i:06}.png" if turned[cue.name] else f"images/{cue.name}")
        with Image.open(out / name) as image:
            assert image.getexif().get(0x0112, 1) == 1
            assert image.convert("RGB").tobytes() == cue.image.tobytes()
        seen.add(turned[cue.name])
    assert seen == {0, 1}


WRONG = {  # what is typed behind an export of 2 cues for TRL, and what the sentence must name
    "OUT --format easyr1": "engine",
    "OUT --format trl --seed 1": "seed",
    "OUT --format trl --tiny-ratio 0.5": "tiny_ratio",
    "OUT --format trl --pixels 4096 9216": "pixels",
    "OUT --format trl --frame resized": "cell",
    "OUT --format trl --data PHOTOS": "OUT",
    "NEW --format trl --limit 0": "--limit: 0",
    "NEW --format trl --pixels 9 4": "--pixels 9 4",
    "NEW --format trl --model nowhere": "--model nowhere",
    "NEW --format trl --model PHOTOS": "--model",
    "NEW --format trl --data nowhere": "--data nowhere",
    "PHOTOS/new --format trl --data PHOTOS": "PHOTOS",
    "FILE --format trl": "FILE",
    "OTHER --format trl": "OTHER",
    "DAMAGED --format trl": "DAMAGED",
}


@pytest.mark.parametrize(("typed", "says"), WRONG.items())
def test_wrong_use_is_one_sentence_and_changes_nothing(tmp_path, monkeypatch, capsys, typed, says):
    places = {name: tmp_path / name.lower() for name in ("OUT", "NEW", "PHOTOS", "FILE", "OTHER", "DAMAGED")}
    flags = {"source": "object", "tiny_ratio": 0.7} | dict.fromkeys(NONE)
    export_cues(places["OUT"], "trl", "train", 2, "scenes", 0, **flags)
    for name in ("PHOTOS", "OTHER", "DAMAGED"):
        places[name].mkdir()
    for k in range(30):
        noise(64, 64, k).save(places["PHOTOS"] / f"{k}.png")
    places["FILE"].write_text("a file")
    (places["OTHER"] / "train.jsonl").write_text('{"mine": 1}\n')
    (places["DAMAGED"] / "train.settings.json").write_text("[")
    before = contents(tmp_path)
    capsys.readouterr()
    for name, place in places.items():
        typed, says = typed.replace(name, str(place)), says.replace(name, str(place))
    assert run(monkeypatch, *typed.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err, err
    assert contents(tmp_path) == before | {k: v for k, v in contents(tmp_path).items() if k.endswith("lock")}


NONE = ("model", "frame", "pixels", "annotations", "images", "exclude", "expressions")


def test_an_image_too_narrow_for_the_engine_is_one_sentence():
    target = Target("easyr1", FAMILIES["qwen2_5_vl"], 28, (56**2, 3584**2), EASYR1_PIXELS)
    assert target.frame(200, 200).units_x == 504
    with pytest.raises(UserError, match="too narrow"):
        target.frame(16, 3200)
    assert replace(target, engine="trl", pixels=(56**2, 980**2)).frame(200, 200).units_x == 196


@pytest.mark.parametrize("name", families.PARAMETERS)
def test_published_models_are_known_by_their_small_files(tmp_path, monkeypatch, name):
    """Without their weights. Limits and cell are those of --frame; the template's opening is rewarded."""
    folder = families.settings(name, tmp_path / name)
    target = find_target("easyr1", str(folder), None, None)
    assert (target.cell, target.own) == QWEN[target.family.box_frame][1:]
    flags = ["--format", "trl", "--limit", "2", "--model", folder]
    assert run(monkeypatch, tmp_path / "out", *flags) == 0
    row = rows(tmp_path / "out")[0]
    thinks = name.endswith("Thinking")
    assert row["opening"] == ("<think>\n" if thinks else "")
    completion = f"found</think><answer>{row['box']}</answer>"
    columns = {"box": [row["box"]], "opening": [row["opening"]]}
    assert box_reward([completion], **columns) == pytest.approx([1.0 if thinks else 0.9])


# ---------------------------------------------------------------- the files in scale/


def test_the_yaml_for_easyr1_has_the_papers_values():
    """Table 8 and PAPER §4; the export's boxes are for the limits that stand here."""
    found = yaml.safe_load((ROOT / "scale" / "easyr1.yaml").read_text(encoding="utf-8"))
    assert (found["data"]["min_pixels"], found["data"]["max_pixels"]) == EASYR1_PIXELS
    keys = {"prompt_key": "problem", "answer_key": "answer", "image_key": "images"}
    assert keys.items() <= found["data"].items() and found["data"]["rollout_batch_size"] == 512
    algorithm = {"adv_estimator": "grpo", "use_kl_loss": True, "kl_penalty": "low_var_kl", "kl_coef": 0.01}
    assert found["algorithm"] == algorithm | {"disable_kl": False}
    actor, sampled = found["worker"]["actor"], found["worker"]["rollout"]
    assert (actor["global_batch_size"], actor["max_grad_norm"]) == (128, 1.0)
    optimizer = {"lr": 1e-6, "weight_decay": 0.01, "strategy": "adamw", "lr_warmup_ratio": 0.05}
    assert actor["optim"] == optimizer
    assert [actor[f"clip_ratio_{name}"] for name in ("low", "high", "dual")] == [0.2, 0.3, 3.0]
    assert (sampled["n"], sampled["temperature"], sampled["top_p"], sampled["limit_images"]) == (
        8,
        1.0,
        1.0,
        2,
    )
    assert sampled["val_override_config"] == {"temperature": 0.6, "top_p": 0.95, "n": 1}
    path, _, name = found["worker"]["reward"]["reward_function"].rpartition(":")
    assert path.endswith("scale/rewards.py") and name == "compute_score"
    assert found["trainer"]["max_steps"] == PRESETS["paper"]["steps"] == 400, "of rollouts, in both"
    assert (found["trainer"]["nnodes"], found["trainer"]["n_gpus_per_node"]) == (2, 8)


def test_the_files_of_scale_are_short():
    for path in (ROOT / "scale").glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= (80 if path.name == "train_trl.py" else 260)
        assert max(map(len, lines)) <= 110
