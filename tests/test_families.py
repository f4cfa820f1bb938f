"""The published families: their own settings in miniature through the true code, in 4 bit, on COCO."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
from random_models import noise
from test_data import Corpus, an_id
from torch import nn
from transformers import AutoConfig

import eval as evaluation
import locus_mini
from files.errors import UserError
from models import add_lora, load_policy, read_family
from paper.variants import sft_loss
from policy import collate, rollout
from prompts import encode
from training import dry_run, memory
from training.settings import resolve

KINDS = ("Qwen2.5-VL-7B-Instruct", "Qwen3-VL-4B-Instruct", "Qwen3-VL-4B-Thinking", "MiMo-VL-7B-RL")


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory) -> Path:
    """A family's settings, of miniature size, with random weights as the hub stores them."""
    folder = families.settings(request.param, tmp_path_factory.mktemp("hub") / request.param, miniature=True)
    return families.random_weights(folder, std=0.1, shard=20_000)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> list[str]:
    """Flags for a small COCO: eight photos to train on, three held out."""
    corpus = Corpus(tmp_path_factory.mktemp("coco"))
    for held, count in ((False, 8), (True, 3)):
        for i in range(count):
            number = an_id(held, i)
            corpus.image(number, noise((320, 240), number))
            corpus.box(number, 40 + 10 * i, 60, 24, 20)
            corpus.box(number, 150, 30 + 10 * i, 50, 40, kind=7)
    (corpus.folder / "ids.txt").write_text("")
    where = ["--annotations", corpus.file, "--images", corpus.images, "--exclude", corpus.folder / "ids.txt"]
    return ["--data", "coco", *map(str, where)]


def test_module_by_module_what_is_4_bit_16_bit_32_bit_and_trained(model):
    """As on a GPU: weights that are quantised, weights in bf16, float32 adapters that learn."""
    policy = add_lora(load_policy(str(model), load_in_4bit=True, dtype=torch.bfloat16), 4)
    seen = {"4 bit": 0, "bf16": 0, "trained": 0}
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            assert "language_model" in name and parameter.dtype == torch.float32 and parameter.requires_grad
            seen["trained"] += 1
            continue
        assert not parameter.requires_grad, name
        quantised = "language_model.layers" in name and parameter.dim() == 2 and "norm" not in name
        if quantised:
            assert parameter.dtype == torch.uint8 and parameter.quant_type == "nf4", name
            assert parameter.quant_state.nested and parameter.quant_state.dtype == torch.bfloat16, name
        else:
            assert parameter.dtype == torch.bfloat16, name
        seen["4 bit" if quantised else "bf16"] += 1
    assert (
        seen["4 bit"] == 7 * 2 and seen["trained"] == 2 * 7 * 2
    )  # maps of a layer × layers; A and B of each
    visual = [
        m for name, m in policy.base_model.named_modules() if "visual" in name and isinstance(m, nn.Linear)
    ]
    assert visual and all(type(m) is nn.Linear for m in visual), "the vision tower is not to be quantised"
    assert type(policy.base_model.lm_head) is nn.Linear
    tied = policy.base_model.lm_head.weight is policy.base_model.model.language_model.embed_tokens.weight
    assert tied == policy.base_model.config.tie_word_embeddings


def test_the_whole_program_in_4_bit_on_coco(model, coco, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    arguments = ["--model", model, "--load-in-4bit", *coco, "--out", run, "--steps", 2, "--prompts", 2]
    arguments += ["--num-generations", 3, "--max-new-tokens", 6, "--eval-cues", 1, "--image-pixels", 60_000]
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", *map(str, arguments)])
    locus_mini.main()
    said = capsys.readouterr().out
    assert "self-check passed" in said and (run / "adapter" / "adapter_model.safetensors").is_file()
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["cue"]["n"] == 1 and results["settings"]["gradient_checkpointing"]
    config = json.loads((run / "config.json").read_text())
    assert config["origin"]["lr"] == config["origin"]["micro_batch"] == "model family"
    assert config["origin"]["image_pixels"] == "flag" and config["image_pixels"] == 60_000
    assert "lora_targets" in said and "skip_4bit" in said
    asked = ["eval.py", "cues", "--model", model, "--load-in-4bit", *coco, "--n", 1, "--max-new-tokens", 4]
    asked += ["--adapter", run / "adapter", "--out", tmp_path / "after"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in asked])
    evaluation.main()
    assert (tmp_path / "after" / "results.json").is_file()


