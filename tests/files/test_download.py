"""`python data.py fetch` from a local server: the images of the cues arrive, whatever the server does."""

import json
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
from programs import Program
from test_data import Corpus, an_id, contents, noise

import data
from data import CueConfig, open_cues
from files import download
from files.pictures import UnusableImage
from training.settings import read_flags


class Server(ThreadingHTTPServer):
    """Serves the files of a folder. `replies` lists a file's replies, one a request; the last one repeats."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.replies, self.requests, self.delay = folder, {}, Counter(), 0.0
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that is killed is not an error of the server."""


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
        self.server.requests[name] += 1
        time.sleep(self.server.delay)
        replies = self.server.replies.get(name, ["complete"])
        body = (self.server.folder / name.removeprefix("moved/")).read_bytes()
        match replies.pop(0) if len(replies) > 1 else replies[0]:
            case "complete":
                self.send(200, body)
            case int(code):
                self.send(code)
            case bytes(content):
                self.send(200, content)
            case str(location) if ":" in location or location.startswith("/"):
                self.send(302, Location=location)
            case "incomplete":
                self.send(200, body[:-500], Content_Length=len(body))
            case "huge length":
                self.send(200, body, Content_Length=10**15)
            case pace:  # without end, fast or slow
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(bytes(2**16) if pace == "endless" else b"\xff")
                    time.sleep(0 if pace == "endless" else 0.05)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A COCO data set of 24 training and 4 held-out images with addresses on the server."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "RETRY_PAUSES", [pause / 100 for pause in download.RETRY_PAUSES])
    corpus = Corpus(tmp_path)
    with Server(corpus.images) as server:
        for k in range(28):
            number = an_id(k >= 24, k)
            corpus.image(number, noise(320 + k, 240, k), name=f"{k}.jpg")
            corpus.json["images"][-1]["coco_url"] = f"{server.address}/{k}.jpg"
            corpus.box(number, 2 * k, 3 * k, 18, 18)
            corpus.box(number, 100, 100, 40 + k, 40)
            corpus.box(number, 10, 20, 200, 150, kind=7)
        (tmp_path / "ids.txt").write_text(str(an_id(False)))
        server.corpus, server.file = corpus, corpus.file
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def command(server: Server, folder: Path, *flags: object) -> list[str]:
    words = [data.__file__, "fetch", folder, "--annotations", server.file, "--heldout", 6, *flags]
    return [str(word) for word in (*words, "--exclude", server.file.with_name("ids.txt"))]


def run(server: Server, folder: Path, monkeypatch, capsys, *flags: object) -> tuple[int, str, str]:
    """The command in this process: exit code, standard output, and the last line of standard error."""
    server.file = server.corpus.file
    monkeypatch.setattr(sys, "argv", command(server, folder, *flags))
    capsys.readouterr()
    code = 0
    try:
        data.main()
    except SystemExit as exit_error:
        code = exit_error.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err.strip().splitlines()[-1] if err.strip() else ""


def cue_contents(
    server: Server, folder: Path, limit: int, seed: int = 0, source: str = "object", **files
) -> list:
    """The contents of the cues, pixels included, that locus_mini.py draws from a folder."""
    files |= dict(annotations=server.file, images=folder, exclude=server.file.with_name("ids.txt"))
    cues = open_cues("coco", "train", seed, CueConfig(source), **files)
    heldout_cues = open_cues("coco", "heldout", 0, CueConfig(), **files)
    return [contents(cues[i]) for i in range(limit)] + [contents(heldout_cues[i]) for i in range(6)]


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ---------------------------------------------------------------- the images of the cues


def test_fetch_downloads_only_the_images_of_the_first_cues(server, tmp_path):
    folder = tmp_path / "my images"
    words = [sys.executable, *command(server, folder, "--limit", 8, "--seed", 3)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout.count("\n")) == (0, 1), process.stderr
    assert set(server.requests.values()) == {1} and set(server.requests) == names(folder)
    assert 7 < len(server.requests) < 16, "it downloads fewer images than there are"
    assert cue_contents(server, folder, 8, seed=3) == cue_contents(server, server.folder, 8, seed=3)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    summary = f"8 training and 6 held-out cues: {len(server.requests)} images, {megabytes:,.1f} MB; "
    summary += f"left out of 28 images of {server.file}: none; train with: "
    assert process.stdout.startswith(summary)
    _, program, *flags = shlex.split(process.stdout.partition("train with: ")[2])
    assert program == "locus_mini.py"
    settings = read_flags("", flags)
    assert (
        settings["images"] == folder and settings["exclude"] == tmp_path / "ids.txt" and settings["seed"] == 3
    )
    assert settings["steps"] * settings["prompts"] <= 8 and settings["eval_cues"] == 6


