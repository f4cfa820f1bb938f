"""The merge of an adapter: right weights, unchanged files, little memory; a wrong merge is refused."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import families
import pytest
import torch
from peft.tuners.lora import Linear
from random_models import prompts, with_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from files.checkpoints import INDEX
from files.errors import UserError
from models import load_adapter, load_policy
from policy import collate, token_logps
from training import merge
from training.merge import merge_and_compare, read_base

ROOT = Path(__file__).parents[2]
# Tied embeddings and not; whether the checkpoint has the names of transformers 4, as those on the hub have.
MODELS = {"Qwen2.5-VL-3B-Instruct": True, "Qwen2.5-VL-7B-Instruct": False, "Qwen3-VL-4B-Instruct": False}
ONE_MODEL = pytest.mark.parametrize("base", ["Qwen2.5-VL-3B-Instruct"], indirect=True, scope="module")
OLD = {r"^model\.visual\.": "visual.", r"^model\.language_model\.": "model."}


def rename(folder: Path, prefix: str = "") -> None:
    """Gives the weights in a folder, and its index, the names that transformers 4 wrote."""

    def old(key: str) -> str:
        for pattern, replacement in OLD.items():
            key = re.sub(pattern, replacement, key.removeprefix(prefix))
        return prefix + key

    for path in folder.glob("*.safetensors"):
        save_file(
            {old(key): weight for key, weight in load_file(path).items()}, path, metadata={"format": "pt"}
        )
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {old(key): name for key, name in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory) -> Path:
    """A model folder as on the hub: many shards, an index, a tokenizer, and files that nobody needs."""
    folder = families.settings(request.param, tmp_path_factory.mktemp("hub") / request.param, miniature=True)
    families.random_weights(folder, std=0.1, shard=60_000)
    if MODELS[request.param]:
        rename(folder)
    for name in ("README.md", "pytorch_model.bin", "LICENSE"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter of that model whose B is not 0, in PEFT's format."""
    folder = tmp_path_factory.mktemp("adapter")
    with_adapter(load_policy(str(base), load_in_4bit=False)).model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(base, adapter, tmp_path_factory) -> tuple[Path, str]:
    """The merged model, and what the program printed: the base is the one that the adapter names."""
    out = tmp_path_factory.mktemp("merged") / "deep" / "out"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(sys, "argv", ["merge.py", str(adapter), str(out)])
        merge.main()
    return out, stdout.getvalue()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: weight for path in folder.glob("*.safetensors") for key, weight in load_file(path).items()}


def test_every_weight_is_that_of_the_base_plus_the_scaled_product(base, adapter, merged):
    """Computed again from the files: α / r = 2, and only the projections of the text layers change."""
    before, after, parts = (
        weights_of(base),
        weights_of(merged[0]),
        load_file(adapter / "adapter_model.safetensors"),
    )
    assert len(list(base.glob("*.safetensors"))) > 3 and list(before) == list(after)
    changed = 0
    for key, weight in before.items():
        name = key.removesuffix(".weight").replace("model.language_model.", "model.")
        name = name.replace("model.", "base_model.model.model.language_model.", 1)
        if (lora_a := parts.get(f"{name}.lora_A.weight")) is not None:
            weight = (weight.float() + 2 * (parts[f"{name}.lora_B.weight"] @ lora_a)).to(torch.bfloat16)
            changed += not torch.equal(after[key], before[key])
        assert torch.equal(after[key], weight), key
    assert changed == len(parts) // 2 == 14


def test_files_and_headers_stay_those_of_the_base(base, merged):
    """Names of weights, order, metadata and index; weights in other formats would be those of the base."""
    names = {path.name for path in base.iterdir()} - {"README.md", "pytorch_model.bin"}
    assert {path.name for path in merged[0].iterdir()} == names and "LICENSE" in names
    assert [path.name for path in merged[0].parent.iterdir()] == ["out"], "nothing unfinished is left"
    for name in names:
        content = [(folder / name).read_bytes() for folder in (base, merged[0])]
        if name.endswith(".safetensors"):
            content = [data[: 8 + int.from_bytes(data[:8], "little")] for data in content]
        assert content[0] == content[1], name


