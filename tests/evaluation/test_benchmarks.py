"""Files as they are published, options extracted from replies as models write them, figures by hand."""

import base64
import csv
import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from random_models import png_cell

from evaluation.benchmarks import (
    BENCHMARKS,
    aggregate,
    choice_of,
    export_predictions,
    judge,
    read_samples,
    yes_no,
)
from files.errors import UserError
from prompts import BoxFrame

ROOT = Path(__file__).parents[2]

# ---------------------------------------------------------------- files


def png(color, size=(8, 8), mode="RGB") -> str:
    return png_cell(Image.new(mode, size, color))


def noise(side: int) -> str:
    return png_cell(Image.frombytes("RGB", (side, side), random.Random(side).randbytes(3 * side * side)))


def write(path: Path, rows: list[dict], end: str = "\n", start: str = "") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(start)
        columns = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, columns, restval="", delimiter="\t", lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    return path


def question(index, **extra) -> dict:
    base = {"index": index, "image": png("red"), "question": "What?", "A": "one", "B": "two", "answer": "A"}
    return base | extra


def colors(sample) -> list:
    return [image.getpixel((0, 0)) for image in sample.images()]


def test_a_table_with_every_quirk_of_the_published_ones(tmp_path):
    big = noise(64)  # over the length from which an image stays in the file
    rows = [
        question(
            0, image=big, question='Line one\nline "two"\tand a tab', C="None", D="", answer="C", category="x"
        ),
        question(1, image="0", C="NA", D="nan"),
        question(2, image="3", question="Ünïcode 日本?"),  # the image of a later row
        question(3, image=png("blue")),
        question(4, image=str([png("lime"), big])),
        question(5, image=""),  # no image: left out
        question(6, image="data:image/png;base64," + png("red")),
    ]
    path = write(tmp_path / "MMStar.tsv", rows, end="\r\n", start="\ufeff")
    samples = {sample.id: sample for sample in read_samples("mmstar", path)}
    assert list(samples) == ["0", "1", "2", "3", "4", "6"]
    assert (
        samples["0"].question == 'Line one\nline "two"\tand a tab'
        and samples["2"].question == "Ünïcode 日本?"
    )
    assert samples["0"].options == {"A": "one", "B": "two", "C": "None"} and samples["0"].answer == "C"
    assert samples["1"].options == {"A": "one", "B": "two", "C": "NA"}
    assert samples["0"].row["index"] == "0" and samples["0"].row["category"] == "x"
    exact = Image.open(io.BytesIO(base64.b64decode(big))).tobytes()
    for name, place in (("0", 0), ("1", 0), ("4", 1)):
        assert samples[name].images()[place].tobytes() == exact
    assert colors(samples["2"]) == colors(samples["3"]) == [(0, 0, 255)]
    assert colors(samples["4"])[0] == (0, 255, 0) and len(samples["4"].images()) == 2
    assert colors(samples["6"]) == [(255, 0, 0)]
    assert all(image.mode == "RGB" for sample in samples.values() for image in sample.images())


def test_images_of_later_rows_are_found_while_streaming(tmp_path):
    path = write(tmp_path / "a.tsv", [question(0, image="7"), question(7, image=png("blue"))])
    assert colors(next(read_samples("mmstar", path))) == [(0, 0, 255)]


def test_images_beside_the_table_must_be_in_its_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for file in (folder / "a.png", folder / "b.png", tmp_path / "secret.png"):
        Image.new("RGBA", (4, 4), "blue").save(file)
    row = {"question": "Q", "A": "x", "B": "y", "answer": "B"}
    rows = [row | {"index": 0, "image_path": "a.png"}, row | {"index": 1, "image_path": "['a.png', 'b.png']"}]
    path = write(folder / "RealWorldQA.tsv", [*rows, row | {"index": 2, "image_path": "../secret.png"}])
    single, double, outside = read_samples("realworldqa", path)
    assert colors(single) == [(0, 0, 255)]
    assert len(double.images()) == 2 and double.images()[0].mode == "RGB"
    with pytest.raises(UserError, match="outside"):
        outside.images()


def test_images_are_not_turned(tmp_path):
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90°
    Image.new("RGB", (8, 4)).save(out, "JPEG", exif=exif)
    cell = base64.b64encode(out.getvalue()).decode()
    (sample,) = read_samples("ai2d", write(tmp_path / "a.tsv", [question(0, image=cell)]))
    assert sample.images()[0].size == (8, 4)


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([question(0, answer="")], "row 2.*answer"),
        ([question(0, question="")], "row 2.*question"),
        ([question(0, answer="D")], "answer D"),
        ([{key: value for key, value in question(0).items() if key != "index"}], "index"),
        ([question(0, image="")], "nothing of mmstar"),
    ],
)
def test_malformed_tables_are_one_sentence(tmp_path, rows, word):
    with pytest.raises(UserError, match=word) as caught:
        list(read_samples("mmstar", write(tmp_path / "MMStar.tsv", rows)))
    assert "MMStar.tsv" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"index\tquestion\n1\t2\t3\n", b"a\tb\n1\t2\n", b"x\rb\n"]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tsv"):
        list(read_samples("mmstar", path))


