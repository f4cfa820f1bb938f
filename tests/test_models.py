"""Loading models: 4-bit weights on the CPU, families, adapters, and errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from random_models import prompts, random_model, random_policy, with_adapter
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForImageTextToText

from files.errors import UserError
from models import add_lora, load_adapter, load_policy
from policy import collate, rollout, token_logps
from tiny import architecture
from training.checks import self_check


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def folder(request, tmp_path_factory) -> Path:
    """A model folder as on the hub: config, safetensors, tokenizer, chat template, image processor."""
    path = tmp_path_factory.mktemp(request.param)
    tokenizer = architecture.build_tokenizer()
    random_model(request.param, tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    random_policy(request.param).processor.image_processor.save_pretrained(path)
    return path


def test_4bit_quantises_the_text_layers_only(folder):
    policy = load_policy(str(folder), load_in_4bit=True)
    linear = {
        name: type(module).__name__
        for name, module in policy.base_model.named_modules()
        if "Linear" in type(module).__name__
    }
    for name, class_name in linear.items():
        is_quantised = "language_model" in name
        assert (class_name == "Linear4bit") == is_quantised, f"{name} is {class_name}"
    layers = [module for module in policy.base_model.modules() if type(module).__name__ == "Linear4bit"]
    assert layers and all(layer.weight.quant_type == "nf4" for layer in layers)
    assert all(layer.weight.quant_state.nested for layer in layers), "no double quantisation"
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers), "a rollout would repack the weights"


def test_a_rollout_does_not_change_4bit_gradients(folder):
    policy = with_adapter(load_policy(str(folder), load_in_4bit=True))
    torch.manual_seed(0)
    batch = collate(policy, prompts(policy, 2))
    trainable_params = [p for p in policy.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable_params} == {torch.float32}
    tokens = torch.randint(20, 300, (2, 3, 5), generator=torch.Generator().manual_seed(0))

    def gradient() -> torch.Tensor:
        logps = token_logps(policy, batch, tokens, torch.ones_like(tokens, dtype=torch.bool))
        return torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), trainable_params)])

    before = gradient()
    rollout(policy, batch, 2, 6, torch.Generator().manual_seed(0))
    assert before.abs().max() > 0
    assert cosine_similarity(before, gradient(), dim=0) > 0.999


def test_4bit_passes_the_self_check(folder):
    policy = add_lora(load_policy(str(folder), load_in_4bit=True), 4)
    torch.manual_seed(0)
    assert self_check(policy, prompts(policy, 2), 3, 8, seed=0)["rollout_gap"] < 1e-3


def test_a_4bit_model_scores_like_the_same_model_in_full_precision(folder):
    """The log-probabilities correlate, but are not equal."""
    torch.manual_seed(0)
    full, quantised = (
        load_policy(str(folder), load_in_4bit=False),
        load_policy(str(folder), load_in_4bit=True),
    )
    batch = collate(full, prompts(full, 2))
    tokens = torch.randint(20, 300, (2, 4, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    values = [token_logps(p, batch, tokens, mask).flatten() for p in (full, quantised)]
    assert torch.corrcoef(torch.stack(values))[0, 1] > 0.8
    assert not torch.allclose(*values, atol=1e-4)


def test_a_saved_adapter_loads_here_and_in_plain_peft(folder, tmp_path):
    policy = with_adapter(load_policy(str(folder), load_in_4bit=False))
    torch.manual_seed(0)
    batch = collate(policy, prompts(policy, 2))
    rollouts = rollout(policy, batch, 2, 6, torch.Generator().manual_seed(0))
    expected = token_logps(policy, batch, rollouts.tokens, rollouts.mask)
    policy.model.save_pretrained(tmp_path)
    loaded = load_adapter(load_policy(str(folder), load_in_4bit=False), tmp_path)
    assert torch.allclose(token_logps(loaded, batch, rollouts.tokens, rollouts.mask), expected, atol=1e-6)
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path)
    merged = plain.merge_and_unload().eval()
    (prompt,) = prompts(policy, 1)
    inputs = dict(
        input_ids=prompt.input_ids[None],
        attention_mask=torch.ones_like(prompt.input_ids)[None],
        mm_token_type_ids=prompt.mm_token_type_ids[None],
        pixel_values=torch.cat([image.pixel_values for image in prompt.images]),
        image_grid_thw=torch.stack([image.grid_thw for image in prompt.images]),
    )
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, policy.base_model(**inputs).logits, atol=1e-4)


def test_a_family_is_recognised_by_its_config(folder):
    policy = load_policy(str(folder), load_in_4bit=False)
    expected = {"qwen2_5_vl": "resized", "qwen3_vl": "relative1000"}
    assert policy.processor.family.box_frame == expected[policy.base_model.config.model_type]
    assert load_policy(str(folder), False, frame="resized").processor.family.box_frame == "resized"


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nothing"])
def test_a_missing_model_is_an_error(name):
    with pytest.raises(UserError, match="--model"):
        load_policy(name)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        load_policy(str(tmp_path))


def test_an_unknown_family_needs_a_box_frame(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(UserError, match="--box-frame"):
        load_policy(str(tmp_path))


def test_a_folder_without_an_adapter_is_an_error(folder, tmp_path):
    with pytest.raises(UserError, match="adapter_config"):
        load_adapter(load_policy(str(folder), False), tmp_path)


def test_an_adapter_of_another_model_is_an_error(folder, tmp_path):
    with_adapter(random_policy("qwen3_vl", width=96)).model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="does not fit the model"):
        load_adapter(load_policy(str(folder), load_in_4bit=False), tmp_path / "adapter")


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_the_opening_of_a_thinking_template_belongs_to_the_completion(folder, opening, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    prefix = "<|im_start|>assistant\n"
    text = template.read_text()
    assert prefix.replace("\n", "\\n") in text or prefix in text
    for spelling in (prefix, prefix.replace("\n", "\\n")):
        text = text.replace(spelling + "{% endif %}", spelling + opening + "{% endif %}")
    template.write_text(text)
    policy = load_policy(str(tmp_path / "model"), load_in_4bit=False)
    assert policy.processor.family.opening == opening


def test_loading_turns_cudnn_attention_off(folder):
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_policy(str(folder), load_in_4bit=False)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_float16_warns_in_one_sentence(dtype, folder, capsys):
    load_policy(str(folder), load_in_4bit=False, dtype=dtype)
    assert ("no bfloat16" in capsys.readouterr().err) == (dtype == torch.float16)