def test_the_merged_model_scores_as_peft_merges_it(base, adapter, merged):
    policy = load_adapter(load_policy(str(base), False, dtype=torch.bfloat16), adapter)
    batch = collate(policy, prompts(policy, 2))
    tokens = torch.randint(20, 300, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad(), policy.reference():
        base_logps = token_logps(policy, batch, tokens, mask)
    policy.model = policy.model.merge_and_unload()
    ours = load_policy(str(merged[0]), False, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, logps = (token_logps(p, collate(p, prompts(p, 2)), tokens, mask) for p in (policy, ours))
    assert torch.allclose(logps, expected, atol=0.02)
    assert (logps - base_logps).abs().mean() > 0.1, "the adapter changes nothing, so any merge would do"


def test_the_gaps_are_printed(merged):
    rows = re.findall(
        r"^ *(base without adapter|merged model|4 bit \+ adapter) (\S+)$", merged[1], re.MULTILINE
    )
    gaps = {name: float(value) for name, value in rows}
    assert len(gaps) == 3 and 0 < gaps["merged model"] < 0.03
    assert gaps["base without adapter"] > 0.1 and gaps["4 bit + adapter"] > gaps["merged model"]


@ONE_MODEL
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_merge_with_a_wrong_scale_is_refused_and_leaves_nothing(
    base, adapter, factor, tmp_path, monkeypatch
):
    original = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, name: factor * original(layer, name))
    with pytest.raises(UserError, match=r"differs from base \+ adapter by .* is not written"):
        merge_and_compare(adapter, tmp_path / "out", None, cpu=True)
    assert list(tmp_path.iterdir()) == []


@ONE_MODEL
def test_an_adapter_with_names_of_transformers_4_merges_to_the_same_bytes(base, adapter, merged, tmp_path):
    old = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    rename(old, prefix="base_model.model.")
    with safe_open(old / "adapter_model.safetensors", "pt") as weights:
        assert not any("language_model" in key for key in weights.keys())  # noqa: SIM118
    merge_and_compare(old, tmp_path / "out", str(base), cpu=True)
    for path in merged[0].iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@ONE_MODEL
def test_rank_stabilised_lora_has_its_own_scale(base, adapter, tmp_path):
    """α / √r = 4 instead of α / r = 2: PEFT's own scale is taken, so the comparison passes."""
    stabilised = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    config = json.loads((stabilised / "adapter_config.json").read_text())
    (stabilised / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    parts = load_file(stabilised / "adapter_model.safetensors")
    parts = {key: weight / 2 if "lora_B" in key else weight for key, weight in parts.items()}
    save_file(parts, stabilised / "adapter_model.safetensors", metadata={"format": "pt"})
    merge_and_compare(stabilised, tmp_path / "out", str(base), cpu=True)
    merge_and_compare(adapter, tmp_path / "plain", str(base), cpu=True)
    plain, ours = weights_of(tmp_path / "plain"), weights_of(tmp_path / "out")
    assert all(torch.equal(plain[key], ours[key]) for key in plain)


@ONE_MODEL
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [1, 2]),
        ("a_feature_of_the_future", 3),
    ],
)
def test_more_than_plain_lora_is_refused(adapter, name, value, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text()) | {name: value}
    shutil.copy(adapter / "adapter_model.safetensors", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"its {name} is more than plain LoRA"):
        read_base(tmp_path)


def refused(monkeypatch, capsys, *arguments: object) -> str:
    """The last line that the program prints where it refuses its arguments."""
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="2"):
        merge.main()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def tiny_adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    with_adapter(load_policy("tiny", load_in_4bit=False)).model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_bad_input_is_refused_in_one_sentence(tiny_adapter, tmp_path, monkeypatch, capsys):
    refuse = partial(refused, monkeypatch, capsys)
    out = tmp_path / "out"
    (full := tmp_path / "full").mkdir()
    (full / "file").touch()
    assert f"OUT {full} exists and is not empty" in refuse(tiny_adapter, full)
    assert "adapter_config.json cannot be read" in refuse(tmp_path, out)
    assert "is no folder" in refuse(tiny_adapter, out, "--base", tmp_path / "moved")
    empty = Path(shutil.copytree(tiny_adapter, tmp_path / "empty"))
    (empty / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors cannot be read" in refuse(empty, out)
    save_file({}, empty / "adapter_model.safetensors")
    assert "have no counterpart" in refuse(empty, out)
    (empty / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refuse(empty, out)
    (empty / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "--model unknown is no folder" in refuse(empty, out), "an adapter that names no base"
    assert not out.exists() and not out.with_name("out.new").exists()


# Peak of the memory that is not a file's: weights that safetensors maps are pages of the disk's cache.
MEASURE = """
import re, threading, time
from pathlib import Path
from training import merge

def anonymous_memory():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while True:
        samples.append(anonymous_memory())
        time.sleep(0.002)

samples = [anonymous_memory()]
threading.Thread(target=watch, daemon=True).start()
merge.main()
print("peak", max(samples) - samples[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux counts the memory like this")
def test_the_peak_of_memory_is_below_twice_the_model(tmp_path):
    """The whole program on a model of 100 MB in a single file, with all of its comparisons."""
    text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=7)
    sizes = dict(text_config=text, vision_config=dict(out_hidden_size=768))
    base = families.settings("Qwen3-VL-4B-Instruct", tmp_path / "base", miniature=True, **sizes)
    families.random_weights(base)
    with_adapter(load_policy(str(base), load_in_4bit=False)).model.save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "adapter"), str(tmp_path / "out")]
    # malloc gives back what is freed, instead of keeping it for the next request.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    size, peak = sum(p.stat().st_size for p in base.glob("*.safetensors")), int(done.stdout.split()[-1])
    assert size > 99e6 and 0.1 * size < peak < 2 * size, f"{peak / size:.2f} times the model"
