"""The published families: their own configs in miniature through the real code, in 4 bit, on COCO."""

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

NAMES = ("Qwen2.5-VL-7B-Instruct", "Qwen3-VL-4B-Instruct", "Qwen3-VL-4B-Thinking", "MiMo-VL-7B-RL")


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory) -> Path:
    """A model folder with a family's config in miniature and random weights, stored as on the hub."""
    folder = families.settings(request.param, tmp_path_factory.mktemp("hub") / request.param, miniature=True)
    return families.random_weights(folder, std=0.1, shard=20_000)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> list[str]:
    """Flags for a small COCO data set: eight photos for training, three held out."""
    corpus = Corpus(tmp_path_factory.mktemp("coco"))
    for heldout, count in ((False, 8), (True, 3)):
        for i in range(count):
            number = an_id(heldout, i)
            corpus.image(number, noise((320, 240), number))
            corpus.box(number, 40 + 10 * i, 60, 24, 20)
            corpus.box(number, 150, 30 + 10 * i, 50, 40, kind=7)
    (corpus.folder / "ids.txt").write_text("")
    flags = ["--annotations", corpus.file, "--images", corpus.images, "--exclude", corpus.folder / "ids.txt"]
    return ["--data", "coco", *map(str, flags)]


def test_each_weight_has_its_precision_and_only_the_adapter_is_trained(model):
    """As on a GPU: 4-bit text layers, bf16 elsewhere, and a trainable adapter in float32."""
    policy = add_lora(load_policy(str(model), load_in_4bit=True, dtype=torch.bfloat16), 4)
    counts = {"4 bit": 0, "bf16": 0, "trained": 0}
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            assert "language_model" in name and parameter.dtype == torch.float32 and parameter.requires_grad
            counts["trained"] += 1
            continue
        assert not parameter.requires_grad, name
        is_quantised = "language_model.layers" in name and parameter.dim() == 2 and "norm" not in name
        if is_quantised:
            assert parameter.dtype == torch.uint8 and parameter.quant_type == "nf4", name
            assert parameter.quant_state.nested and parameter.quant_state.dtype == torch.bfloat16, name
        else:
            assert parameter.dtype == torch.bfloat16, name
        counts["4 bit" if is_quantised else "bf16"] += 1
    # 7 linear maps in each of 2 layers; an adapter has A and B for each.
    assert counts["4 bit"] == 7 * 2 and counts["trained"] == 2 * 7 * 2
    visual = [module for name, module in policy.base_model.named_modules() if "visual" in name]
    visual = [module for module in visual if isinstance(module, nn.Linear)]
    assert visual and all(type(module) is nn.Linear for module in visual), (
        "the vision tower must not be quantised"
    )
    assert type(policy.base_model.lm_head) is nn.Linear
    is_tied = policy.base_model.lm_head.weight is policy.base_model.model.language_model.embed_tokens.weight
    assert is_tied == policy.base_model.config.tie_word_embeddings


