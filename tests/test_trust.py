"""No downloaded file can run code, or read or write outside its folder."""

import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from random_models import noise, png_cell
from safetensors.torch import load_file

import eval as evaluation
from files.errors import UserError
from models import add_lora, load_adapter, load_policy

ROOT = Path(__file__).parents[1]


class Malicious:
    """An object whose unpickling creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickled_model_is_refused(tmp_path):
    shutil.copytree(ROOT / "tiny/model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with (tmp_path / "model" / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Malicious(tmp_path / "code ran"), file)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(str(tmp_path / "model"), load_in_4bit=False)
    assert not (tmp_path / "code ran").exists()


@pytest.mark.parametrize("model_type", ["qwen3_vl", "a type of its own"])
def test_code_in_a_model_folder_never_runs(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the reply if transformers asked whether to run it
    folder = Path(shutil.copytree(ROOT / "tiny/model", tmp_path / "model"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'code ran')!r}, 'w')\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    if model_type == "qwen3_vl":
        load_policy(str(folder), load_in_4bit=False)  # loads transformers' own class instead
    else:
        with pytest.raises(UserError, match="cannot be loaded"):
            load_policy(str(folder), load_in_4bit=False)
    assert not (tmp_path / "code ran").exists()


def test_a_pickled_adapter_is_refused(tmp_path):
    policy = add_lora(load_policy("tiny", load_in_4bit=False), 2)
    policy.model.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(
        load_file(weights) | {"x": Malicious(tmp_path / "code ran")}, weights.with_name("adapter_model.bin")
    )
    weights.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors"):
        load_adapter(load_policy("tiny", load_in_4bit=False), tmp_path / "adapter")
    assert not (tmp_path / "code ran").exists()
    assert not isinstance(policy.base_model, PeftModel)


@pytest.mark.parametrize("name", ["../evil", "../../evil", "FOLDER/evil", "..\\evil", "a/b\0c", "con"])
def test_a_benchmark_file_cannot_make_eval_write_outside_its_folder(name, tmp_path, monkeypatch):
    table = tmp_path / "data" / "MMStar.tsv"
    table.parent.mkdir()
    header = "index\timage\tquestion\tA\tB\tanswer\tcategory\n"
    name = name.replace("FOLDER", str(tmp_path))
    cells = [name, png_cell(noise((64, 64), 0)), "What?", "a", "b", "A", name]
    table.write_text(header + "\t".join(cells) + "\n")
    out = tmp_path / "parent" / "child" / "out"
    out.mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["eval.py", "mmstar", "--data", str(table), "--out", str(out)])
    evaluation.main()
    assert {path for path in tmp_path.rglob("*") if out not in path.parents} == before
    assert {path.name for path in out.iterdir()} == {"answers.jsonl", "results.json"}


def test_no_root_file_loads_pickles_or_evaluates_text():
    for path in ROOT.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"trust_remote_code=(\w+)", text)) <= {"False"}, path
        assert "pickle.load" not in text, path
        assert not re.search(r"(?<![\w.])(eval|exec)\(", text), path
        loads = re.findall(r"torch\.load\([^)]*\)", text)
        assert all("weights_only=True" in call for call in loads), path
