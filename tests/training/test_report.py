"""report.html: what is on it, hostile text, folders that lack files, and how a browser shows it."""

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import eval as eval_module
from files.errors import UserError
from prompts import FAMILIES
from training.experiment import write_report
from training.run_folder import input_files, write_config
from training.settings import resolve

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = (
    '<script>document.title = "taken over"</script><img src="http://example.com/x.png" onerror="alert(1)">',
    "</pre></li></ol></section></body><h1>outside</h1><!--",
    '"><style>body { display: none }</style>&lt;b&gt; $name ${groups} $$ \u202e\x00\x07 \U0001f600',
    "w" * 3000,
)
FILES = ("adapter/README.md", "before_after.png", "completions.jsonl")
TABLE = "held-out      n  before  after       change\ncue <search>  40    12.5   37.5  +25.0 ± 12.5\n"


def completion_of(text: str, advantage: float) -> dict:
    box = [10, 20, 60, 70] if advantage > 0 else None
    return {"text": text, "box": box, "advantage": advantage, "total": 0.5, "iou": 0.4, "format": 1.0}


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of a run with every file that the page shows, and completions made to break the page."""
    folder = tmp_path / "<b>run & co"
    folder.mkdir()
    cfg, origin = resolve({"lr": 0.25, "steps": 3, "out": folder}, FAMILIES["tiny"])
    write_config(folder, None, cfg, origin, {"task": "locus"})
    history = [{"step": i, "reward": 0.2 * i, "iou": 0.1 * i, "format": 1.0, "kl": 0.01} for i in range(3)]
    write_lines(folder / "metrics.jsonl", history)
    group = [completion_of(text, 1.5 - i) for i, text in enumerate(HOSTILE)]
    lines = [{"step": step, "cue": step, "completions": group} for step in range(3)]
    write_lines(folder / "completions.jsonl", lines)
    boxes = {"boxes": [(10, 20, 60, 70)] * 50, "ious": [0.5] * 50}
    write_lines(folder / "evaluations.jsonl", [{"step": step} | boxes for step in (0, 2)])
    (folder / "adapter").mkdir()
    (folder / "adapter" / "README.md").write_text(f"# Card\n\n```\n{TABLE}```\n\n```python\nx\n```\n")
    (folder / "scenes-1").mkdir()
    for name in ("before_after.png", "scenes-1/attention.png"):
        Image.new("RGB", (1280, 300), "#123456").save(folder / name)
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.texts, self.inside = [], {}, ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.inside, []).append(data)

    def count(self, tag: str) -> int:
        return [name for name, _ in self.tags].count(tag)


def test_hostile_completions_are_text(folder):
    write_report(folder)
    page = Page(folder / "report.html")
    assert page.count("script") == page.count("style") == 1 and page.count("section") == 3
    assert page.count("li") == page.count("pre") - 1 == 3 * len(HOSTILE)
    raw = (folder / "report.html").read_text(encoding="utf-8")
    _, *shown = re.findall(r"<pre>(.*?)</pre>", raw, re.DOTALL)  # the first is the table of scores
    assert [unescape(text) for text in shown] == 3 * list(HOSTILE)
    assert not [text for text in shown if "<" in text]
    assert all(name in ("meta", "script", "style") or "onerror" not in given for name, given in page.tags)
    assert page.texts["h1"][0].startswith("<b>run & co")


def test_nothing_is_loaded_from_elsewhere(folder):
    write_report(folder)
    page = Page(folder / "report.html")
    sources = [given["src"] for _, given in page.tags if "src" in given]
    assert len(sources) == 3 + 4, "three groups, curve, learning, before and after, attention"
    assert all(source.startswith("data:image/") for source in sources)
    assert not [tag for tag, given in page.tags if tag in ("link", "iframe", "object") or "href" in given]
    kinds = [source.partition(";")[0].rpartition("/")[2] for source in sources]
    assert sorted(kinds) == ["gif", "jpeg", "jpeg", "jpeg", "png", "png", "png"]


def test_what_was_set_by_hand_and_the_scores_are_on_the_page(folder):
    write_report(folder)
    cells = Page(folder / "report.html").texts["td"]
    assert cells[:9] == ["--out", str(folder), "flag", "--steps", "3", "flag", "--lr", "0.25", "flag"]
    assert Page(folder / "report.html").texts["pre"][0] == TABLE


@pytest.mark.parametrize("name", [*FILES, "metrics.jsonl", "evaluations.jsonl", "scenes-1"])
def test_what_is_missing_is_left_out_with_a_sentence(name, folder):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    drawn = {"metrics.jsonl": "curve.png", "evaluations.jsonl": "learning.gif", "scenes-1": "*/attention.png"}
    write_report(folder)
    texts = "".join(Page(folder / "report.html").texts["p"])
    assert re.findall(r"There is no (\S+) in the run folder", texts) == [drawn.get(name, name)]


def test_groups_without_their_photos_keep_their_completions(folder, tmp_path):
    """The folder of photos is gone, or has another photo now: no box may be drawn on another image."""
    photos, config = tmp_path / "photos", json.loads((folder / "config.json").read_text())
    photos.mkdir()
    for i in range(40):
        Image.new("RGB", (300, 300), (i, 0, 0)).save(photos / f"{i}.png")
    config |= {"data": str(photos), "source": "random"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "inputs.json").write_text(json.dumps(input_files(photos)))
    write_report(folder)
    assert Page(folder / "report.html").count("img") == 3 + 4
    (folder / "learning.gif").unlink()
    for change in (lambda: (photos / "3.png").write_bytes(b"other"), lambda: shutil.rmtree(photos)):
        change()
        write_report(folder)
        page = Page(folder / "report.html")
        assert page.count("img") == 3 and page.count("pre") == 1 + 3 * len(HOSTILE)
        assert "Images are left out." in "".join(page.texts["p"])


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "completions.jsonl"])
@pytest.mark.parametrize("content", ["[]\n", '{"step": 1}\n', "no JSON\n", "\xff\n", "[" * 10**5 + "\n"])
def test_a_damaged_file_is_one_sentence(name, content, folder):
    if name == "metrics.jsonl" and content.startswith(("{", "[")):
        content = '{"step": 1, "reward": "high"}\n'
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="holds a file that no run writes"):
        write_report(folder)


@pytest.mark.parametrize("arguments", [["nothing"], ["."], []])
def test_a_folder_without_a_run_is_one_sentence(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py", "report", *arguments])
    with pytest.raises(SystemExit) as stopped:
        eval_module.main()
    problem = "config.json: no such file" if arguments else "eval.py report needs the folder of a run"
    assert stopped.value.code == 2 and problem in capsys.readouterr().err


# ---------------------------------------------------------------- in a browser

FRAME = """<iframe src="page.html#step-1" width="390" height="800"></iframe><pre></pre><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, rows = [];
  const sections = [...page.querySelectorAll("section")], slider = page.querySelector("input");
  const note = () => rows.push(sections.map((section) => section.offsetHeight > 0));
  note();
  for (const value of [0, 2]) { slider.value = value; slider.dispatchEvent(new Event("input")); note(); }
  page.querySelector("details").open = true;
  const wide = page.documentElement.scrollWidth, ground = getComputedStyle(page.querySelector("li")).color;
  document.querySelector("pre").textContent = JSON.stringify({ rows, wide, title: page.title, ground });
}</script>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_one_group_and_no_page_wider_than_a_phone(dark, folder, tmp_path):
    """On a frame of 390 pixels: the step in the address, then both ends of the slider."""
    write_report(folder)
    shutil.copyfile(folder / "report.html", tmp_path / "page.html")
    (tmp_path / "frame.html").write_text(FRAME)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    command += ["--blink-settings=preferredColorScheme=0"] * dark
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    found = json.loads(unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1]))
    assert found["rows"] == [[False, True, False], [True, False, False], [False, False, True]]
    assert found["wide"] <= 390
    assert found["title"] == folder.name, "no script of a completion has run"
    assert (found["ground"] == "rgb(255, 255, 255)") == dark