def test_a_prompt_reads_as_the_published_template_has_it(model):
    """Default system prompt, two images, the text, and how far the template begins the answer itself."""
    policy = load_policy(str(model), load_in_4bit=False)
    item = encode(policy.processor, "Where?", noise((56, 56), 0), crop=noise((112, 112), 1))
    text, pad = policy.processor.tokenizer.decode(item.input_ids), "<|image_pad|>"
    parts = text.replace(pad, "").split("<|vision_start|>")
    system = families.SYSTEM.get(model.name[:7])
    expected = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    end = "<|vision_end|>Where?<|im_end|>\n<|im_start|>assistant\n"
    begun = "<think>\n" if model.name.endswith("Thinking") else ""
    assert parts[0] == f"{expected}<|im_start|>user\n"
    assert parts[1] == "<|vision_end|>" and text.count(pad) == int(item.mm_token_type_ids.sum())
    assert parts[2] == end + begun
    assert policy.processor.family.opening == begun
    stops = {policy.processor.tokenizer.decode([i]) for i in policy.stop_ids}
    assert stops == {"<|im_end|>", "<|endoftext|>"}, "generation_config names two"


def test_the_row_of_a_family():
    """By its own folder's name, and MiMo-VL by its vocabulary wherever its folder went."""
    thinks = {
        name: read_family(str(families.FOLDER / name))[1].max_new_tokens for name in families.PARAMETERS
    }
    assert {name for name, longest in thinks.items() if longest > 256} == {
        "Qwen3-VL-4B-Thinking",
        "MiMo-VL-7B-RL",
    }
    for name in families.PARAMETERS:
        frame = read_family(str(families.FOLDER / name))[1].box_frame
        assert frame == ("relative1000" if name.startswith("Qwen3") else "resized")


def test_a_renamed_folder_keeps_its_family(tmp_path):
    mimo = families.settings("MiMo-VL-7B-RL", tmp_path / "one", miniature=True, vocab_size=151_680)
    assert read_family(str(mimo))[1].max_new_tokens == 1024
    folder = families.settings("Qwen3-VL-4B-Thinking", tmp_path / "two", miniature=True)
    policy = load_policy(str(families.random_weights(folder)), load_in_4bit=False)
    assert policy.processor.family.max_new_tokens == 1024, "the chat template opens with <think>"


def test_flags_win_over_the_row():
    _, family = read_family(str(families.FOLDER / "Qwen2.5-VL-7B-Instruct"))
    cfg, origin = resolve({"lr": 2e-5, "crop_pixels": 50_000, "gradient_checkpointing": False}, family)
    assert (cfg.lr, cfg.crop_pixels, cfg.gradient_checkpointing, cfg.prompts, cfg.micro_batch) == (
        2e-5,
        50_000,
        False,
        8,
        1,
    )
    assert {origin[name] for name in ("lr", "crop_pixels", "gradient_checkpointing")} == {"flag"}
    assert {origin[name] for name in ("prompts", "micro_batch", "image_pixels")} == {"model family"}


@pytest.mark.parametrize("name", families.PARAMETERS)
def test_the_settings_are_of_the_published_size(name):
    model = dry_run.empty_model(AutoConfig.from_pretrained(families.FOLDER / name))
    assert sum(parameter.numel() for parameter in model.parameters()) == families.PARAMETERS[name]