def test_a_row_that_cannot_be_read_is_left_out_and_the_others_are_read(tmp_path):
    rows = [question(0, answer=""), question(1), question(1), question(2, answer="D"), question(3)]
    path = write(tmp_path / "MMStar.tsv", rows)
    path.write_text(path.read_text() + "4\tcut off")
    *samples, no_answer, twice, wrong_letter, cut = read_samples("mmstar", path)
    assert [sample.id for sample in samples] == ["1", "3"]
    for sample, reason in ((no_answer, "row 2.*answer"), (twice, "row 4.*twice"), (wrong_letter, "row 5.*D")):
        with pytest.raises(UserError, match=reason):
            sample.images()
    with pytest.raises(UserError, match="row 7.*as many cells"):
        cut.images()
    for kind in ("choice", "yesno", "string", "box"):
        no_answer.kind = kind
        for reply in ("", "A", "yes", "[1, 2, 3, 4]"):
            if kind != "box" or not reply.startswith("["):
                assert judge(no_answer, reply)["right"] == 0


def test_rows_that_cannot_be_read_count_as_wrong_in_every_figure(tmp_path):
    table = [question(0, answer="Yes", category="random"), question(1, answer="", category="random")]
    samples = list(read_samples("pope", write(tmp_path / "POPE.tsv", table)))
    rows = [judge(sample, "yes") for sample in samples[:1]]
    rows += [judge(samples[1], "")]
    got = aggregate("pope", rows)
    assert (got["accuracy"], got["random accuracy"], got["n"]) == (50, 50, 2)
    rows = [row(1, index="VD_map_1_0_0_0"), row(0, index="7"), row(0)]
    assert aggregate("hallusionbench", rows)["aAcc"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("hrbench4k", "HRBench4K.tsv"),
        ("hrbench8k", "HRBench8K.tsv"),
        ("hrbench8k", "hr_bench_8k.tsv"),
        ("mme_realworld", "MME-RealWorld.tsv"),
        ("mme_realworld_lite", "MME-RealWorld-Lite.tsv"),
        ("mathverse", "MathVerse_MINI.tsv"),
        ("treebench", "TreeBench.tsv"),
        ("blink", "BLINK.tsv"),
    ],
)
def test_files_of_vlmevalkits_folder(tmp_path, task, name):
    for other in ("HRBench4K.tsv", "HRBench8K.tsv", "MME-RealWorld.tsv", "MME-RealWorld-Lite.tsv", "._a.tsv"):
        write(tmp_path / other, [question(other, cycle_category="0")])
    write(tmp_path / name, [question("mine", cycle_category="0")])
    (sample,) = read_samples(task, tmp_path)
    assert sample.id.endswith("mine")


def test_a_column_that_the_score_needs_is_missed_at_once(tmp_path):
    with pytest.raises(UserError, match="cycle_category"):
        list(read_samples("hrbench4k", write(tmp_path / "x.tsv", [question(0)])))


def test_a_benchmark_in_two_files_is_read_from_their_folder(tmp_path):
    for split, source in (("2D", "COCO"), ("3D", "Omni3D")):
        write(tmp_path / f"CV-Bench-{split}.tsv", [question(0, answer="(b)", split=split, source=source)])
    write(tmp_path / "MMStar.tsv", [question(5)])
    assert [s.id for s in read_samples("cvbench", tmp_path)] == ["2D/COCO/0", "3D/Omni3D/0"]
    (sample,) = read_samples("cvbench3d", tmp_path)
    assert sample.id == "3D/Omni3D/0" and sample.answer == "B"


def test_missing_files_unknown_names_and_broken_images(tmp_path):
    with pytest.raises(UserError, match=r"POPE\.tsv"):
        list(read_samples("pope", tmp_path))
    with pytest.raises(UserError, match="hrbench4k"):
        list(read_samples("hrbench", tmp_path))
    for cell in ("A" * 200, "x" * 81, "99", "['x'", "<0:9>", noise(64)[:5000]):
        sample = next(read_samples("mmstar", write(tmp_path / "a.tsv", [question(0, image=cell)])))
        with pytest.raises(UserError, match="index 0"):
            sample.images()


