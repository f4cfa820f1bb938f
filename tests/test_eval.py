"""eval.py as a program: scenes, benchmarks, an image of one's own, killed runs, memory that runs out."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_models import noise, png_cell, random_policy, with_adapter

import eval as evaluation
from data import CueConfig, open_cues, scene_cues
from evaluation import reply_cache, session
from evaluation.heldout import build_heldout_set, evaluate
from evaluation.reply_cache import ReplyCache
from evaluation.scores import compare, paired
from files.errors import UserError
from models import add_lora, load_policy
from tiny import scenes
from training import pictures


def save_adapter(folder: Path, std: float) -> Path:
    """A random adapter of the embedded model; the larger std, the more its replies differ from the base's."""
    policy = add_lora(load_policy("tiny", load_in_4bit=False), 4)
    torch.manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    policy.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter that changes replies a little."""
    return save_adapter(tmp_path_factory.mktemp("run") / "adapter", std=0.02)


@pytest.fixture(scope="module")
def vstar(tmp_path_factory) -> Path:
    """V*Bench's own layout, filled with scenes: eight questions about places, the first option right."""
    root = tmp_path_factory.mktemp("vstar")
    for kind in ("direct_attributes", "relative_position"):
        (root / kind).mkdir()
        for i in range(4):
            cue = scene_cues(CueConfig(), "heldout", 7)[i + 10 * (kind == "relative_position")]
            q = next(q for q in scenes.questions(cue.scene) if q.kind == "place")
            cue.image.save(root / kind / f"{i}.png")
            others = [place for place in scenes.PLACES if place != q.answer]
            x1, y1, x2, y2 = q.evidence.box
            note = {"question": q.text, "options": [q.answer, *others], "target_object": [q.evidence.name]}
            note["bbox"] = [[x1, y1, x2 - x1, y2 - y1]]
            (root / kind / f"{i}.json").write_text(json.dumps(note))
    return root


def run(*arguments) -> tuple[int, dict]:
    """Exit code, and the results of a run that was given --out."""
    sys.argv = ["eval.py", *map(str, arguments)]
    try:
        evaluation.main()
    except SystemExit as stop:
        return stop.code, {}
    folder = Path(arguments[arguments.index("--out") + 1])
    return 0, json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_scenes_give_every_row_before_and_after(adapter, tmp_path, capsys):
    code, results = run("scenes", "--adapter", adapter, "--n", 6, "--out", tmp_path)
    assert code == 0
    printed = capsys.readouterr().out
    rows = ["cue search (IoU)", "find by text (IoU)", "questions", "questions, rest", "answers at base"]
    rows += [
        "  place of tiny objects",
        "  shape of large objects, rest black",
        "  detail of small objects, found",
    ]
    rows += ["  place of large objects, in box", "cue search, detail in the thought", "twins, forced choice"]
    for row in [*rows, "found (IoU", "found but misread", "Attention-in-Box", "Peak-in-Box", "twins, both"]:
        (line, *_) = [line for line in printed.splitlines() if line.startswith(row)]
        assert "±" in line, row
    for side in ("before", "after"):
        grounding, attention = results[side]["grounding"], results[side]["attention"]
        assert sum(grounding["counts"].values()) == grounding["n"] == attention["n"] == 18
        assert sum(part["n"] for part in grounding["accuracy"].values()) == 18
        assert len(attention["aib_by_layer"]) == 4 and 0 < attention["chance"] < 1
        assert attention["by_kind"]["place_tiny"]["n"] == grounding["by_kind"]["detail_large"]["n"] == 2
        assert results[side]["twins"]["n"] == 6
    assert results["change"]["aib"]["n"] == 18 and results["change"]["aib"]["change"] != 0
    assert results["change"]["twins_swap"]["n"] == 6
    with Image.open(tmp_path / "attention.png") as image:
        assert image.width == 3 * 320, "the image, the base's map, the adapted model's map"


