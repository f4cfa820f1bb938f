"""The programs themselves, in small runs of the embedded model."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import eval as eval_module
import locus_mini
from data import CueConfig, scene_cues
from evaluation import heldout
from evaluation.reply_cache import generate_replies
from files.errors import UserError
from models import load_adapter, load_policy
from prompts import FAMILIES, encode
from tiny import scenes
from training.experiment import eval_commands
from training.run_folder import write_config
from training.settings import resolve

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "3", "--prompts", "4", "--num-generations", "8", "--eval-cues", "6", "--show-every", "2"]


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


RUNS = {}


def start_early_programs() -> None:
    RUNS["folder"] = folder = programs.new_folder()
    RUNS["first"] = programs.EARLY.submit(launch, "locus_mini.py", "--out", "first", *SMALL, cwd=folder)
    RUNS["again"] = programs.start_early("--out", folder / "again", *SMALL)


@pytest.fixture(scope="module")
def run() -> tuple[Path, subprocess.CompletedProcess]:
    """One small run of the main program, started from another folder as a user would."""
    done = RUNS["first"].result()
    assert done.returncode == 0, done.stderr
    return RUNS["folder"] / "first", done


def test_a_run_writes_the_files_that_the_readme_names(run):
    folder, done = run
    for name in ("config.json", "metrics.jsonl", "results.json", "before_after.png", "group.png"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert done.stdout.startswith("device: "), "up front"
    assert "self-check passed" in done.stdout and "cue search (IoU)" in done.stdout
    for kind in scenes.KINDS:
        assert all(f"  {kind} of {size} objects" in done.stdout for size in scenes.SIDES)
    assert "step 0: '<think>" in done.stdout + done.stderr, "no completion was shown"
    config = json.loads((folder / "config.json").read_text())
    assert config["origin"]["steps"] == "flag" and config["origin"]["lr"] == "model family"
    assert config["versions"]["torch"] == torch.__version__


def test_metrics_have_one_line_per_step(run):
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    expected = {"step", "reward", "iou", "format", "loss", "kl", "clip_ratio", "grad_norm"}
    expected |= {"sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"}
    expected |= {"completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std"}
    expected |= {"frac_groups_not_finite", "skipped", "lr", "seconds"}
    expected |= {"memory/reserved_gb"}
    phases = {"seconds/vision", "seconds/prefill", "seconds/decoding", "seconds/passes"}
    for line in lines:
        assert set(line) == expected | phases
        assert all(line[name] > 0 for name in phases) and sum(line[name] for name in phases) < line["seconds"]
        assert line["reward"] == pytest.approx(0.9 * line["iou"] + 0.1 * line["format"], abs=1e-5)
        assert line["sampling/sampling_logp_difference/mean"] < 1e-4
        assert line["skipped"] == line["frac_groups_not_finite"] == 0
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert lines[0]["kl"] == 0, "the first step starts at the reference"
    updated = [line["grad_norm"] > 0 for line in lines]
    assert any(updated[:2]), "no group of the first steps had different rewards"
    assert [line["kl"] > 0 for line in lines[1:]] == [updated[0], any(updated[:2])]
    assert lines[0]["clip_ratio"] == 0, "with one update per rollout the ratio is 1"


def test_results_have_their_keys(run):
    results = json.loads((run[0] / "results.json").read_text())
    for when in ("before", "after"):
        cue = {"mean_iou", "mean_iou_parsed", "acc50", "acc75", "right_object", "parse_rate", "format", "n"}
        assert set(results[when]["cue"]) == cue | {"named_detail"} and results[when]["cue"]["n"] == 6
        assert set(results[when]["find"]) == {"mean_iou", "right_object", "n"}
        for task in ("questions", "suppressed"):
            summary = results[when][task]
            assert set(summary) == {"accuracy", "n", "by_objects", "by_size", "by_tokens", "by_kind"}
            assert summary["n"] == 18 and set(summary["by_size"]) == set(scenes.SIDES)
            cells = {f"{kind}_{size}" for kind in scenes.KINDS for size in scenes.SIDES}
            assert set(summary["by_kind"]) == {*scenes.KINDS} | cells
            for name, part in summary["by_kind"].items():
                error = results["change"][f"{task}_{name}"]["standard_error"]
                assert part["n"] == (2 if name in cells else 6) and part["standard_error"] == error
    assert {"whole_image", "centre_box", "name_then_find"} <= set(results["baselines"])
    assert results["seed"] == 0 and results["settings"]["num_generations"] == 8
    assert set(results["change"]["cue"]) == {"change", "standard_error", "n"}


def test_the_same_seed_repeats_bit_for_bit(run):
    folder, _ = run
    RUNS["again"].result()
    again = RUNS["folder"] / "again"

    def metrics(path: Path) -> list[dict]:
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        return [{key: line[key] for key in line if not key.startswith("seconds")} for line in lines]

    assert metrics(folder) == metrics(again)
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (again / name).read_bytes()
    first, second = (json.loads((path / "results.json").read_text()) for path in (folder, again))
    assert first["after"] == second["after"] and first["before"] == second["before"]


def test_the_adapter_loads_in_plain_transformers(run):
    """One image and one question, with no code of ours but the prompt; then the same with merged weights."""
    folder, tokenizer = ROOT / "tiny/model", AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), run[0] / "adapter")
    cue = scene_cues(CueConfig(), "heldout", 5)[0]
    question = scenes.questions(cue.scene)[0].text
    image = AutoImageProcessor.from_pretrained(folder)(cue.image, return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    num_tokens = int(image["image_grid_thw"].prod()) // 4
    inputs = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * num_tokens), return_tensors="pt")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    kwargs = dict(max_new_tokens=40, do_sample=False)
    plain = model.eval().generate(**inputs, **image, **kwargs)
    length = inputs["input_ids"].shape[1]
    ours = load_adapter(load_policy("tiny", load_in_4bit=False), run[0] / "adapter")
    expected, _ = next(generate_replies(ours, [encode(ours.processor, question, cue.image)], 40))
    assert tokenizer.decode(plain[0, length:], skip_special_tokens=True) == expected
    merged = model.merge_and_unload().generate(**inputs, **image, **kwargs)
    assert tokenizer.decode(merged[0, length:], skip_special_tokens=True) == expected


def printed_flags(stdout: str, task: str, monkeypatch) -> argparse.Namespace:
    """The flags of the one eval.py command for a task that a run prints at its end, as eval.py reads them."""
    (line,) = (line for line in stdout.splitlines() if line.startswith(f"python eval.py {task} "))
    monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
    return eval_module.read_flags()


def test_a_run_prints_the_commands_that_evaluate_it(run, monkeypatch):
    folder, done = run
    monkeypatch.chdir(folder.parent)
    flags = printed_flags(done.stdout, "scenes", monkeypatch)
    assert (flags.task, flags.model, flags.adapter) == ("scenes", "tiny", Path("first/adapter"))
    Path("docs").mkdir()
    Path("docs/scene.png").touch()
    flags = printed_flags(done.stdout, "ask", monkeypatch)
    assert (flags.question, flags.adapter) == ("Where is the red star?", Path("first/adapter"))


def test_the_printed_command_repeats_the_flags_of_the_run(tmp_path, monkeypatch):
    """A run on COCO with a model folder, in a folder whose name needs quotes."""
    folder, annotations = tmp_path / "my run", tmp_path / "my annotations.json"
    for name in ("adapter", "model", "images"):
        (folder / name).mkdir(parents=True)
    annotations.touch()
    flags = {
        "model": str(folder / "model"),
        "load_in_4bit": False,
        "cpu": False,
        "data": "coco",
        "annotations": annotations,
    }
    flags |= {"images": folder / "images"}
    cfg, origin = resolve(flags, FAMILIES["qwen3_vl"])
    write_config(folder, None, cfg, origin, {})
    (command,) = eval_commands(folder)
    found = printed_flags(command, "cues", monkeypatch)
    assert {name: getattr(found, name) for name in flags} == flags
    assert found.adapter == folder / "adapter" and found.box_frame is None


def test_eval_scores_an_adapter_before_and_after(run, tmp_path):
    adapter = str(run[0] / "adapter")
    done = launch("eval.py", "scenes", "--adapter", adapter, "--n", "5", "--out", "scores", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("device: "), "up front"
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["before"]["cue"]["n"] == results["after"]["cue"]["n"] == 5
    assert (tmp_path / "scores" / "before_after.png").is_file()
    assert "±" in done.stdout


def test_a_prompt_of_ones_own_is_asked_in_training_and_in_evaluation(tmp_path, monkeypatch, capsys):
    """The same text in the run and in the command that it prints; no other prompt resumes the run."""
    path, out, images, prompts = tmp_path / "cue.txt", tmp_path / "r", [], []
    path.write_text("Find Image 2 in Image 1 in {units}.{think}\n")
    real = locus_mini.encode_cue

    def recorded(processor, cue, source):
        images.append(cue.image)
        prompts.append(real(processor, cue, source))
        return prompts[-1]

    for module in (locus_mini, heldout):
        monkeypatch.setattr(module, "encode_cue", recorded)
    monkeypatch.setattr(
        sys, "argv", ["x", "--cue-prompt", str(path), "--out", str(out), *SMALL, "--steps", "1"]
    )
    locus_mini.main()
    config = json.loads((out / "config.json").read_text())
    assert config["cue_text"] == "Find Image 2 in Image 1 in {units}.{think}"
    flags = printed_flags(capsys.readouterr().out, "scenes", monkeypatch)
    assert flags.cue_prompt == config["cue_text"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--n", "2", "--out", str(tmp_path / "scores")])
    eval_module.main()
    tokenizer = load_policy("tiny").processor.tokenizer
    texts = {tokenizer.decode(prompt.input_ids).replace("<|image_pad|>", "") for prompt in prompts}
    assert len(prompts) > 12 and len(texts) == 1, "of the run, its evaluation, and eval.py"
    assert "in coordinates from 0 to 1000." in texts.pop().replace(" .", ".")
    (out / "results.json").unlink()
    path.write_text("Find Image 1 in Image 2 in {units}.{think}\n")
    code, stderr = in_process(monkeypatch, capsys, "--resume", str(out))
    assert code == 2 and str(path) in stderr and "has changed" in stderr


@pytest.mark.parametrize("program", ["locus_mini.py", "eval.py scenes"])
def test_a_torchvision_of_another_torch_is_one_sentence(program, tmp_path, monkeypatch):
    """What such a torchvision raises; without the sentence, transformers reports a missing BLOOM model."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist\\nmore')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = launch(*program.split(), "--out", "run", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "torchvision::nms does not exist" in done.stderr
    assert "python -m pip uninstall torchvision" in done.stderr and not (tmp_path / "run").exists()