@pytest.mark.parametrize("source", data.SOURCES)
def test_cues_equal_those_of_the_full_folder(server, tmp_path, monkeypatch, capsys, source):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"103": "the upper one"}))
    flags = ("--limit", 12, "--source", source, "--seed", 1, "--expressions", texts)
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, *flags)
    assert code == 0, err
    folders = (tmp_path / "new", server.folder)
    downloaded, full = (cue_contents(server, folder, 12, 1, source, expressions=texts) for folder in folders)
    assert downloaded == full and f"--source {source} " in out


# ---------------------------------------------------------------- a second download


@pytest.mark.parametrize("stop_signal", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_download_continues_and_requests_no_file_twice(
    server, tmp_path, monkeypatch, capsys, stop_signal
):
    server.delay, new = 0.2, tmp_path / "new"
    words = [sys.executable, *command(server, new, "--limit", 40)]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` may ignore SIGINT
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, handler)
    while server.requests.total() < 18:
        time.sleep(0.01)
        assert process.poll() is None
    started = time.monotonic()
    process.send_signal(stop_signal)
    err, code = process.communicate(timeout=60)[1], process.returncode
    assert time.monotonic() - started < 5
    assert code == -stop_signal if stop_signal == signal.SIGKILL else code == 130
    assert stop_signal == signal.SIGKILL or err.endswith("Stopped. Run the same command again to continue.\n")
    server.delay, requested = 0, Counter(server.requests)
    downloaded = {name for name in names(new) if not name.endswith(".part")}
    assert len(downloaded) >= 8
    for name in requested:
        if name not in downloaded:
            (new / f"{name}.part").write_bytes((server.folder / name).read_bytes()[:900])
    code, _, err = run(server, new, monkeypatch, capsys, "--limit", 40)
    assert code == 0, err
    assert all(server.requests[name] == 1 for name in downloaded), "a downloaded image is not requested again"
    assert max(server.requests.values()) <= 2
    assert names(new) == set(server.requests), "no .part file is left"
    assert cue_contents(server, new, 40) == cue_contents(server, server.folder, 40)


def test_existing_images_are_kept_unless_they_are_broken(server, tmp_path, monkeypatch, capsys):
    run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    first, second, third = sorted(names(tmp_path / "new"))[:3]
    (tmp_path / "new" / first).write_bytes(b"")
    (tmp_path / "new" / second).write_bytes((server.folder / second).read_bytes()[:900])
    noise(100, 100).save(tmp_path / "new" / third)
    server.requests.clear()
    assert run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)[0] == 0
    assert server.requests == {first: 1, second: 1, third: 1}
    assert cue_contents(server, tmp_path / "new", 40) == cue_contents(server, server.folder, 40)


# ---------------------------------------------------------------- failures

TEMPORARY = {  # replies of the server, and the number of requests
    "incomplete": (["incomplete", "complete"], 2),
    "server error": ([500, 503, "complete"], 3),
    "too many requests": ([429, 429, 429, "complete"], 4),
    "error page": ([b"<html>later</html>", "complete"], 2),
    "empty": ([b"", "complete"], 2),
}
LASTING = {  # replies of the server, the number of requests, the reason that is counted
    "not found": ([404], 1, "answered with HTTP 404"),
    "server error": ([500], 4, "answered with HTTP 500"),
    "error page": ([b"<html>not found</html>"], 4, "broken or not an image"),
    "incomplete": (["incomplete"], 4, "broken or not an image"),
    "huge length": (["huge length"], 1, "over 1 MB"),
    "endless": (["endless"], 1, "over 1 MB"),
    "slow": (["slow"], 4, "too slow"),
    "another size": (["turned"], 4, "of another size than annotated"),
    "redirect to a local file": (["file:///etc/hostname"], 1, "answered with HTTP 302"),
    "redirect to another protocol": (["ftp://127.0.0.1/1.jpg"], 4, "out of reach"),
    "endless redirect": (["/7.jpg"], 5, "answered with HTTP 302"),
}


@pytest.mark.parametrize("case", TEMPORARY)
def test_a_temporary_failure_is_retried(server, tmp_path, monkeypatch, capsys, case):
    replies, num_requests = TEMPORARY[case]
    server.replies["7.jpg"] = list(replies)
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    assert code == 0 and f"{server.file}: none; train" in out, err
    assert server.requests["7.jpg"] == num_requests and names(tmp_path / "new") == set(server.requests)
    assert cue_contents(server, tmp_path / "new", 40) == cue_contents(server, server.folder, 40)


@pytest.mark.parametrize("case", LASTING)
def test_an_image_that_cannot_be_downloaded_is_counted_and_replaced(
    server, tmp_path, monkeypatch, capsys, case
):
    replies, num_requests, reason = LASTING[case]
    monkeypatch.setattr(download, "MAX_BYTES", 1_000_000)
    if case == "slow":  # on a busy machine, the others can take as long
        monkeypatch.setattr(download, "MAX_SECONDS", 0.2)
    noise(240, 327).save(server.folder / "turned.jpg")
    turned = (server.folder / "turned.jpg").read_bytes()
    server.replies["7.jpg"] = [turned] if replies == ["turned"] else replies
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    assert code == 0 and f"{server.file}: 1 {reason}; train" in out, (out, err)
    assert server.requests["7.jpg"] == num_requests
    assert names(tmp_path / "new") == set(server.requests) - {"7.jpg"}
    (server.folder / "7.jpg").unlink()
    assert cue_contents(server, tmp_path / "new", 40) == cue_contents(server, server.folder, 40)


def test_a_redirect_to_another_address_is_followed(server, tmp_path, monkeypatch, capsys):
    server.replies["7.jpg"] = [f"{server.address}/moved/7.jpg"]
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    assert code == 0 and f"{server.file}: none; train" in out and server.requests["moved/7.jpg"] == 1, err


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
def test_an_invalid_address_makes_an_image_unusable(address):
    with pytest.raises(UnusableImage):
        download.fetch_bytes(address)


def test_images_without_a_usable_address_are_counted(server, tmp_path, monkeypatch, capsys):
    for k, address in ((5, None), (6, ""), (7, f"file://{server.folder}/7.jpg")):
        server.corpus.json["images"][k]["coco_url"] = address
    del server.corpus.json["images"][8]["coco_url"]
    (tmp_path / "new").mkdir()
    shutil.copy(server.folder / "8.jpg", tmp_path / "new")
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 120)
    assert code == 0, err
    assert (
        server.requests["8.jpg"] == 0
        and "2 without an address" in out
        and "1 whose address is not http or https" in out
    )
    for k in (5, 6, 7):
        (server.folder / f"{k}.jpg").unlink()
    assert cue_contents(server, tmp_path / "new", 120) == cue_contents(server, server.folder, 120)


NAMES = ["../7.jpg", "a/../../7.jpg", "C:\\7.jpg", "..\\7.jpg", "", ".", "a\0.jpg", "a" * 300, "1.jpg/7.jpg"]
NAMES += ["\ud800.jpg", "deep/er/7.jpg"]


def test_no_file_name_leads_out_of_the_folder_or_ends_the_program(server, tmp_path, monkeypatch, capsys):
    images = server.corpus.json["images"]
    for image, name in zip(images[10:], (*NAMES, str(tmp_path / "7.jpg"))):
        image["file_name"] = name
    before = names(tmp_path)
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 120)
    assert code == 0 and " whose name no file can have" in out, err
    new = names(tmp_path / "new")
    assert names(tmp_path) - before == {"new"} | {f"new/{name}" for name in new}
    assert "deep/er/7.jpg" in new and not any(name.endswith(".part") for name in new)
    assert len(cue_contents(server, tmp_path / "new", 120)) == 126


# ---------------------------------------------------------------- errors


def test_sixteen_failures_in_a_row_end_the_download(server, tmp_path, monkeypatch, capsys):
    server.replies |= {f"{k}.jpg": [500] for k in range(28)}
    code, out, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    assert (code, out, names(tmp_path / "new")) == (2, "", set())
    assert "16 images in a row failed" in err and server.address in err and "HTTP 500" in err


def test_annotations_without_addresses_are_an_error(server, tmp_path, monkeypatch, capsys):
    for image in server.corpus.json["images"]:
        del image["coco_url"]
    code, _, err = run(server, tmp_path / "new", monkeypatch, capsys, "--limit", 40)
    assert code == 2 and "without an address" in err and str(server.file) in err


def test_a_full_disk_ends_with_one_sentence(server, tmp_path):
    """In a process of its own: a thread that still downloads would write once the limit is lifted."""
    pytest.importorskip("resource", reason="Windows has no limit of file sizes")
    server.file = server.corpus.file
    _, *flags = command(server, tmp_path / "new", "--limit", 40)
    process = Program(*flags, code="import data; data.main()", max_file_size=2_000)
    assert process.wait() == 2 and process.stdout == "" and "Traceback" not in process.stderr
    assert "cannot be written (File too large): free space" in process.stderr.splitlines()[-1]
    assert not any((tmp_path / "new").glob("*.jpg"))


BAD_FLAGS = {"--limit 0": "--limit: 0", "--heldout -1": "--heldout: -1", "--tiny-ratio 2": "--tiny-ratio 2.0"}
BAD_FLAGS |= {"--annotations none.json": "none.json", "--exclude none.txt": "none.txt"}


@pytest.mark.parametrize("flags", [*BAD_FLAGS, "a file as the folder"])
def test_bad_flags_end_with_one_sentence(server, tmp_path, monkeypatch, capsys, flags):
    is_file = flags == "a file as the folder"
    words = command(server, server.file if is_file else tmp_path / "new")
    monkeypatch.setattr(sys, "argv", words if is_file else [*words, *flags.split()])
    with pytest.raises(SystemExit) as exit_error:
        data.main()
    out, err = capsys.readouterr()
    assert (exit_error.value.code, out, err.count("\n")) == (2, "", 1), err
    assert BAD_FLAGS.get(flags, str(server.file)) in err and not server.requests