def test_vstar_measures_answers_suppression_grounding_and_attention(adapter, vstar, tmp_path):
    code, results = run("vstar", "--data", vstar, "--adapter", adapter, "--out", tmp_path)
    assert code == 0
    for side in ("before", "after"):
        assert results[side]["direct"]["n"] == results[side]["black"]["n"] == 8
        assert results[side]["direct"]["parse_rate"] > 0.5 and results[side]["direct"]["errors"] == 0
        assert results[side]["grounding"]["n"] == results[side]["attention"]["n"] == 8
    assert results["change"]["direct"]["n"] == 8
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    raw = [value for key, value in lines[1:] if key == "before/direct/direct_attributes/0"]
    assert raw[0][0].startswith("<think>"), "the reply is kept as it was given"


def test_a_killed_run_resumes_and_ends_the_same(adapter, vstar, tmp_path, monkeypatch):
    flags = ("vstar", "--data", vstar, "--adapter", adapter, "--batch", 4)
    assert run(*flags, "--out", tmp_path / "whole")[0] == 0
    whole = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    (tmp_path / "killed").mkdir()
    prompts, real = [], reply_cache.rollout

    def counted(policy, batch, *rest):
        prompts.extend(batch.prompts)
        return real(policy, batch, *rest)

    monkeypatch.setattr(reply_cache, "rollout", counted)
    for length in (len(whole) // 3, len(whole) - 5, len(whole) // 40):  # most likely in the middle of a line
        (tmp_path / "killed" / "answers.jsonl").write_bytes(whole[:length])
        prompts.clear()
        assert run(*flags, "--out", tmp_path / "killed")[0] == 0
        kept = sum("looks" not in line for line in whole[:length].decode().splitlines()[1:-1])
        assert 48 - kept <= len(prompts) < 48 - kept + 4, "at most one batch runs twice"
        for name in ("answers.jsonl", "results.json"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_settings_refuse_to_resume(vstar, tmp_path, capsys):
    assert run("vstar", "--data", vstar, "--out", tmp_path, "--n", 2)[0] == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    assert run("vstar", "--data", vstar, "--out", tmp_path, "--n", 3)[0] == 2
    assert "other settings (n:" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_settings_choose_the_folder_beside_the_adapter(adapter, vstar):
    for n in (1, 2, 1):
        sys.argv = ["eval.py", "vstar", "--data", str(vstar), "--adapter", str(adapter), "--n", str(n)]
        evaluation.main()
    assert len(list(adapter.parent.glob("vstar-*/results.json"))) == 2


def test_a_sample_too_large_for_memory_is_an_error_and_not_a_wrong_answer(vstar, tmp_path, monkeypatch):
    real = reply_cache.rollout
    noise((256, 256), 3).save(vstar / "relative_position" / "2.png")

    def full(policy, batch, *rest):
        if any(image is prompt.images[0] for image in too_large for prompt in batch.prompts):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(policy, batch, *rest)

    too_large = []
    make_prompt = evaluation.benchmark_prompt

    def marked(sample, **kwargs):
        prompt = make_prompt(sample, **kwargs)
        if sample.id == "relative_position/2":
            too_large.append(prompt.images[0])
        return prompt

    monkeypatch.setattr(reply_cache, "rollout", full)
    monkeypatch.setattr(evaluation, "benchmark_prompt", marked)
    code, results = run("vstar", "--data", vstar, "--out", tmp_path)
    assert code == 0 and results["before"]["direct"]["errors"] == 1 and results["before"]["direct"]["n"] == 7
    assert results["before"]["black"]["errors"] == 1


def test_a_broken_image_is_left_out_and_wrong_and_the_others_are_asked(adapter, vstar, tmp_path):
    folder = tmp_path / "vstar"
    shutil.copytree(vstar, folder)
    (folder / "relative_position" / "2.png").write_bytes(b"no image")
    (folder / "direct_attributes" / "3.json").write_text("{}")
    flags = ("vstar", "--data", folder, "--adapter", adapter, "--out", tmp_path / "out")
    for _ in range(2):  # anew, and from the cached replies
        code, results = run(*flags)
        assert code == 0
        for side in ("before", "after"):
            direct = results[side]["direct"]
            assert (direct["n"], direct["left_out"], direct["errors"]) == (8, 2, 0)
            assert results[side]["black"]["n"] == results[side]["attention"]["n"] == 6


def test_an_empty_reply_is_a_reply(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reply_cache, "decode_completions", lambda _, out: [[""] for _ in range(1)])
    scene_cues(CueConfig(), "heldout", 9)[0].image.save(tmp_path / "mine.png")
    code, results = run("ask", tmp_path / "mine.png", "What is this?", "--out", tmp_path / "out")
    assert code == 0 and results == {"before": ""}
    assert "before: (empty)" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    assert ReplyCache(tmp_path / "out" / "answers.jsonl", settings)["before/0"][0] == "", (
        "it is not asked again"
    )


def test_a_table_of_ones_own_and_its_predictions(adapter, tmp_path):
    rows = ["index\timage\tquestion\tA\tB\tanswer"]
    rows += [f"{i}\t{png_cell(noise((60, 40), i))}\tWhat?\tred\tblue\tA" for i in range(3)]
    (tmp_path / "mine.tsv").write_text("\n".join(rows) + "\n")
    flags = ("--adapter", adapter, "--out", tmp_path / "out", "--export-vlmevalkit", tmp_path / "table.tsv")
    code, results = run("table", "--data", tmp_path / "mine.tsv", *flags)
    assert code == 0 and results["after"]["direct"]["n"] == 3
    for name in ("table.tsv", "table_before_direct.tsv"):
        header, *lines = (tmp_path / name).read_text().splitlines()
        assert header.split("\t")[-1] == '"prediction"' and len(lines) == 3 and "<think>" not in lines[0]


def test_both_prompts_of_a_family_that_thinks(tmp_path, monkeypatch):
    """A random Qwen2.5-VL on POPE: with and without the instruction, and the paper's pairing as an extra."""
    rows = ["index\tcategory\tquestion\tanswer\timage"]
    rows += [f"{i}\trandom\tIs there a star?\tyes\t{png_cell(noise((60, 40), i))}" for i in range(6)]
    (tmp_path / "POPE.tsv").write_text("\n".join(rows) + "\n")
    policy = random_policy("qwen2_5_vl")
    with_adapter(random_policy("qwen2_5_vl")).model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(session, "load_policy", lambda *_, **__: policy)
    flags = ("--max-new-tokens", 6, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    code, results = run("pope", "--data", tmp_path / "POPE.tsv", *flags)
    assert code == 0 and set(results["before"]) == {"direct", "think"}
    assert results["before"]["direct"]["n"] == 6 and results["direct to think"]["n"] == 6


def test_cue_search_on_photos_by_size(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(30):
        noise((320, 240), i).save(photos / f"{i}.png")
    code, results = run("cues", "--data", photos, "--n", 5, "--out", tmp_path / "out")
    assert code == 0 and results["before"]["cue"]["n"] == 5
    assert sum(part["n"] for part in results["before"]["cue_by_size"].values()) == 5


def test_cues_of_one_photo_count_as_one_sample_in_the_standard_error(tmp_path):
    for i in range(60):
        noise((320, 240), i).save(tmp_path / f"{i}.png")
    policy = load_policy("tiny", load_in_4bit=False)
    for data in (str(tmp_path), "scenes"):
        held = build_heldout_set(policy, open_cues(data, "heldout", 0, CueConfig()), 12)
        before, after = (evaluate(policy, held, length) for length in (40, 12))  # the second ends too early
        pair, names = (before.samples["cue_parsed"], after.samples["cue_parsed"]), [c.name for c in held.cues]
        change = compare(before, after)["cue_parsed"]
        if data == "scenes":
            assert change == paired(*pair), "every scene has one cue"
            continue
        assert 1 < len(set(names)) < 12, "photos with several cues, or it would prove nothing"
        assert change == paired(*pair, names) != paired(*pair)
        tiny = [cue.name for cue in held.cues if cue.size == "tiny"]
        assert before.groups["cue_tiny"] == tiny
    one_photo = paired([0, 0, 0, None], [1, 0, 1, 1], ["a", "a", "a", "without a reply"])
    assert one_photo == paired([0, 0, 0], [1, 0, 1]), "it cannot tell how photos differ"


def test_an_edited_list_of_ids_to_exclude_is_another_setting(tmp_path, capsys):
    """Other ids can leave other cues: replies to the old ones must not be scored against new boxes."""
    photos, ids, out = tmp_path / "photos", tmp_path / "ids.txt", tmp_path / "out"
    photos.mkdir()
    for i in range(30):
        noise((320, 240), i).save(photos / f"{i}.png")
    ids.write_text("1\n")
    arguments = ("cues", "--data", photos, "--exclude", ids, "--n", 1, "--out", out)
    assert run(*arguments)[0] == 0
    ids.write_text("1\n2\n")
    assert run(*arguments)[0] == 2 and "ids.txt as of" in capsys.readouterr().err


def test_ask_about_an_image_of_ones_own(adapter, tmp_path, capsys):
    scene_cues(CueConfig(), "heldout", 9)[0].image.save(tmp_path / "mine.png")
    flags = ("--adapter", adapter, "--out", tmp_path / "out")
    code, results = run("ask", tmp_path / "mine.png", "What shape is the red object?", *flags)
    assert code == 0 and set(results) == {"before", "after"}
    assert f"before: {results['before']}" in capsys.readouterr().out
    assert (tmp_path / "out" / "attention.png").is_file()


def test_ask_draws_the_attention_of_each_model_after_its_own_reply(tmp_path, monkeypatch):
    """The models must not read each other's reply: a map is that of the token that this model wrote."""
    prompts, real = [], pictures.attention_maps

    def recorded(policy, items):
        prompts.extend(items)
        return real(policy, items)

    monkeypatch.setattr(pictures, "attention_maps", recorded)
    scene_cues(CueConfig(), "heldout", 9)[0].image.save(tmp_path / "mine.png")
    flags = ("--adapter", save_adapter(tmp_path / "adapter", std=0.1), "--out", tmp_path / "out")
    code, results = run("ask", tmp_path / "mine.png", "Where is the blue circle?", *flags)
    assert code == 0
    up_to_answer = {name: reply[: reply.index("<answer>")] for name, reply in results.items()}
    assert up_to_answer["before"] != up_to_answer["after"], "equal replies would prove nothing"
    decode = load_policy("tiny", load_in_4bit=False).processor.tokenizer.decode
    for beginning, prompt in zip(up_to_answer.values(), prompts, strict=True):
        text = decode(prompt.input_ids)
        assert text.rstrip().endswith(f"{beginning}<answer>") and text.count("<answer>") == 1


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["ask"], "question"),
        (["ask", "nothing.png", "What?"], "nothing.png"),
        (["pope"], "--data"),
        (["pope", "--data", "nowhere.tsv"], "nowhere.tsv"),
        (["scenes", "--n", "0"], "--n: 0"),
        (["scenes", "photos/"], "takes no photos"),
        (["scenes", "--data", "."], "takes no --data ."),
        (["cues", "--data", ".", "--crop-pixels", "9", "--crop-min-pixels", "10"], "--crop-min-pixels 10"),
        (["scenes", "--adapter", "nowhere"], "nowhere"),
        (["cues", "--data", "nowhere"], "nowhere"),
        (["scenes", "--cue-prompt", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_use_ends_with_one_sentence(arguments, names, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments)[0] == 2
    message = capsys.readouterr().err
    assert names in message and "Traceback" not in message


def test_a_file_that_holds_no_replies_is_refused(tmp_path):
    (tmp_path / "answers.jsonl").write_text("hello\n")
    with pytest.raises(UserError, match="answers.jsonl"):
        ReplyCache(tmp_path / "answers.jsonl", {"a": "b"})
    assert (tmp_path / "answers.jsonl").read_text() == "hello\n"
