"""Model and adapter folders: sound ones load and run, broken ones are refused in one sentence."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_models import prompts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import locus_mini
from files import checkpoints
from files.errors import UserError
from models import add_lora, device_and_dtype, load_adapter, load_policy, read_family
from policy import Policy, collate, token_logps
from tiny import architecture
from training.checks import self_check

ROOT = Path(__file__).parents[2]
NAMES = ("Qwen2.5-VL-7B-Instruct", "Qwen3-VL-4B-Instruct")  # with weights of lm_head, and with tied ones
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123456\n"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=NAMES)
def sound(request, tmp_path_factory) -> Path:
    """A miniature model folder with all that the hub's has."""
    folder = families.settings(request.param, tmp_path_factory.mktemp("hub") / request.param, miniature=True)
    return families.random_weights(folder, std=0.1)


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy of a sound folder, for a test to break."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def edit_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Replaces the weights of a folder with what `change` makes of them, in a single file."""
    files = list(folder.glob("*.safetensors"))
    weights = change({key: value for file in files for key, value in load_file(file).items()})
    for file in (*files, folder / checkpoints.INDEX):
        file.unlink(missing_ok=True)
    copies = {key: value.clone() for key, value in weights.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logps(policy: Policy) -> torch.Tensor:
    """Log-probabilities of fixed completions of fixed prompts, [2, 3, 5]."""
    torch.manual_seed(0)
    batch = collate(policy, prompts(policy, 2))
    tokens = torch.randint(20, 300, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return token_logps(policy, batch, tokens, torch.ones_like(tokens, dtype=torch.bool))


def load(folder: Path, **kwargs) -> Policy:
    return load_policy(str(folder), **({"load_in_4bit": False} | kwargs))


def refused(folder: Path | str, *words: str, **kwargs) -> None:
    """Loading ends in one sentence of at most 400 characters that has all the words."""
    with pytest.raises(UserError) as error:
        load(folder, **kwargs)
    message = str(error.value)
    assert message.startswith(f"--model {folder} ") and len(message) <= 400 and "\n" not in message, message
    assert all(word in message for word in words), message


# ---------------------------------------------------------------- weights


BROKEN = {
    "a layer is missing": (
        lambda weights: {key: value for key, value in weights.items() if ".layers.1." not in key},
        "missing keys in its weights: model.language_model.layers.1.input_layernorm.weight",
    ),
    "no vision tower": (
        lambda weights: {key: value for key, value in weights.items() if "visual" not in key},
        "missing keys in its weights: model.visual.blocks.0",
    ),
    "PEFT's prefix": (
        lambda weights: {f"base_model.model.{key}": value for key, value in weights.items()},
        "unexpected keys in its weights: base_model.model.",
    ),
    "DDP's prefix": (
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
        "unexpected keys in its weights: module.",
    ),
    "FSDP's prefix": (
        lambda weights: {f"_fsdp_wrapped_module.{key}": value for key, value in weights.items()},
        "unexpected keys in its weights: _fsdp_wrapped_module.",
    ),
    "FSDP inside": (
        lambda weights: {
            key.replace("layers.0", "layers.0._fsdp_wrapped_module"): weights[key] for key in weights
        },
        "_fsdp_wrapped_module",
    ),
    "a layer too many": (
        lambda weights: weights | {"model.language_model.layers.2.mlp.up_proj.weight": torch.zeros(128, 64)},
        "unexpected keys in its weights: model.language_model.layers.2.mlp.up_proj.weight",
    ),
    "another size": (
        lambda weights: {key: value[:-1] if "1.mlp.up" in key else value for key, value in weights.items()},
        "mismatched keys in its weights: ('model.language_model.layers.1.mlp.up_proj.weight'",
    ),
    "scales without a quantization_config": (
        lambda weights: weights | {"model.language_model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)},
        "up_proj.weight_scale",
    ),
    "AWQ tensors without a quantization_config": (
        lambda weights: {
            key.replace("gate_proj.weight", "gate_proj.qweight") if "language_model" in key else key: value
            for key, value in weights.items()
        },
        "gate_proj.qweight",
    ),
    "FP8 without scales": (
        lambda weights: {
            key: value.to(torch.float8_e4m3fn) if "language_model" in key else value
            for key, value in weights.items()
        },
        "model.safetensors cannot be read (it holds FP8 weights",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_do_not_fit_are_refused(case, folder):
    change, words = BROKEN[case]
    edit_weights(folder, change)
    refused(folder, words)


def test_an_untied_model_needs_its_lm_head(folder):
    edit_weights(folder, lambda weights: {k: v for k, v in weights.items() if k != "lm_head.weight"})
    if json.loads((folder / "config.json").read_text())["tie_word_embeddings"]:
        assert load(folder)
    else:
        refused(folder, "missing keys in its weights: lm_head.weight")


SOUND = {
    "in a single file": lambda weights: weights,
    "with buffers of old checkpoints": lambda weights: (
        weights | {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        | {"visual.rotary_pos_emb.inv_freq": torch.zeros(4)}
    ),
    "with the names of transformers 4": lambda weights: {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for key, value in weights.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_the_same_weights_load_the_same(case, sound, folder):
    edit_weights(folder, SOUND[case])
    assert torch.equal(logps(load(folder)), logps(load(sound)))


def test_the_sentence_is_all_that_is_printed(folder, capfd):
    edit_weights(folder, BROKEN["a layer is missing"][0])
    refused(folder)
    printed = capfd.readouterr()
    assert "MISSING" not in printed.err + printed.out, "transformers' table"


# ---------------------------------------------------------------- quantised folders


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "compressed-tensors"])
def test_other_quantised_weights_are_refused(method, folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(folder, f"quantised ({method})", "give the unquantised model")
    refused(folder, f"quantised ({method})", load_in_4bit=True)


def test_a_quantised_text_model_is_refused_too(folder):
    config = json.loads((folder / "config.json").read_text())
    if "text_config" in config:
        text_config = config["text_config"] | {"quantization_config": {"quant_method": "fp8"}}
        edit_json(folder / "config.json", text_config=text_config)
        refused(folder, "quantised (fp8)")


@pytest.mark.parametrize("suffix", ["-AWQ", "-GPTQ-Int4", "-FP8", "_w4a16"])
def test_the_unquantised_model_is_named(suffix, folder):
    renamed = folder.rename(folder.with_name(f"Some-VL-3B{suffix}"))
    edit_json(renamed / "config.json", quantization_config={"quant_method": "any"})
    refused(renamed, f"give the unquantised model {folder.with_name('Some-VL-3B')}.")


def save_quantised(sound: Path, folder: Path, **kwargs) -> None:
    """Replaces the weights of a folder by bitsandbytes' own, computed in bf16 as the hub's folders say."""
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **kwargs)
    model = AutoModelForImageTextToText.from_pretrained(sound, quantization_config=config)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder)


@pytest.mark.parametrize("skipped", [None, ["model.visual", "lm_head"]])
@pytest.mark.parametrize("flag", [None, True])
def test_a_4bit_folder_loads_as_it_is(flag, skipped, sound, folder):
    """Not quantised twice, and computed in the dtype of the device, or the self-check would fail."""
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    save_quantised(sound, folder, llm_int8_skip_modules=skipped, **nf4)
    policy = load(folder, load_in_4bit=flag)
    layer = policy.base_model.model.language_model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" and layer.weight.quant_state.nested
    assert (
        "Linear4bit" in {type(module).__name__ for module in policy.model.model.visual.modules()} or skipped
    )
    if skipped:
        assert torch.allclose(logps(policy), logps(load(sound, load_in_4bit=True)), atol=1e-4)
    torch.manual_seed(0)
    policy = add_lora(policy, 4)
    assert self_check(policy, prompts(policy, 2), 3, 8, seed=0)["rollout_gap"] < 1e-3


def test_a_4bit_folder_cannot_be_loaded_in_16_bit(sound, folder):
    save_quantised(sound, folder, load_in_4bit=True)
    refused(folder, "quantised (bitsandbytes)", "leave --no-load-in-4bit out", load_in_4bit=False)


@pytest.mark.parametrize(
    "text", ["CUDA out of memory.", "issues during automatic conversion of the weights."]
)
def test_memory_that_runs_out_is_no_damaged_folder(text):
    """training/memory.py has the sentence for it."""
    with pytest.raises(RuntimeError, match=text), checkpoints.one_sentence("name", "remedy"):
        raise RuntimeError(text)


@pytest.mark.parametrize("flag", [None, True, False])
def test_an_8bit_folder_is_refused(flag, folder):
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    edit_json(folder / "config.json", quantization_config=quantised)
    refused(folder, "quantised (bitsandbytes)", "give the unquantised model", load_in_4bit=flag)


# ---------------------------------------------------------------- damaged and missing files


SMALL_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json")
SMALL_FILES += ("tokenizer_config.json", checkpoints.INDEX)


@pytest.mark.parametrize("name", [*SMALL_FILES, "chat_template.jinja", "model-00001.safetensors"])
def test_a_git_lfs_pointer_is_named(name, folder):
    (folder / name).write_text(POINTER)
    refused(folder, name, "git lfs pull")


@pytest.mark.parametrize("name", [*SMALL_FILES, "model-00001.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_part_of_a_file_is_refused(name, kept, folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(kept * len(content))])
    refused(folder, f"{name} cannot be read", "download it again")


def test_a_missing_shard_is_named(tmp_path):
    folder = families.settings(NAMES[0], tmp_path / "model", miniature=True)
    families.random_weights(folder, std=0.1, shard=100_000)
    assert len(list(folder.glob("*.safetensors"))) > 2 and load(folder)
    (folder / "model-00002.safetensors").unlink()
    refused(folder, "model-00002.safetensors")


@pytest.mark.parametrize("pickled", [True, False])
def test_a_folder_without_safetensors_is_refused(pickled, folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if pickled:
        torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "model.safetensors", "save it as safetensors")


def test_fewer_embeddings_than_tokens_are_refused(folder):
    weights = {}
    edit_weights(folder, lambda all_weights: weights.update(all_weights) or all_weights)
    short = {k: v[:300] if "embed_tokens" in k or k == "lm_head.weight" else v for k, v in weights.items()}
    edit_weights(folder, lambda _: short)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)["vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(config))
    highest_id = max(architecture.build_tokenizer().get_vocab().values())
    refused(folder, f"ids up to {highest_id}, ", "300 rows")


@pytest.mark.parametrize("names", ["tokenizer.json", "tokenizer*.json"])
def test_a_missing_tokenizer_is_named(names, folder):
    for file in folder.glob(names):
        file.unlink()
    refused(folder, "tokenizer")


def test_a_missing_image_processor_is_named(folder):
    content = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    refused(folder, "copy", "preprocessor_config.json")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    assert load(folder), "another place where it may be"


def test_an_image_processor_of_another_family_is_refused(folder):
    patch_size = json.loads((folder / "preprocessor_config.json").read_text())["patch_size"]
    edit_json(folder / "preprocessor_config.json", patch_size=30 - patch_size)  # 14 for 16, and back
    refused(folder, "image processor", "patches")


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_is_read_wherever_it_is(place, sound, folder):
    template = (folder / "chat_template.jinja").read_text()
    if place.endswith("json"):
        (folder / "chat_template.jinja").unlink()
        (folder / place).touch()
        (folder / place).write_text((folder / place).read_text() or "{}")
        edit_json(folder / place, chat_template=template)
    assert torch.equal(logps(load(folder)), logps(load(sound)))


TEMPLATES = ("", "{% for message in", "{{ messages[0].content }}", "{{ raise_exception('never') }}")


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_a_chat_template_without_images_is_refused(template, folder):
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    refused(folder, "chat template")


def test_a_folder_that_is_sound_trains(sound, tmp_path, monkeypatch, capsys):
    """From 4-bit weights, with the template in chat_template.json."""
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    save_quantised(sound, folder, load_in_4bit=True)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    arguments = ["--model", folder, "--out", tmp_path / "run", "--steps", 1, "--eval-cues", 2, "--prompts", 2]
    arguments += ["--num-generations", 2, "--max-new-tokens", 6]
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", *map(str, arguments)])
    locus_mini.main()
    assert (tmp_path / "run" / "results.json").is_file() and "self-check passed" in capsys.readouterr().out


# ---------------------------------------------------------------- the hub


def test_without_the_hub_an_id_is_refused_at_once():
    refused("Qwen/No-Such-VL", "the hub cannot be reached", "connect once")


class Hub(BaseHTTPRequestHandler):
    """A hub on which every model is gated or, where its name says so, unknown."""

    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        self.send_response(404 if "Unknown" in self.path else 403)
        self.send_header("X-Error-Code", "RepoNotFound" if "Unknown" in self.path else "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        """Nothing on stderr."""


def refusals_of_programs(folder: Path, *commands: list[str], reachable: bool = True) -> list[str]:
    """The one sentence with which each program, on a machine without CUDA, refuses a model of our hub."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    if not reachable:
        server.server_close()
    Hub.requests.clear()
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    kwargs = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    programs = [
        subprocess.Popen([sys.executable, ROOT / program, *flags, "--out", "run"], **kwargs)
        for program, *flags in commands
    ]
    try:
        sentences = [program.communicate(timeout=60)[1] for program in programs]
    finally:
        for program in programs:
            program.kill()
        server.shutdown()
    assert [program.returncode for program in programs] == [2] * len(programs), sentences
    assert all(sentence.count("\n") == 1 for sentence in sentences), sentences
    assert not (folder / "run").exists()
    return sentences


@pytest.mark.parametrize("reachable", [True, False])
def test_gated_and_unknown_ids_are_one_sentence(reachable, tmp_path):
    names = ("Qwen/Unknown-VL", "Qwen/Gated-VL")
    commands = [["locus_mini.py", "--model", name, "--cpu"] for name in names]
    for name, sentence in zip(names, refusals_of_programs(tmp_path, *commands, reachable=reachable)):
        assert sentence.startswith(f"--model {name} cannot be loaded: ")
        assert ("hf auth login" if reachable else "connect once") in sentence
        assert any(name in path for path in Hub.requests) == reachable


def test_a_hub_model_without_cuda_is_refused_before_anything_is_downloaded(tmp_path):
    commands = [[*words, "--model", "Qwen/Gated-VL"] for words in (["locus_mini.py"], ["eval.py", "scenes"])]
    for sentence in refusals_of_programs(tmp_path, *commands):
        assert sentence.startswith("--model Qwen/Gated-VL cannot be loaded: PyTorch finds no GPU with CUDA")
        assert "--cpu" in sentence
    assert Hub.requests == [] and list(tmp_path.iterdir()) == []


def test_a_large_folder_needs_the_flag_and_a_small_one_does_not(sound, tmp_path, capsys):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    checkpoints.check_device("tiny", cpu, torch.float32, False)
    checkpoints.check_device(str(sound), cpu, torch.float32, False)
    assert capsys.readouterr().out == "device: CPU, dtype: torch.float32\n" * 2
    for number in (1, 2):  # neither file is too large by itself; both are holes that take no disk
        with (tmp_path / f"model-{number}.safetensors").open("wb") as file:
            file.truncate(checkpoints.LARGE // 2 + 1)
    with pytest.raises(UserError, match="--cpu"):
        checkpoints.check_device(str(tmp_path), cpu, torch.float32, False)
    checkpoints.check_device(str(tmp_path), cpu, torch.float32, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
        checkpoints.check_device(str(tmp_path), gpu, torch.float16, False)
    assert capsys.readouterr().out.endswith("device: NVIDIA T4, dtype: torch.float16\n")


def test_the_flag_leaves_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert device_and_dtype() == (torch.device("cuda"), torch.bfloat16)
    assert device_and_dtype(cpu=True) == (torch.device("cpu"), torch.float32)
    policy = load_policy("tiny", cpu=True)
    assert {weight.device.type for weight in policy.model.parameters()} == {"cpu"}
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}, "not in 4 bit"


# ---------------------------------------------------------------- families


def test_a_text_only_model_has_no_vision_tower(folder):
    text_only = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(text_only))
    refused(folder, "qwen3 is text-only", "no vision tower")
    refused(folder, "qwen3 is text-only", "no vision tower", frame="relative1000")


def test_a_vocabulary_alone_makes_no_mimo(tmp_path):
    names = ("MiMo-VL-7B-RL", "Qwen2.5-VL-7B-Instruct")
    resized = families.settings(names[1], tmp_path / "mimo", miniature=True, vocab_size=151_680)
    assert read_family(str(resized))[1].max_new_tokens == 256
    mimo, qwen = (families.settings(name, tmp_path / str(len(name))) for name in names)
    assert read_family(str(mimo))[1].max_new_tokens == 1024
    assert read_family(str(qwen))[1].max_new_tokens == 256


def test_a_name_alone_makes_no_thinking_model(tmp_path):
    names = ("Qwen3-VL-4B-Instruct", "Qwen3-VL-4B-Thinking")
    instruct = families.settings(names[0], tmp_path / "no-thinking-sft", miniature=True)
    thinking = families.settings(names[1], tmp_path / "instruct", miniature=True)
    assert read_family(str(instruct))[1].max_new_tokens == 256
    assert read_family(str(thinking))[1].max_new_tokens == 1024
    assert load(families.random_weights(thinking)).processor.family.opening == "<think>\n"
    assert load(families.random_weights(instruct)).processor.family.max_new_tokens == 256


def test_an_unknown_family_with_a_frame_is_noted(tmp_path, capsys):
    folder = families.settings("Qwen2.5-VL-7B-Instruct", tmp_path / "qwen2", miniature=True)
    vision = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=14)
    edit_json(folder / "config.json", model_type="qwen2_vl", vision_config=vision)
    families.random_weights(folder, std=0.1)
    with pytest.raises(UserError, match="unknown family, qwen2_vl: give its --box-frame"):
        load(folder)
    assert load(folder, frame="relative1000").processor.family.box_frame == "relative1000"
    assert "qwen2_vl is unknown, so treated like qwen2_5_vl" in capsys.readouterr().err


# ---------------------------------------------------------------- adapters


def save_adapter(folder: Path, model_folder: Path, **kwargs) -> torch.Tensor:
    """An adapter that changes the model, saved by PEFT; returns the log-probabilities with it."""
    policy = load(model_folder)
    targets = policy.processor.family.lora_targets
    torch.manual_seed(1)
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": targets} | kwargs))
    policy.model = get_peft_model(policy.model, config).eval()
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    policy.model.save_pretrained(folder)
    return logps(policy)


ADAPTERS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "with lm_head": {"modules_to_save": ["lm_head"]},
    "with the norm and embeddings": {"modules_to_save": ["norm", "embed_tokens"]},
    "on every linear layer": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_loads_as_it_was_saved(kind, sound, tmp_path, capsys):
    expected = save_adapter(tmp_path / "adapter", sound, **ADAPTERS[kind])
    capsys.readouterr()
    policy = load_adapter(load(sound), tmp_path / "adapter")
    assert torch.allclose(logps(policy), expected, atol=1e-6)
    assert not torch.allclose(logps(load(sound)), expected, atol=1e-2)
    assert "--adapter" not in capsys.readouterr().err, "no warning of another base"


def edit_adapter(folder: Path, change: Callable[[Weights], Weights], **config) -> Path:
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    edit_json(folder / "adapter_config.json", **config)
    return folder


def test_an_adapter_of_transformers_4_loads(sound, tmp_path):
    expected = save_adapter(tmp_path / "adapter", sound)
    edit_adapter(tmp_path / "adapter", lambda w: {k.replace(".language_model.", "."): w[k] for k in w})
    assert torch.allclose(logps(load_adapter(load(sound), tmp_path / "adapter")), expected, atol=1e-6)


BROKEN_ADAPTERS = {
    "a layer is missing": lambda w: {k: v for k, v in w.items() if ".layers.1." not in k},
    "it matches nothing": lambda w: {k.replace("language_model", "decoder"): v for k, v in w.items()},
    "FSDP's names": lambda w: {k.replace("layers.0", "layers.0._fsdp_wrapped_module"): w[k] for k in w},
    "a layer too many": lambda w: w | {next(iter(w)).replace("layers.0", "layers.9"): torch.zeros(4, 4)},
    "without PEFT's prefix": lambda w: {k.removeprefix("base_model.model."): v for k, v in w.items()},
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(case, sound, tmp_path):
    save_adapter(tmp_path / "adapter", sound)
    edit_adapter(tmp_path / "adapter", BROKEN_ADAPTERS[case])
    with pytest.raises(UserError, match="does not fit the model") as error:
        load_adapter(load(sound), tmp_path / "adapter")
    assert len(str(error.value)) <= 400


def test_an_adapter_without_its_saved_modules_is_refused(sound, tmp_path):
    save_adapter(tmp_path / "adapter", sound, modules_to_save=["lm_head"])
    edit_adapter(tmp_path / "adapter", lambda w: {k: v for k, v in w.items() if "lora_" in k})
    with pytest.raises(UserError, match=r"lm_head.*does not fit the model"):
        load_adapter(load(sound), tmp_path / "adapter")


@pytest.mark.parametrize("content", [POINTER.encode(), b"", b"\x00" * 99])
def test_a_damaged_adapter_is_refused(content, sound, tmp_path):
    save_adapter(tmp_path / "adapter", sound)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"--adapter .*adapter_model.safetensors cannot be read"):
        load_adapter(load(sound), tmp_path / "adapter")


def test_the_folder_of_a_run_is_no_adapter(sound, tmp_path):
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read .*, as runs/NAME/adapter"):
        load_adapter(load(sound), tmp_path)


def test_an_adapter_of_another_kind_is_refused(sound, tmp_path):
    save_adapter(tmp_path / "adapter", sound)
    edit_adapter(tmp_path / "adapter", dict, peft_type="IA3")
    with pytest.raises(UserError, match="of the kind IA3; give a LoRA adapter"):
        load_adapter(load(sound), tmp_path / "adapter")


@pytest.mark.parametrize(
    "base", ["Qwen/Qwen2-VL-2B-Instruct", "/elsewhere/other", "MOVED", "C:\\moved\\NAME"]
)
def test_another_base_is_a_warning_and_a_moved_one_is_none(base, sound, tmp_path, capsys):
    save_adapter(tmp_path / "adapter", sound)
    base = base.replace("MOVED", f"/was/here/{sound.name}").replace("NAME", sound.name)
    edit_adapter(tmp_path / "adapter", dict, base_model_name_or_path=base)
    capsys.readouterr()
    assert load_adapter(load(sound), tmp_path / "adapter")
    warning = f"was trained on {base}, not on {sound}"
    assert (warning in capsys.readouterr().err) == (sound.name not in base)


def test_an_adapter_of_the_embedded_model_may_move(tmp_path, capsys):
    add_lora(load_policy("tiny", load_in_4bit=False), 2).model.save_pretrained(tmp_path)
    edit_adapter(tmp_path, dict, base_model_name_or_path="/home/reader/locus-mini/tiny/model")
    capsys.readouterr()
    assert load_adapter(load_policy("tiny", load_in_4bit=False), tmp_path)
    assert "--adapter" not in capsys.readouterr().err


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_no_model(with_config, sound, folder, tmp_path):
    """With a config.json beside it too, where transformers would load the base that the adapter names."""
    save_adapter(tmp_path / "adapter", sound)
    shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
    refused(
        folder if with_config else tmp_path / "adapter", "it is an adapter", str(sound), "eval.py --adapter"
    )