def test_training_and_evaluation_run_in_4_bit_on_coco(model, coco, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    arguments = ["--model", model, "--load-in-4bit", *coco, "--out", run, "--steps", 2, "--prompts", 2]
    arguments += ["--num-generations", 3, "--max-new-tokens", 6, "--eval-cues", 1, "--image-pixels", 60_000]
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", *map(str, arguments)])
    locus_mini.main()
    out = capsys.readouterr().out
    assert "self-check passed" in out and (run / "adapter" / "adapter_model.safetensors").is_file()
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["cue"]["n"] == 1 and results["settings"]["gradient_checkpointing"]
    config = json.loads((run / "config.json").read_text())
    assert config["origin"]["lr"] == config["origin"]["micro_batch"] == "model family"
    assert config["origin"]["image_pixels"] == "flag" and config["image_pixels"] == 60_000
    assert "lora_targets" in out and "skip_4bit" in out
    arguments = ["eval.py", "cues", "--model", model, "--load-in-4bit", *coco, "--n", 1]
    arguments += ["--max-new-tokens", 4]
    arguments += ["--adapter", run / "adapter", "--out", tmp_path / "after"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    evaluation.main()
    assert (tmp_path / "after" / "results.json").is_file()


def test_a_prompt_equals_that_of_the_published_template(model):
    """The default system prompt, two images, the text, and the opening of the completion if there is one."""
    policy = load_policy(str(model), load_in_4bit=False)
    prompt = encode(policy.processor, "Where?", noise((56, 56), 0), crop=noise((112, 112), 1))
    text, pad = policy.processor.tokenizer.decode(prompt.input_ids), "<|image_pad|>"
    parts = text.replace(pad, "").split("<|vision_start|>")
    system_prompt = families.SYSTEM.get(model.name[:7])
    system_turn = f"<|im_start|>system\n{system_prompt}<|im_end|>\n" if system_prompt else ""
    end = "<|vision_end|>Where?<|im_end|>\n<|im_start|>assistant\n"
    opening = "<think>\n" if model.name.endswith("Thinking") else ""
    assert parts[0] == f"{system_turn}<|im_start|>user\n"
    assert parts[1] == "<|vision_end|>" and text.count(pad) == int(prompt.mm_token_type_ids.sum())
    assert parts[2] == end + opening
    assert policy.processor.family.opening == opening
    stop_tokens = {policy.processor.tokenizer.decode([i]) for i in policy.stop_ids}
    assert stop_tokens == {"<|im_end|>", "<|endoftext|>"}, "the two that generation_config names"


def test_a_published_model_gets_the_settings_of_its_family(tmp_path):
    """MiMo-VL is recognised by its sizes, a Thinking model by its chat template."""
    folders = {name: families.settings(name, tmp_path / name) for name in families.PARAMETERS}
    rows = {name: read_family(str(folder))[1] for name, folder in folders.items()}
    thinking = {name for name, family in rows.items() if family.max_new_tokens > 256}
    assert thinking == {"Qwen3-VL-4B-Thinking", "MiMo-VL-7B-RL"}
    for name, family in rows.items():
        assert family.box_frame == ("relative1000" if name.startswith("Qwen3") else "resized")


def test_a_renamed_folder_keeps_its_family(tmp_path):
    mimo = families.settings("MiMo-VL-7B-RL", tmp_path / "renamed")
    assert read_family(str(mimo))[1].max_new_tokens == 1024
    folder = families.settings("Qwen3-VL-4B-Thinking", tmp_path / "also renamed", miniature=True)
    policy = load_policy(str(families.random_weights(folder)), load_in_4bit=False)
    assert policy.processor.family.max_new_tokens == 1024, "the chat template opens with <think>"


def test_flags_override_the_settings_of_the_family():
    _, family = read_family(str(families.FOLDER / "Qwen2.5-VL-7B-Instruct"))
    cfg, origin = resolve({"lr": 2e-5, "crop_pixels": 50_000, "gradient_checkpointing": False}, family)
    assert (cfg.lr, cfg.crop_pixels, cfg.gradient_checkpointing) == (2e-5, 50_000, False)
    assert (cfg.prompts, cfg.micro_batch) == (8, 1)
    assert {origin[name] for name in ("lr", "crop_pixels", "gradient_checkpointing")} == {"flag"}
    assert {origin[name] for name in ("prompts", "micro_batch", "image_pixels")} == {"model family"}


@pytest.mark.parametrize("name", families.PARAMETERS)
def test_a_config_has_the_published_number_of_parameters(name):
    model = dry_run.empty_model(AutoConfig.from_pretrained(families.FOLDER / name))
    assert sum(parameter.numel() for parameter in model.parameters()) == families.PARAMETERS[name]


def test_the_predicted_bytes_of_weights_equal_those_of_a_loaded_model(model):
    """By part: quantised text layers, other weights in 16 bits, and the adapter."""
    _, family = read_family(str(model))
    policy = add_lora(load_policy(str(model), load_in_4bit=True, dtype=torch.bfloat16), 4)
    predicted = dry_run.weights(dry_run.empty_model(policy.base_model.config), family, True, 4)
    loaded = {"text layers": 0, "other weights": 0, "adapter": 0}
    for name, weight in policy.model.named_parameters():
        in_layer = "language_model" in name and ".layers." in name
        part = "adapter" if "lora_" in name else "text layers" if in_layer else "other weights"
        loaded[part] += weight.nbytes
        if (state := getattr(weight, "quant_state", None)) is not None:
            loaded[part] += state.absmax.nbytes + state.state2.absmax.nbytes
    assert predicted["other weights"] == loaded["other weights"]
    assert predicted["adapter"] == loaded["adapter"]
    assert predicted["text layers"] == pytest.approx(loaded["text layers"], rel=0.01)


def test_a_dry_run_without_a_gpu_says_that_its_figures_are_predicted(monkeypatch, capsys):
    name = str(families.FOLDER / "Qwen2.5-VL-7B-Instruct")
    flags = ["--dry-run", "--image-pixels", "307200", "--crop-pixels", "40000"]
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", "--model", name, *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    locus_mini.main()
    out = capsys.readouterr().out
    assert "Predicted, not measured" in out and "If it does not fit: lower --" in out
    peaks = [float(number) for number in re.findall(r"^\w.{13} +(\d+\.\d+)  ", out, re.MULTILINE)]
    assert len(peaks) == 4 and 6 < min(peaks) < max(peaks) < 16, "of 7B: the weights alone are 7 GB"


def test_flags_that_lower_or_raise_the_memory_change_the_prediction():
    config, family = read_family(str(families.FOLDER / "Qwen2.5-VL-7B-Instruct"))
    model = dry_run.empty_model(config)

    def predicted_bytes(**flags) -> int:
        predicted = dry_run.predict(model, resolve(flags, family)[0], family)
        return sum(sum(parts.values()) for parts in predicted.values())

    default = predicted_bytes()
    for flags in (
        dict(max_new_tokens=128),
        dict(num_generations=4),
        dict(image_pixels=300_000),
        dict(lora_rank=4),
        dict(rollout_batch=4),
    ):
        assert predicted_bytes(**flags) < default, flags
    for flags in (dict(micro_batch=4), dict(gradient_checkpointing=False), dict(load_in_4bit=False)):
        assert predicted_bytes(**flags) > default, flags


@pytest.mark.parametrize("phase", memory.LOWER)
def test_running_out_of_memory_ends_with_one_sentence(phase):
    """The allocator itself fails; the test raises nothing."""
    message = f"'{phase}', which asked for another {2**60} bytes: {memory.LOWER[phase][:8]}"
    with pytest.raises(UserError, match=message), memory.phase(phase):
        torch.empty(2**60, dtype=torch.uint8)


def test_the_amount_that_a_gpu_lacks_is_named():
    """The text is that of torch 2.13 on a card."""
    text = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8.00 GiB."
    with pytest.raises(UserError, match="which asked for another 20.00 MiB: "), memory.phase("rollout"):
        raise torch.OutOfMemoryError(text)


def test_other_errors_in_a_phase_are_raised_unchanged():
    with pytest.raises(RuntimeError, match="size"), memory.phase("rollout"):
        torch.zeros(2) + torch.zeros(3)


def test_float16_gradients_equal_those_of_float32(model):
    """float16 is for cards without bf16; without the loss scale, the smallest gradients would be 0."""
    gradients = []
    for dtype in (torch.float32, torch.float16):
        policy = add_lora(load_policy(str(model), load_in_4bit=False, dtype=dtype), 4)
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                torch.manual_seed(len(name))
                nn.init.normal_(weight, std=0.02)
        cfg = replace(resolve({"beta": 0.0}, policy.processor.family)[0], max_grad_norm=1e9)
        prompt = encode(policy.processor, "Where?", noise((112, 84), 0))
        batch = collate(policy, [prompt])
        generator = torch.Generator(policy.device).manual_seed(0)
        rollouts = rollout(policy, batch, 2, 6, generator)
        rollouts.tokens[:] = torch.arange(100, 100 + rollouts.tokens.numel()).view(rollouts.tokens.shape)
        rollouts.mask[:] = True
        advantages = torch.tensor([[1e-5, 2e-5]], device=policy.device)
        trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable_params, lr=0.0)
        locus_mini.optimizer_step(policy, optimizer, [(batch, rollouts, advantages, None)], cfg, sft_loss)
        gradients.append(torch.cat([p.grad.flatten() for p in trainable_params]))
    full, half = gradients
    assert torch.cosine_similarity(full, half, dim=0) > 0.99
    assert half.norm() == pytest.approx(full.norm().item(), rel=0.05)