STREAM = """
import resource, sys
from pathlib import Path
from evaluation.benchmarks import read_samples
for sample in read_samples("hrbench8k", Path(sys.argv[1])):
    assert sample.images()[0].size == (2700, 2700)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_thirty_megabytes_a_row_stream(tmp_path):
    data = random.Random(0).randbytes(3 * 2700 * 2700)
    cell = png_cell(Image.frombytes("RGB", (2700, 2700), data), compress_level=0)
    assert 29e6 < len(cell) < 31e6
    peaks = []
    for count in (3, 10):
        path = tmp_path / "hr_bench_8k.tsv"
        with path.open("w") as file:
            file.write("index\timage\tquestion\tA\tB\tanswer\tcategory\tcycle_category\n")
            for index in range(count):
                file.write(f"{index}\t{cell}\tQ\tx\ty\tA\tsingle\t0\n")
        run = [sys.executable, "-c", STREAM, str(path)]
        peaks.append(int(subprocess.run(run, cwd=ROOT, capture_output=True, check=True, text=True).stdout))
    assert max(peaks) < 1_000_000, "kilobytes"
    assert peaks[1] < peaks[0] + 50_000


def vstar(root: Path, kind: str, stem: str, **extra) -> None:
    folder = root / kind
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30), "blue").save(folder / f"{stem}.jpg")
    note = {"question": "What color is the cup?", "options": ["red", "blue", "green", "white"]}
    note |= {"target_object": ["cup"], "bbox": [[3, 4, 10, 20]]} | extra
    (folder / f"{stem}.json").write_text(json.dumps(note))


def test_vstar_folder(tmp_path):
    for i in range(20):
        vstar(tmp_path, "direct_attributes", f"sa_{i}")
    both = {
        "target_object": ["cup", "dog"],
        "bbox": [[0, 0, 1, 2], [5, 6, 7, 8]],
        "options": ["left", "right"],
    }
    vstar(tmp_path, "relative_position", "sa_0", **both)
    samples = list(read_samples("vstar", tmp_path))
    assert len(samples) == 21 and samples[0].id == "direct_attributes/sa_0"
    first, last = samples[0], samples[-1]
    assert (
        first.boxes == [(3, 4, 13, 24)]
        and first.row["target"] == "cup"
        and first.images()[0].size == (40, 30)
    )
    assert all(sample.options[sample.answer] == "red" for sample in samples[:-1])
    assert len({sample.answer for sample in samples[:-1]}) > 1, "shuffled"
    assert [s.options for s in samples] == [s.options for s in read_samples("vstar", tmp_path)]
    assert last.id == "relative_position/sa_0" and last.row["target"] == "cup and dog"
    assert last.boxes == [(0, 0, 1, 2), (5, 6, 12, 14)] and last.options[last.answer] == "left"
    (tmp_path / "direct_attributes" / "sa_7.json").write_text('{"question": 1}')
    *samples, unreadable = read_samples("vstar", tmp_path)
    assert len(samples) == 20
    with pytest.raises(UserError, match=r"sa_7\.json"):
        unreadable.images()


def test_vstar_folder_as_a_mac_or_a_hand_leaves_it(tmp_path):
    for stem in ("sa_0", "sa_1"):
        vstar(tmp_path, "direct_attributes", stem)
    folder = tmp_path / "direct_attributes"
    for name in ("._sa_0.json", "._sa_0.jpg", "._sa_1.jpg"):  # what macOS writes beside files
        (folder / name).write_bytes(b"\0\5\26\7")
    Image.new("RGB", (5, 5), "red").save(folder / "sa_0.png")  # a second image of one stem
    (folder / "sa_1.bak").write_text("")
    samples = list(read_samples("vstar", tmp_path))
    assert [sample.id for sample in samples] == ["direct_attributes/sa_0", "direct_attributes/sa_1"]
    assert [sample.images()[0].size for sample in samples] == [(40, 30)] * 2


def test_json_of_another_benchmark_is_no_vstar(tmp_path):
    vstar(tmp_path, "direct_attributes", "sa_0")
    with pytest.raises(UserError, match=r"sa_0\.json"):
        list(read_samples("mmstar", tmp_path / "direct_attributes" / "sa_0.json"))
    (tmp_path / "other.json").write_text('[{"index": 1, "question": "What?"}]')
    with pytest.raises(UserError, match=r"other\.json"):
        list(read_samples("vstar", tmp_path / "other.json"))


def test_vstar_table(tmp_path):
    path = write(tmp_path / "VStarBench.tsv", [question(0, category="direct_attributes")])
    (sample,) = read_samples("vstar", tmp_path)
    assert sample.answer == "A" and sample.boxes == [] and path.exists()


def test_refcoco_families_and_splits_share_a_table(tmp_path):
    row = {"image": png("red", (200, 100)), "question": "the cup"}
    rows = [row | {"index": 0, "answer": "[0.1, 0.2, 0.55, 8e-1]", "category": "RefCOCO val"}]
    rows += [row | {"index": 0, "answer": "[10, 20, 110, 80]", "category": "RefCOCO testA"}]
    rows += [
        row | {"index": 0, "answer": "[0, 0, 1, 1]", "category": c} for c in ("RefCOCO+ val", "RefCOCOg test")
    ]
    write(tmp_path / "RefCOCO.tsv", rows)
    val, test_a = read_samples("refcoco", tmp_path)
    assert (val.id, test_a.id) == ("RefCOCO val/0", "RefCOCO testA/0")
    assert val.boxes == [pytest.approx((20, 20, 110, 80))] and test_a.boxes == [(10, 20, 110, 80)]
    assert [s.id for s in read_samples("refcoco+", tmp_path)] == ["RefCOCO+ val/0"]
    assert [s.boxes for s in read_samples("refcocog", tmp_path)] == [[(0, 0, 200, 100)]]
    for name in ("refcoco_val", "refcoco_testB", "refcoco+_val"):  # several files, named by their split
        write(tmp_path / f"{name}.tsv", [row | {"index": 4, "answer": "[0, 0, 1, 1]"}])
    (tmp_path / "RefCOCO.tsv").unlink()
    assert [s.id for s in read_samples("refcoco", tmp_path)] == ["refcoco_testB/4", "refcoco_val/4"]


def test_refcocos_question_and_lazy_boxes(tmp_path, monkeypatch):
    asked = (
        "Please provide the bounding box coordinate of the region this sentence describes: <ref>the cup</ref>"
    )
    row = {"index": 0, "image": png("red", (200, 100)), "question": asked, "category": "RefCOCO val"}
    path = write(tmp_path / "RefCOCO.tsv", [row | {"answer": "[0.1, 0.2, 0.55, 0.8]"}])
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("no image is opened before it is needed"))
    (sample,) = read_samples("refcoco", path)
    assert sample.question == "the cup"
    monkeypatch.setattr(Image, "open", real)
    assert sample.boxes == [pytest.approx((20, 20, 110, 80))]


def test_babyvisions_own_files(tmp_path):
    folder = tmp_path / "LMUData" / "BabyVision" / "babyvision_data"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 4), "blue").save(folder / "images" / "1.png")
    item = {"image": "images/1.png", "question": "How many?", "type": "Visual Tracking", "subtype": "Maze"}
    items = [
        item | {"taskId": 1, "ansType": "blank", "blankAns": "12", "choiceAns": None, "options": []},
        item
        | {"taskId": 2, "ansType": "choice", "blankAns": None, "choiceAns": 1, "options": ["x", "y", "z"]},
        item | {"taskId": 3, "ansType": "choice", "choiceAns": 7, "options": ["x"]},
    ]
    (folder / "meta_data.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n\n")
    for place in (tmp_path / "LMUData", folder, folder / "meta_data.jsonl"):
        blank, choice, unreadable = read_samples("babyvision", place)
        assert (blank.options, blank.answer, blank.row["category"]) == ({}, "12", "Visual Tracking")
        assert (choice.options, choice.answer) == ({"A": "x", "B": "y", "C": "z"}, "B")
        assert colors(choice) == [(0, 0, 255)]
        assert judge(blank, "\\boxed{12}")["right"] == judge(choice, "\\boxed{B}")["right"] == 1
        with pytest.raises(UserError, match="row 3"):
            unreadable.images()


@pytest.mark.parametrize(
    "choices",
    [
        "['a cup' '2' \"it's\"]",
        "['a cup'\n '2' \"it's\"]",
        "array(['a cup', '2', \"it's\"], dtype=object)",
        "array(['a cup' '2' \"it's\"])",
        "['a cup', '2', \"it's\"]",
    ],
)
def test_choices_as_numpy_prints_them(tmp_path, choices):
    row = question(0, A="", B="", choices=choices, answer="(B)", split="2D", source="COCO")
    (sample,) = read_samples("cvbench2d", write(tmp_path / "CV-Bench-2D.tsv", [row]))
    assert sample.options == {"A": "a cup", "B": "2", "C": "it's"} and sample.answer == "B"


def test_countbenchqa_and_mmvp(tmp_path):
    (count,) = read_samples("countbenchqa", write(tmp_path / "c.tsv", [question(0, A="", B="", answer="3")]))
    assert judge(count, "There are 3 cups.")["right"] == 1 and judge(count, "four")["right"] == 0
    table = [question(index, question=f"Q{index // 2}") for index in range(6)]
    table[3]["answer"] = ""  # a row that cannot be read spoils its own pair alone
    samples = list(read_samples("mmvp", write(tmp_path / "MMVP.tsv", table)))
    replies = ["A", "A", "A", "B", "A", ""]
    rows = [judge(sample, reply) for sample, reply in zip(samples, replies, strict=True)]
    got = aggregate("mmvp", rows)
    # Right are 0, 1, 2 and 5: of the pairs (0, 1), (2, 3) and (4, 5) only the first throughout.
    assert got["score"] == pytest.approx(100 / 3) and got["accuracy"] == pytest.approx(400 / 6)


def exported(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_predictions_for_vlmevalkit(tmp_path):
    table = [question(index, hint="h", category="x", D="") for index in range(4)] + [question(9, answer="Q")]
    samples = list(read_samples("mmstar", write(tmp_path / "MMStar.tsv", table)))
    texts = ['<think>A or\tB</think>\nThe "answer" is B.\r\nSo B', None, "", "<think>no end", False]
    export_predictions(tmp_path / "out.tsv", samples, [(text, BoxFrame(8, 8, 8, 8)) for text in texts])
    rows = exported(tmp_path / "out.tsv")
    assert list(rows[0]) == ["index", "question", "A", "B", "answer", "hint", "category", "prediction"]
    assert [row["index"] for row in rows] == ["0", "1", "2", "3"], "a row that cannot be read is not in it"
    assert rows[0]["prediction"].strip() == 'The "answer" is B.\r\nSo B'
    assert [row["prediction"] for row in rows[1:]] == [" "] * 3, "pandas reads an empty cell as missing"


def test_predicted_boxes_for_vlmevalkit_are_shares_with_the_split_in_the_index(tmp_path):
    row = {"image": png("red", (200, 100)), "question": "Q", "answer": "[0.1, 0.2, 0.55, 0.8]"}
    table = [row | {"index": i, "category": f"RefCOCO {split}"} for i, split in enumerate(("val", "testA"))]
    samples = list(read_samples("refcoco", write(tmp_path / "RefCOCO.tsv", table)))
    frame = BoxFrame(200, 100, 1000, 1000)
    replies = [("<think>[1, 2, 3, 4]</think>[100, 200, 550, 1200]", frame), ("nowhere", frame)]
    export_predictions(tmp_path / "out.tsv", samples, replies)
    first, second = exported(tmp_path / "out.tsv")
    assert (first["index"], second["index"]) == ("RefCOCO_val_0", "RefCOCO_testA_1")
    assert json.loads(first["prediction"]) == pytest.approx([0.1, 0.2, 0.55, 1])
    assert json.loads(second["prediction"]) == [0, 0, 0, 0]


def test_other_columns_of_options_and_answers(tmp_path):
    listed = question(0, answer="B", A="", B="", category="Perception/OCR")
    listed["multi-choice options"] = "['(A) red', '(B) a (B) sign', '(C) blue', '(D) x', '(E) none']"
    (mme,) = read_samples("mme_realworld_lite", write(tmp_path / "mme.tsv", [listed]))
    assert mme.options == {"A": "red", "B": "a (B) sign", "C": "blue", "D": "x", "E": "none"}
    listed |= {"A": "(A) red", "B": "green", "multi-choice options": "The choices are listed below:\n(A) red"}
    (mme,) = read_samples("mme_realworld", write(tmp_path / "mme.tsv", [listed]))
    assert mme.options == {"A": "red", "B": "green"}
    (math,) = read_samples(
        "mathvision",
        write(tmp_path / "m.tsv", [question(0, A="", B="", choices="['1', '2', '3']", answer="C")]),
    )
    assert math.options == {"A": "1", "B": "2", "C": "3"} and judge(math, "\\boxed{3}")["right"] == 1
    free = [question(0, A="", B="", choices="[]", answer="2.5"), question(1, A="", B="", answer="(C)")]
    number, letter = read_samples("mathvision", write(tmp_path / "f.tsv", free))
    assert number.options == letter.options == {} and letter.answer == "C"
    assert judge(number, "<think>3</think><answer>2.5</answer>")["right"] == 1
    assert judge(number, "So we get\nThe answer is $2.5$.")["right"] == 1
    assert judge(number, "2.55")["right"] == 0 and judge(number, "")["parsed"] is False
    assert judge(letter, "I choose (c).")["right"] == 1 and judge(letter, "none")["parsed"] is False
    two = question(0, answer="A, C")
    (several,) = read_samples("logicvista", write(tmp_path / "l.tsv", [two]))
    assert judge(several, "<answer>AC</answer>")["right"] == 1 and judge(several, "A")["right"] == 0
    (half,) = read_samples("mathverse", write(tmp_path / "v.tsv", [question(0, A="", B="", answer=".5")]))
    assert half.answer == ".5" and judge(half, "5")["right"] == 0
    (ocr,) = read_samples(
        "ocrbench", write(tmp_path / "o.tsv", [question(0, answer="['a b', \"it's\"]", category="x")])
    )
    assert ocr.answers == ("a b", "it's")


def test_every_row_of_the_table_reads_its_kind(tmp_path):
    for name, benchmark in BENCHMARKS.items():
        answer = {"choice": "A", "yesno": "Yes", "string": "['x']", "box": "[1, 2, 30, 40]"}[benchmark.kind]
        row = question(0, answer=answer, category="c", cycle_category="0", source="COCO", split="2D")
        row["split"] = name if benchmark.kind == "box" else "2D"
        path = write(tmp_path / f"{len(name)}.tsv", [row])
        (sample,) = read_samples(name, path)
        assert sample.kind == benchmark.kind
        reply = {"choice": "(A)", "yesno": "yes", "string": "X!", "box": "[1, 2, 30, 40]"}[benchmark.kind]
        row = judge(sample, reply)
        if name != "hallusionbench":
            assert aggregate(name, [row])["score"] == 100
    judged = {name for name, benchmark in BENCHMARKS.items() if benchmark.judged}
    assert judged == {"babyvision", "mathvision", "mathverse", "wemath", "logicvista"}


# ---------------------------------------------------------------- replies

OPTIONS = {"A": "red", "B": "dark red", "C": "the dog", "D": "None", "E": "3"}
REPLIES = [
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("[B]", "B"),
    ("b)", "B"),
    ("**B**", "B"),
    ("$B$", "B"),
    (" \n B\n", "B"),
    ("'B'", "B"),
    ('"C".', "C"),
    ("B: dark red", "B"),
    ("B. dark red", "B"),
    ("B.Dark red", "B"),
    ("B dark red", "B"),
    ("(B) dark red, not red", "B"),
    ("B\n\nThe A-frame house has a roof.", "B"),
    ("B, because a dog is there", "B"),
    ("Option B", "B"),
    ("Option (c) is right.", "C"),
    ("Answer: D", "D"),
    ("**Answer**: D", "D"),
    ("Answer:**D**", "D"),
    ("The answer is B.", "B"),
    ("The answer is (b)", "B"),
    ("The answer is: **B**", "B"),
    ("The correct option is C, as the A-frame shows.", "C"),
    ("The best answer is:\n\nC", "C"),
    ("The answer is option E.", "E"),
    ("First the answer is A. No, the answer is C.", "C"),
    ("The answer is dark red.", "B"),
    ("It looks blue next to the dog. The answer is red.", "A"),
    ("The answer is a red car", "A"),
    ("The answer is A because it is so.", "A"),
    ("A is correct", "A"),
    ("A", "A"),
    ("A.", "A"),
    ("a", "A"),
    ("a)", "A"),
    ("A red", "A"),
    ("A: red", "A"),
    ("A\nbecause the car is so", "A"),
    ("A dog is on the lawn", None),
    ("A Labrador, it seems", None),
    ("It is a car.", None),
    ("It is a car, so I choose D", "D"),
    ("A car near the dog", "C"),
    ("I think it is C", "C"),
    ("I'd say E", "E"),
    ("I'm not sure.", None),
    ("Between A and B I cannot tell", None),
    ("A or B", None),
    ("A and C are wrong", None),
    ("\\boxed{C}", "C"),
    ("\\boxed{\\text{C}}", "C"),
    ("\\boxed{\\textbf{(C)}}", "C"),
    ("\\boxed{A} was my first guess, finally \\boxed{D}", "D"),
    ("A is red, so \\boxed{dark red}", "B"),
    ("Step A: look. \\boxed{B}. The answer is C", "B"),
    ("<think>A? B?</think><answer>C</answer>", "C"),
    ("<think>The answer is A</think> B", "B"),
    ("thought without a start: A</think>\n\nB.", "B"),
    ("<think>x</think><answer>(B) dark red</answer>", "B"),
    ("<answer>A</answer> or rather <answer>B</answer>", "B"),
    ("<think>the answer is B", None),
    ("<think>B</think>", None),
    ("<think>I give \\boxed{A}</think><answer>\\boxed{D}</answer>", "D"),
    ("<answer>C", "C"),
    ("<answer></answer>", None),
    ("dark red", "B"),
    ("Dark  Red!", "B"),
    ("red", "A"),
    ("The car is red.", "A"),
    ("red and the dog", None),
    ("reddish", None),
    ("none", "D"),
    ("None of it", "D"),
    ("3", "E"),
    ("There are 3 of them", "E"),
    ("3.5", None),
    ("13", None),
    ("1.3", None),
    ("F", None),
    ("Z", None),
    ("Dad", None),
    ("Because", None),
    ("Cat", None),
    ("e.g. this", None),
    ("C++ code", None),
    ("B-52", None),
    ("It's Bob's.", None),
    ("x = A's width", None),
    ("D3", None),
    ("", None),
    ("!?", None),
    ("答案:B", "B"),
]


@pytest.mark.parametrize(("reply", "letter"), REPLIES)
def test_options_are_extracted(reply, letter):
    assert choice_of(reply, OPTIONS) == letter


def test_only_letters_among_the_options_count_and_equal_texts_decide_nothing():
    assert choice_of("C", {"A": "x", "B": "y"}) is None
    assert choice_of("The answer is C, not B", {"A": "x", "B": "y"}) == "B"
    assert choice_of("same", {"A": "same", "B": "same"}) is None
    assert choice_of("B", {"A": "", "B": ""}) == "B" and choice_of("B", {}) is None
    nine = dict.fromkeys("ABCDEFGHI", "")
    assert (
        choice_of("I think so", nine) is None
        and choice_of("I", nine) == "I"
        and choice_of("(i)", nine) == "I"
    )
    assert choice_of("It is a.b(c", {"A": "a.b(c", "B": "*["}) == "A"


def test_garbage_never_raises_and_takes_no_time():
    rng = random.Random(0)
    pieces = [
        "\\boxed{",
        "{",
        "}",
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "answer is ",
        "(",
        "A",
        " ",
        "\n",
    ]
    pieces += [
        "[1, 2, 3, 4]",
        "[",
        "B.",
        "no",
        "yes",
        "\x00",
        "\ud800",
        "é",
        "答",
        "*",
        "$",
        "red ",
        "3.",
        "1" * 400,
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 30)))
        assert choice_of(text, OPTIONS) in (*OPTIONS, None) and yes_no(text) in ("yes", "no", None)
    for piece in pieces:
        text = piece * (100_000 // len(piece))
        start = time.process_time()
        choice_of(text, OPTIONS)
        assert time.process_time() - start < 0.1, repr(piece)  # 0.05 s on an idle machine


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Yes", "yes"), ("no.", "no"), ("YES, there is no doubt", "yes"), ("No, yes is wrong", "no"),
        ("There is no dog.", "no"), ("I would say yes", "yes"), ("The answer is Yes.", "yes"), ("", None),
        ("<think>no</think><answer>Yes</answer>", "yes"), ("\\boxed{no} yes", "no"), ("yes or no", "yes"),
        ("It may be yes or no", None), ("nothing", None), ("eyes", None), ("<think>yes", None),
    ],
)  # fmt: skip
def test_yes_and_no(reply, answer):
    assert yes_no(reply) == answer


def read_one(tmp_path, name: str, **cells):
    (sample,) = read_samples(name, write(tmp_path / "refcoco.tsv", [question(0, **cells)]))
    return sample


def test_boxes_are_judged_in_pixels(tmp_path):
    sample = read_one(tmp_path, "refcoco", answer="[10, 20, 110, 80]")
    hit = judge(sample, "<think>x</think><answer>[10, 20, 110, 80]</answer>")
    cells = {"fields": sample.row, "answer": sample.answer}
    assert hit == cells | {
        "prediction": "[10.0, 20.0, 110.0, 80.0]",
        "parsed": True,
        "right": 1.0,
        "iou": 1.0,
    }
    half = judge(sample, "[10, 20, 60, 80]")
    assert half["iou"] == 0.5 and half["right"] == 1  # at 0.5 it counts
    assert judge(sample, "[10, 20, 59, 80]")["right"] == 0
    assert judge(sample, '```json\n[{"bbox_2d": [10, 20, 110, 80], "label": "cup"}]\n```')["iou"] == 1
    assert judge(sample, "[1, 2, 3, 4] no, [10, 20, 110, 80]")["iou"] == 1
    assert judge(sample, '<answer>{"bbox_2d": [10,20,110,80]}</answer>')["iou"] == 1
    for reply in ("", "nowhere", "[110, 80, 10, 20]", "[1, 2, 3]", "<think>[10, 20, 110, 80]"):
        assert judge(sample, reply) == cells | {"prediction": None, "parsed": False, "right": 0.0, "iou": 0.0}
    frame = BoxFrame(200, 100, 1000, 1000)
    assert judge(sample, "[50, 200, 550, 800]", frame)["iou"] == pytest.approx(1)
    assert judge(sample, "[" * 100_000)["parsed"] is False


def test_ocrbench_accepts_a_reply_that_contains_an_answer(tmp_path):
    text = read_one(tmp_path, "ocrbench", answer="['Cafe Noir', 'noir']", category="Regular Text Recognition")
    for reply, right in (("It says CAFE\nNOIR.", 1), ("Noir", 1), ("CafeN oir", 0), ("", 0)):
        assert judge(text, reply)["right"] == right
    formula = "Handwritten Mathematical Expression Recognition"
    math = read_one(tmp_path, "ocrbench", answer="['\\\\frac { a } { B }']", category=formula)
    for reply, right in (("$\\frac{a}{B}$", 1), ("\\frac {a}\n{B}", 1), ("\\frac{a}{b}", 0)):
        assert judge(math, reply)["right"] == right, reply
    single = read_one(tmp_path, "ocrbench", answer="42", category="x")
    assert judge(single, "<think>7</think><answer>42</answer>")["right"] == 1
    assert judge(single, "")["parsed"] is False


# ---------------------------------------------------------------- figures


def row(right, **fields) -> dict:
    return {"right": float(right), "parsed": True, "prediction": "A", "answer": "A", "fields": fields}


def test_accuracy_by_category():
    rows = [row(1, category="x"), row(0, category="x"), row(1, category="y"), row(1)]
    got = aggregate("mmstar", [*rows[:3], rows[3] | {"parsed": False}])
    assert got == {"score": 75, "count": 3, "n": 4, "parse_rate": 0.75, "x": 50, "y": 100}
    with pytest.raises(UserError):
        aggregate("mmstar", [])


def test_a_category_never_hides_an_official_figure():
    rows = [row(1, category="count"), row(0, category="n"), row(1, category="score")]
    got = aggregate("mmstar", rows)
    assert (got["count"], got["n"], got["score"]) == (2, 3, pytest.approx(200 / 3))
    assert (got["category count"], got["category n"], got["category score"]) == (100, 0, 100)


def test_hrbench_is_the_mean_over_cycles():
    # Cycle 0 has 2 of 2 right, cycle 1 has 1 of 4: the mean of 100 and 25, and not 3 of 6.
    rows = [row(1, cycle_category="0", category="single"), row(1, cycle_category="0", category="cross")]
    rows += [
        row(r, cycle_category="1", category=c)
        for r, c in zip((1, 0, 0, 0), ("single", "single", "cross", "cross"))
    ]
    got = aggregate("hrbench4k", rows)
    assert (got["score"], got["0"], got["1"]) == (62.5, 100, 25)
    assert (got["single"], got["cross"]) == (75, 50)  # (100 + 50) / 2 and (100 + 0) / 2


def test_cvbench_is_the_mean_of_2d_and_3d_and_2d_of_its_sources():
    flat = [
        row(r, split="2D", source=s)
        for r, s in ((1, "ADE20K"), (0, "COCO"), (1, "COCO"), (0, "COCO"), (0, "COCO"))
    ]
    deep = [row(r, split="3D", source="Omni3D") for r in (1, 1, 1, 0)]
    assert aggregate("cvbench2d", flat)["score"] == 62.5  # (100 + 25) / 2, not 2 of 5
    assert aggregate("cvbench3d", deep)["score"] == 75
    got = aggregate("cvbench", flat + deep)
    assert (got["score"], got["2D"], got["3D"], got["ADE20K"], got["COCO"]) == (68.75, 62.5, 75, 100, 25)


def test_mme_realworld_by_task_and_subtask():
    rows = [
        row(1, category="Perception/OCR"),
        row(1, category="Perception/Remote"),
        row(0, category="Perception/Remote"),
    ]
    got = aggregate("mme_realworld", [*rows, row(0, category="Reasoning/OCR")])
    assert got["score"] == 50 and got["Perception"] == pytest.approx(200 / 3) and got["Reasoning"] == 0
    assert got["Perception/OCR"] == 100 and got["Perception/Remote"] == 50


def test_pope_by_hand():
    def judged(answer, prediction, category):
        return {"answer": answer, "prediction": prediction, "parsed": prediction is not None} | {
            "right": float(answer == prediction), "fields": {"category": category}}  # fmt: skip

    rows = [judged("yes", "yes", "random"), judged("yes", "no", "random"), judged("no", "yes", "random")]
    rows += [
        judged("no", None, "random,popular"),
        judged("yes", None, "popular"),
        judged("yes", "yes", "popular"),
    ]
    got = aggregate("pope", rows)
    # random: TP 1, FP 1, FN 1, and the unparsed "no": F1 2/4, accuracy 1/4.
    assert (got["random f1"], got["random accuracy"]) == (50, 25)
    # popular: TP 1, FN 1 (unparsed), precision 1/1, recall 1/2, F1 2/3, accuracy 1/3.
    assert (got["popular precision"], got["popular recall"]) == (100, 50)
    assert got["popular f1"] == pytest.approx(200 / 3) and got["popular accuracy"] == pytest.approx(100 / 3)
    # All: the row of two categories counts twice (7 questions). TP 2, FP 1, FN 2: F1 4/7, accuracy 2/7.
    assert got["score"] == got["f1"] == pytest.approx(400 / 7) and got["accuracy"] == pytest.approx(200 / 7)
    assert got["precision"] == pytest.approx(200 / 3) and got["recall"] == 50
    assert got["n"] == 6 and got["parse_rate"] == pytest.approx(4 / 6)
    assert aggregate("pope", [judged("no", "no", "random")])["f1"] == 0
    got = aggregate("pope", [judged("yes", "yes", "random"), judged("no", "yes", "")])
    assert (got["accuracy"], got["random accuracy"]) == (50, 100), "a row without a category counts once"


def test_hallusionbench_by_hand():
    def judged(right, index, kind):
        return row(right, index=index, category=index[:2], **{"l2-category": kind})

    rows = [judged(1, "VD_illusion_1_0_0_0", "illusion"), judged(1, "VD_illusion_1_0_0_1", "illusion")]
    rows += [judged(1, "VD_illusion_2_0_1_0", "illusion"), judged(0, "VD_illusion_2_0_1_1", "illusion")]
    rows += [judged(0, "VS_chart_1_0_0_0", "chart")]  # same numbers, another sub-category
    got = aggregate("hallusionbench", rows)
    # Figures: illusion 0 right, illusion 1 not, chart not. Questions: illusion 0 right, 1 not, chart not.
    assert got["aAcc"] == got["score"] == 60
    assert got["fAcc"] == pytest.approx(100 / 3) and got["qAcc"] == pytest.approx(100 / 3)
    got = aggregate("hallusionbench", rows[:3])
    assert (got["aAcc"], got["fAcc"], got["qAcc"], got["mean"]) == (100, 100, 100, 100)
    rows = [judged(r, f"VD_map_1_3_{figure}_0", "map") for r, figure in ((1, 0), (1, 1), (0, 2), (0, 3))]
    got = aggregate("hallusionbench", rows)  # four figures of one question
    assert (got["aAcc"], got["fAcc"], got["qAcc"]) == (50, 50, 0) and got["mean"] == pytest.approx(100 / 3)


def test_refcoco_is_the_mean_of_its_splits():
    rows = [row(r, split="RefCOCO val") | {"iou": 0.5} for r in (1, 1, 1, 0)]
    rows += [row(0, split="RefCOCO testA") | {"iou": 0.1}]
    got = aggregate("refcoco", rows)
    assert (got["score"], got["RefCOCO val"], got["RefCOCO testA"]) == (37.5, 75, 0)
    assert got["mean_iou"] == pytest.approx(42)


def test_ocrbench_counts():
    rows = [
        row(i < 820, category="Doc-oriented VQA" if i < 200 else "Key Information Extraction")
        for i in range(1000)
    ]
    got = aggregate("ocrbench", rows)
    assert (got["count"], got["score"], got["Doc-oriented VQA"]) == (820, 82, 100)