def in_process(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """The main program's exit code and its stderr, without the seconds that a new process takes."""
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        locus_mini.main()
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "."], "."),
        (["--data", "no-such-folder"], "no-such-folder"),
        (["--data", "coco"], "--annotations"),
        (["--data", "coco", "--annotations", "none.json", "--images", "."], "none.json"),
        (["--data", "coco", "--annotations", "x.json", "--images", "no-images"], "no-images"),
        (["--num-generations", "1"], "--num-generations 1"),
        (["--prompts", "0"], "--prompts 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--tiny-ratio", "1.5"], "--tiny-ratio 1.5"),
        (["--alpha", "-0.1"], "--alpha"),
        (["--updates", "3"], "--updates 3"),
        (["--steps", "-1"], "--steps"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--loss", "ppo"], "--loss"),
        (["--source", "smell"], "--source"),
        (["--steps", "many"], "--steps"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--box-frame", "polar"], "--box-frame"),
        (["--cue-prompt", "none.txt"], "none.txt"),
        (["--crop-min-pixels", "99999"], "--crop-min-pixels 99999"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(arguments, names, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, stderr = in_process(monkeypatch, capsys, *arguments)
    assert code == 2
    assert names in stderr and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == [], "wrong use left a folder behind"


def test_a_folder_that_holds_a_run_is_not_overwritten(run, monkeypatch, capsys):
    before = (run[0] / "results.json").read_bytes()
    code, stderr = in_process(monkeypatch, capsys, "--out", str(run[0]), *SMALL)
    assert code == 2 and "already holds a run" in stderr
    assert (run[0] / "results.json").read_bytes() == before


def test_a_wrong_frame_is_found_by_the_boxes_of_the_base_model(monkeypatch, capsys, tmp_path):
    """The embedded model writes boxes relative to 1,000; with another frame the base evaluation refuses."""
    arguments = ("--box-frame", "resized", "--eval-cues", "90", "--out", str(tmp_path / "x"), *SMALL[:6])
    code, stderr = in_process(monkeypatch, capsys, *arguments)
    assert code == 2 and "--box-frame relative1000" in stderr


@pytest.mark.parametrize("source", ["random", "large", "text"])
def test_every_cue_source_trains(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--source", source, "--out", str(tmp_path / "r"), *SMALL])
    locus_mini.main()
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "extra", [["--updates", "2", "--iterations", "2", "--beta", "0"], ["--load-in-4bit"]]
)
def test_several_updates_and_4bit_train(extra, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "r"), *SMALL, *extra])
    locus_mini.main()
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 0 and last["grad_norm"] > 0


def test_a_folder_of_images_trains(tmp_path, monkeypatch, capsys):
    for i in range(30):
        cue = scene_cues(CueConfig(), "train", 3)[i]
        cue.image.resize((300, 200), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    images, real = [], heldout.encode_cue

    def recorded(*arguments, **names):
        images.append((prompt := real(*arguments, **names)).images)
        return prompt

    monkeypatch.setattr(heldout, "encode_cue", recorded)
    areas = ["--image-pixels", "32768", "--crop-pixels", "2048", "--crop-min-pixels", "1024"]
    areas += ["--max-new-tokens", "30"]
    command = ["x", "--data", str(tmp_path), "--out", str(tmp_path / "r"), *SMALL, *areas]
    monkeypatch.setattr(sys, "argv", command)
    locus_mini.main()
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["after"]["cue"]["n"] == 6 and "questions" not in results["after"]
    flags = printed_flags(capsys.readouterr().out, "cues", monkeypatch)
    assert (flags.data, flags.adapter) == (str(tmp_path), tmp_path / "r" / "adapter")
    # The printed command measures on the same cues, with images and crops as large as in the run.
    of_run = len(images)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--n", "6", "--out", str(tmp_path / "scores")])
    eval_module.main()
    assert len(images) > of_run > 0
    for full, crop in images:
        assert full.pixel_values.shape[0] * 16**2 <= 32768 and crop.pixel_values.shape[0] * 16**2 <= 2048
    scores = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert scores["after"]["cue"] == results["after"]["cue"]


def test_presets_are_flags_that_flags_override():
    family = FAMILIES["tiny"]
    cfg, origin = resolve({"preset": "paper", "num_generations": 4}, family)
    assert (cfg.lr, cfg.beta, cfg.num_generations) == (1e-6, 0.01, 4)
    assert (cfg.weight_decay, cfg.warmup, cfg.alpha) == (0.01, 0.05, 0.1)
    assert cfg.prompts // cfg.updates == 128 and cfg.steps * cfg.prompts == 204_800, "two passes of 99,500"
    assert (origin["lr"], origin["num_generations"], origin["alpha"]) == ("preset paper", "flag", "default")
    with pytest.raises(UserError, match="--clip-low"):
        resolve({"clip_low": -1.0}, family)