def test_predicted_weights_are_those_that_are_loaded(model):
    """Byte by byte: quantised, in 16 bits, of the adapter."""
    _, family = read_family(str(model))
    policy = add_lora(load_policy(str(model), load_in_4bit=True, dtype=torch.bfloat16), 4)
    predicted = dry_run.weights(dry_run.empty_model(policy.base_model.config), family, True, 4)
    loaded = {"text layers": 0, "other weights": 0, "adapter": 0}
    for name, weight in policy.model.named_parameters():
        layer = "language_model" in name and ".layers." in name
        kind = "adapter" if "lora_" in name else "text layers" if layer else "other weights"
        loaded[kind] += weight.nbytes
        if (state := getattr(weight, "quant_state", None)) is not None:
            loaded[kind] += state.absmax.nbytes + state.state2.absmax.nbytes
    assert predicted["other weights"] == loaded["other weights"]
    assert predicted["adapter"] == loaded["adapter"]
    assert predicted["text layers"] == pytest.approx(loaded["text layers"], rel=0.01)


def test_a_dry_run_without_a_gpu_says_that_it_predicts(monkeypatch, capsys):
    name = str(families.FOLDER / "Qwen2.5-VL-7B-Instruct")
    flags = ["--dry-run", "--image-pixels", "307200", "--crop-pixels", "40000"]
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", "--model", name, *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    locus_mini.main()
    said = capsys.readouterr().out
    assert "Predicted, not measured" in said and "If it does not fit: lower --" in said
    peaks = [float(number) for number in re.findall(r"^\w.{13} +(\d+\.\d+)  ", said, re.MULTILINE)]
    assert len(peaks) == 4 and 6 < min(peaks) < max(peaks) < 16, "of 7B: the weights alone are 7 GB"


def test_less_is_predicted_where_a_flag_asks_for_less():
    config, family = read_family(str(families.FOLDER / "Qwen2.5-VL-7B-Instruct"))
    model = dry_run.empty_model(config)

    def peak(**flags) -> int:
        found = dry_run.predict(model, resolve(flags, family)[0], family)
        return sum(sum(parts.values()) for parts in found.values())

    usual = peak()
    for less in (
        dict(max_new_tokens=128),
        dict(num_generations=4),
        dict(image_pixels=300_000),
        dict(lora_rank=4),
        dict(rollout_batch=4),
    ):
        assert peak(**less) < usual, less
    for more in (dict(micro_batch=4), dict(gradient_checkpointing=False), dict(load_in_4bit=False)):
        assert peak(**more) > usual, more


@pytest.mark.parametrize("phase", memory.LOWER)
def test_memory_that_runs_out_is_one_sentence(phase):
    """A true failure of the allocator, not one of ours."""
    with pytest.raises(UserError, match=f"'{phase}'.*: {memory.LOWER[phase][:8]}"), memory.phase(phase):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_of_a_phase_stay_what_they_are():
    with pytest.raises(RuntimeError, match="size"), memory.phase("rollout"):
        torch.zeros(2) + torch.zeros(3)


def test_half_precision_learns_what_full_precision_does(model):
    """float16, for cards without bf16: gradients that would vanish are kept by a scale."""
    found = []
    for dtype in (torch.float32, torch.float16):
        policy = add_lora(load_policy(str(model), load_in_4bit=False, dtype=dtype), 4)
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                torch.manual_seed(len(name))
                nn.init.normal_(weight, std=0.02)
        cfg = replace(resolve({"beta": 0.0}, policy.processor.family)[0], max_grad_norm=1e9)
        item = encode(policy.processor, "Where?", noise((112, 84), 0))
        batch = collate(policy, [item])
        generator = torch.Generator(policy.device).manual_seed(0)
        rollouts = rollout(policy, batch, 2, 6, generator)
        rollouts.tokens[:] = torch.arange(100, 100 + rollouts.tokens.numel()).view(rollouts.tokens.shape)
        rollouts.mask[:] = True
        advantages = torch.tensor([[1e-5, 2e-5]], device=policy.device)
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.0)
        locus_mini.optimizer_step(policy, optimizer, [(batch, rollouts, advantages, None)], cfg, sft_loss)
        found.append(torch.cat([p.grad.flatten() for p in trained]))
    full, half = found
    assert torch.cosine_similarity(full, half, dim=0) > 0.99
    assert half.norm() == pytest.approx(full.norm().item(), rel=0.05)
