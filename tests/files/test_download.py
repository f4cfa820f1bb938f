"""`python data.py fetch` and a server on this machine: what training draws comes, whatever else is served."""

import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_data import Corpus, an_id, looks, noise

import data
from data import CueConfig, open_cues
from files import download
from files.pictures import UnusableImage
from training.settings import read_flags


class Server(ThreadingHTTPServer):
    """Serves a folder's files, each in the ways that `ways` lists for it: the last one from then on."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ways, self.asked, self.wait = folder, {}, Counter(), 0.0
        self.at = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is no error of the server's."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def send(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        time.sleep(self.server.wait)
        ways = self.server.ways.get(name, ["whole"])
        body = (self.server.folder / name.removeprefix("moved/")).read_bytes()
        match ways.pop(0) if len(ways) > 1 else ways[0]:
            case "whole":
                self.send(200, body)
            case int(code):
                self.send(code)
            case bytes(other):
                self.send(200, other)
            case str(place) if ":" in place or place.startswith("/"):
                self.send(302, Location=place)
            case "cut":
                self.send(200, body[:-500], Content_Length=len(body))
            case "vast":
                self.send(200, body, Content_Length=10**15)
            case way:  # endless, or in drips
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(bytes(2**16) if way == "endless" else b"\xff")
                    time.sleep(0 if way == "endless" else 0.05)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A COCO of 24 training and 4 held-out images, whose addresses are the server's."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "RETRY_PAUSES", [pause / 100 for pause in download.RETRY_PAUSES])
    corpus = Corpus(tmp_path)
    with Server(corpus.images) as server:
        for k in range(28):
            number = an_id(k >= 24, k)
            corpus.image(number, noise(320 + k, 240, k), name=f"{k}.jpg")
            corpus.json["images"][-1]["coco_url"] = f"{server.at}/{k}.jpg"
            corpus.box(number, 2 * k, 3 * k, 18, 18)
            corpus.box(number, 100, 100, 40 + k, 40)
            corpus.box(number, 10, 20, 200, 150, kind=7)
        (tmp_path / "ids.txt").write_text(str(an_id(False)))
        server.corpus, server.file = corpus, corpus.file
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def command(server: Server, folder: Path, *more: object) -> list[str]:
    words = [data.__file__, "fetch", folder, "--annotations", server.file, "--heldout", 6, *more]
    return [str(word) for word in (*words, "--exclude", server.file.with_name("ids.txt"))]


def run(server: Server, folder: Path, monkeypatch, capsys, *more: object) -> tuple[int, str, str]:
    """The command in this process: exit code, standard output, and the last line of standard error."""
    server.file = server.corpus.file
    monkeypatch.setattr(sys, "argv", command(server, folder, *more))
    capsys.readouterr()
    code = 0
    try:
        data.main()
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err.strip().splitlines()[-1] if err.strip() else ""


def drawn(server: Server, folder: Path, limit: int, seed: int = 0, source: str = "object", **files) -> list:
    """The cues that locus_mini.py gets from a folder: what they look like, pixels included."""
    files |= dict(annotations=server.file, images=folder, exclude=server.file.with_name("ids.txt"))
    cues = open_cues("coco", "train", seed, CueConfig(source), **files)
    unseen = open_cues("coco", "heldout", 0, CueConfig(), **files)
    return [looks(cues[i]) for i in range(limit)] + [looks(unseen[i]) for i in range(6)]


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ---------------------------------------------------------------- what comes


def test_the_program_brings_what_the_first_cues_use_and_no_more(server, tmp_path):
    there = tmp_path / "my images"
    words = [sys.executable, *command(server, there, "--limit", 8, "--seed", 3)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert set(server.asked.values()) == {1} and set(server.asked) == names(there)
    assert 7 < len(server.asked) < 16, "not the whole folder"
    assert drawn(server, there, 8, seed=3) == drawn(server, server.folder, 8, seed=3)
    megabytes = sum(path.stat().st_size for path in there.iterdir()) / 1e6
    said = f"8 training and 6 held-out cues: {len(server.asked)} images, {megabytes:,.1f} MB; "
    assert done.stdout.startswith(said + f"of 28 images of {server.file} left out: none; go on with: ")
    _, program, *flags = shlex.split(done.stdout.partition("go on with: ")[2])
    assert program == "locus_mini.py"
    given = read_flags("", flags)
    assert given["images"] == there and given["exclude"] == tmp_path / "ids.txt" and given["seed"] == 3
    assert given["steps"] * given["prompts"] <= 8 and given["eval_cues"] == 6


@pytest.mark.parametrize("source", data.SOURCES)
def test_cues_are_those_of_the_full_folder(server, tmp_path, monkeypatch, capsys, source):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"103": "the upper one"}))
    more = ("--limit", 12, "--source", source, "--seed", 1, "--expressions", texts)
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, *more)
    assert code == 0, err
    folders = (tmp_path / "new", server.folder)
    one, other = (drawn(server, folder, 12, 1, source, expressions=texts) for folder in folders)
    assert one == other and f"--source {source} " in out


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_one_goes_on_and_asks_nothing_twice(server, tmp_path, monkeypatch, capsys, number):
    server.wait, new = 0.2, tmp_path / "new"
    words = [sys.executable, *command(server, new, "--limit", 40)]
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` may have it ignored
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, usual)
    while server.asked.total() < 18:
        time.sleep(0.01)
        assert process.poll() is None
    began = time.monotonic()
    process.send_signal(number)
    said, code = process.communicate(timeout=60)[1], process.returncode
    assert time.monotonic() - began < 5
    assert code == -number if number == signal.SIGKILL else code == 130
    assert number == signal.SIGKILL or said.endswith("Stopped. The same command goes on from here.\n")
    server.wait, before = 0, Counter(server.asked)
    came = {name for name in names(new) if not name.endswith(".part")}
    assert len(came) >= 8
    for name in before:
        if name not in came:
            (new / f"{name}.part").write_bytes((server.folder / name).read_bytes()[:900])
    code, _, err = run(server, new, monkeypatch, capsys, "--limit", 40)
    assert code == 0, err
    assert all(server.asked[name] == 1 for name in came), "what had come was not asked for again"
    assert max(server.asked.values()) <= 2
    assert names(new) == set(server.asked), "and no part is left"
    assert drawn(server, new, 40) == drawn(server, server.folder, 40)


def test_what_is_there_is_kept_unless_it_is_broken(server, tmp_path, monkeypatch, capsys):
    run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    first, second, third = sorted(names(tmp_path / "new"))[:3]
    (tmp_path / "new" / first).write_bytes(b"")
    (tmp_path / "new" / second).write_bytes((server.folder / second).read_bytes()[:900])
    noise(100, 100).save(tmp_path / "new" / third)
    server.asked.clear()
    assert run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)[0] == 0
    assert server.asked == {first: 1, second: 1, third: 1}
    assert drawn(server, tmp_path / "new", 40) == drawn(server, server.folder, 40)


# ---------------------------------------------------------------- what does not come

PASSING = {  # how it is served, and how often it is asked for
    "cut off": (["cut", "whole"], 2),
    "an error of the server's": ([500, 503, "whole"], 3),
    "too many": ([429, 429, 429, "whole"], 4),
    "a page of sorrow": ([b"<html>later</html>", "whole"], 2),
    "nothing": ([b"", "whole"], 2),
}
LASTING = {  # how it is served, how often it is asked for, what is said
    "gone": ([404], 1, "answered with HTTP 404"),
    "always an error": ([500], 4, "answered with HTTP 500"),
    "a page": ([b"<html>not found</html>"], 4, "broken, or no picture"),
    "cut off": (["cut"], 4, "cut off"),
    "vast": (["vast"], 1, "over 1 MB"),
    "endless": (["endless"], 1, "over 1 MB"),
    "dripping": (["drips"], 4, "too slow"),
    "another size": (["turned"], 4, "of another size than annotated"),
    "a file of this machine": (["file:///etc/hostname"], 1, "answered with HTTP 302"),
    "another protocol": (["ftp://127.0.0.1/1.jpg"], 4, "out of reach"),
    "round and round": (["/7.jpg"], 5, "answered with HTTP 302"),
}


@pytest.mark.parametrize("case", PASSING)
def test_what_fails_for_a_moment_is_asked_again(server, tmp_path, monkeypatch, capsys, case):
    ways, times = PASSING[case]
    server.ways["7.jpg"] = list(ways)
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    assert code == 0 and "left out: none" in out, err
    assert server.asked["7.jpg"] == times and names(tmp_path / "new") == set(server.asked)
    assert drawn(server, tmp_path / "new", 40) == drawn(server, server.folder, 40)


@pytest.mark.parametrize("case", LASTING)
def test_what_cannot_be_had_is_counted_and_another_cue_drawn(server, tmp_path, monkeypatch, capsys, case):
    ways, times, why = LASTING[case]
    monkeypatch.setattr(download, "MAX_BYTES", 1_000_000)
    monkeypatch.setattr(download, "MAX_SECONDS", 0.2)
    noise(240, 327).save(server.folder / "turned.jpg")
    turned = (server.folder / "turned.jpg").read_bytes()
    server.ways["7.jpg"] = [turned] if ways == ["turned"] else ways
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    assert code == 0 and f"left out: 1 {why}; go on" in out, (out, err)
    assert server.asked["7.jpg"] == times
    assert names(tmp_path / "new") == set(server.asked) - {"7.jpg"}
    (server.folder / "7.jpg").unlink()
    assert drawn(server, tmp_path / "new", 40) == drawn(server, server.folder, 40)


def test_a_redirect_to_another_address_is_followed(server, tmp_path, monkeypatch, capsys):
    server.ways["7.jpg"] = [f"{server.at}/moved/7.jpg"]
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    assert code == 0 and "left out: none" in out and server.asked["moved/7.jpg"] == 1, err


ADDRESSES = [
    None,
    7,
    [],
    {},
    "",
    "7.jpg",
    "file:///etc/hostname",
    "ftp://127.0.0.1/7.jpg",
    "data:,7",
    "http://",
]
ADDRESSES += ["http://[", "http://127.0.0.1:x/", "http://127.0.0.1:99999999/", "http://127.0.0.1/a b\r\nc: d"]
ADDRESSES += [
    "http://127.0.0.1:1/\ud800",
    f"http://{'a' * 300}/",
    "HTTP:///7.jpg",
    f"http://127.0.0.1:{9**99}/",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_is_none_is_why(address):
    with pytest.raises(UnusableImage):
        download.fetch_bytes(address)


def test_an_image_without_an_address_is_counted(server, tmp_path, monkeypatch, capsys):
    for k, address in ((5, None), (6, ""), (7, f"file://{server.folder}/7.jpg")):
        server.corpus.json["images"][k]["coco_url"] = address
    del server.corpus.json["images"][8]["coco_url"]
    (tmp_path / "new").mkdir()
    shutil.copy(server.folder / "8.jpg", tmp_path / "new")
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 120)
    assert code == 0, err
    assert (
        server.asked["8.jpg"] == 0
        and "2 without an address" in out
        and "1 whose address is not of http or https" in out
    )
    for k in (5, 6, 7):
        (server.folder / f"{k}.jpg").unlink()
    assert drawn(server, tmp_path / "new", 120) == drawn(server, server.folder, 120)


NAMES = ["../7.jpg", "a/../../7.jpg", "C:\\7.jpg", "..\\7.jpg", "", ".", "a\0.jpg", "a" * 300, "1.jpg/7.jpg"]
NAMES += ["\ud800.jpg", "deep/er/7.jpg"]


def test_no_name_leads_out_of_the_folder_or_ends_the_program(server, tmp_path, monkeypatch, capsys):
    images = server.corpus.json["images"]
    for image, name in zip(images[10:], (*NAMES, str(tmp_path / "7.jpg"))):
        image["file_name"] = name
    before = names(tmp_path)
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 120)
    assert code == 0 and " whose name no file can have" in out, err
    new = names(tmp_path / "new")
    assert names(tmp_path) - before == {"new"} | {f"new/{name}" for name in new}
    assert "deep/er/7.jpg" in new and not any(name.endswith(".part") for name in new)
    assert len(drawn(server, tmp_path / "new", 120)) == 126


# ---------------------------------------------------------------- how it ends


def test_without_a_network_it_ends_soon(server, tmp_path, monkeypatch, capsys):
    server.ways |= {f"{k}.jpg": [500] for k in range(28)}
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    assert (code, out, names(tmp_path / "new")) == (2, "", set())
    assert "16 images in a row failed" in err and server.at in err and "HTTP 500" in err


def test_without_any_address_it_says_so(server, tmp_path, monkeypatch, capsys):
    for image in server.corpus.json["images"]:
        del image["coco_url"]
    code, _, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    assert code == 2 and "without an address" in err and str(server.file) in err


def test_a_full_disk_is_one_sentence(server, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    server.corpus.file.write_text(json.dumps(server.corpus.json))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
        monkeypatch.setattr(Corpus, "file", server.file)
        code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (2, "") and "cannot be written (File too large): make room" in err
    assert not any((tmp_path / "new").glob("*.jpg"))


WRONG = {"--limit 0": "--limit 0", "--heldout -1": "--heldout -1", "--tiny-ratio 2": "--tiny-ratio 2.0"}
WRONG |= {"--annotations none.json": "none.json", "--exclude none.txt": "none.txt"}


@pytest.mark.parametrize("typed", [*WRONG, "a file"])
def test_wrong_use_is_one_sentence(server, tmp_path, monkeypatch, capsys, typed):
    new = server.file if typed == "a file" else tmp_path / "new"
    more = () if typed == "a file" else typed.split()
    monkeypatch.setattr(sys, "argv", [*command(server, new), *more])
    with pytest.raises(SystemExit) as stopped:
        data.main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1), err
    assert WRONG.get(typed, str(server.file)) in err and not server.asked
