"""From a name to a policy: load a model, in 4 bit if asked, recognise its family, add an adapter.

What differs from a typical QLoRA script:
- No AutoProcessor (Qwen-VL's needs torchvision) and no prepare_model_for_kbit_training (it upcasts the
  embeddings, the head and the vision tower to float32: 6.4 → 9.7 GiB on a 7B model).
- The vision tower and lm_head stay 16-bit. The language layers' adapter is float32: bf16 loses steps of 1e-6.
- Gradient checkpointing is our own: transformers' needs train mode, which silently drops a rollout's cache.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files import checkpoints
from files.errors import UserError, model_folder
from policy import Policy
from prompts import FAMILIES, Family, Processor

MIMO_VL = (151_680, 4096, 36)  # vocabulary, hidden size, text layers: its config says Qwen2.5-VL
# What weights and adapters of transformers 4 call the parts of a model, and their names today.
OLD_NAMES = {r"^visual\.": "model.visual.", r"^model\.(?=layers\.|norm\.|embed_)": "model.language_model."}


def device_and_dtype(cpu: bool = False) -> tuple[torch.device, torch.dtype]:
    """bf16 on a GPU that has it, else float16; float32 on the CPU, which `cpu` asks for."""
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # older cards emulate it, slowly
    return torch.device("cuda"), torch.bfloat16 if has_bf16 else torch.float16


def read_family(name: str, frame: str | None = None) -> tuple[Any, Family]:
    """The config of a model folder or hub id, and its row of FAMILIES, with another box frame if given.

    UserError where the family, and so its box frame, is unknown.
    """
    config = checkpoints.read_config(name)
    family_name, completion_prefix = getattr(config, "locus_family", config.model_type), ""
    if family_name not in FAMILIES:
        if frame is None:
            raise UserError(f"--model {name} is of an unknown family, {family_name}: give its --box-frame.")
        print(f"--model {name}: {family_name} is unknown, so treated like qwen2_5_vl.", file=sys.stderr)
    text = config.get_text_config()
    shape = (text.vocab_size, text.hidden_size, text.num_hidden_layers)
    if family_name == "qwen2_5_vl" and shape == MIMO_VL:
        family_name = "mimo_vl"
    with suppress(UserError):  # --dry-run needs settings alone, without a tokenizer
        *_, completion_prefix = checkpoints.read_processors(name, config)
    # The template tells: folders of both kinds are renamed, and called no-thinking.
    if family_name == "qwen3_vl" and completion_prefix:
        family_name = "qwen3_vl_thinking"
    family = FAMILIES.get(family_name, FAMILIES["qwen2_5_vl"])
    return config, replace(family, opening=completion_prefix, box_frame=frame or family.box_frame)


def load_policy(
    name: str, load_in_4bit: bool | None = None, frame: str | None = None, dtype: torch.dtype | None = None,
    cpu: bool = False,
) -> Policy:  # fmt: skip
    """Model, tokenizer and image processor of a folder or hub id; 4-bit if asked (default: where CUDA is).

    dtype: of what is not 4-bit (default: the device's). cpu: use no GPU. UserError where loading fails.
    """
    # cuDNN attention plans anew for every length, 20 to 40 ms for each token of a rollout.
    torch.backends.cuda.enable_cudnn_sdp(False)
    (config, family), (device, device_dtype) = read_family(name, frame), device_and_dtype(cpu)
    dtype = dtype or device_dtype
    if dtype == torch.float16:
        print("This GPU has no bfloat16: in float16, groups can overflow (docs/gpu.md).", file=sys.stderr)
    tokenizer, image_processor, _ = checkpoints.read_processors(name, config)
    processor = Processor(tokenizer, image_processor, family, "")
    quantize = device.type == "cuda" if load_in_4bit is None else load_in_4bit
    # With a device map, each weight goes to the device and to 4 bit as it is read, never all in 16.
    load_kwargs = dict(dtype=dtype, device_map={"": device}, key_mapping=OLD_NAMES)
    # Not for weights that are in 4 bit already: their config wins, and even None would replace it.
    if not checkpoints.check_weight_files(name, config, load_in_4bit) and quantize:
        nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        nf4 |= dict(bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=list(family.skip_4bit))
        load_kwargs["quantization_config"] = hf.BitsAndBytesConfig(**nf4)
    # Packed passes need sdpa: eager attention adds a bool mask as 0 and 1. Pickles and a model's own code
    # could do anything; unset, transformers asks whether to run that code.
    load_kwargs |= dict(attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False)
    # Weights that do not fit are all named in loading_info, and refused there.
    load_kwargs |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    with checkpoints.one_sentence(name, "download it again"):
        auto_model = hf.AutoModelForImageTextToText
        model, loading_info = auto_model.from_pretrained(model_folder(name), **load_kwargs)
    checkpoints.check_loaded_weights(name, loading_info)
    for parameter in model.parameters():
        # What is not quantised in a 4-bit checkpoint would stay in the dtype that it was saved in.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights, and no gradient passes through them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype  # a 4-bit checkpoint may name another
    return make_policy(model.eval().requires_grad_(False), processor, device)


def make_policy(model: nn.Module, processor: Processor, device: torch.device) -> Policy:
    """A policy around a loaded model: which tokens end a completion, and which must never be sampled."""
    config, tokenizer = model.config, processor.tokenizer
    processor.image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    logit_bias = torch.zeros(config.get_text_config().vocab_size, device=device)  # [V]
    # A sampled image token would make the next forward pass fail: it has no image.
    logit_bias[[config.image_token_id, config.video_token_id]] = -torch.inf
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv3d)):
        conv.forward = partial(patch_embedding, conv)
    stop_ids = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(stop_ids if isinstance(stop_ids, list) else [stop_ids])} - {None}
    return Policy(model, processor, device, logit_bias, torch.tensor(sorted(stop_ids), device=device))


def patch_embedding(conv: nn.Conv3d, patches: Tensor) -> Tensor:
    """The convolution of patches [N, C, 2, p, p] as one matrix product, [N, H]: several times faster.

    No two patches overlap, so each is multiplied by the whole kernel once.
    """
    return F.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)


def enable_gradient_checkpointing(policy: Policy) -> None:
    """The text layers keep only their inputs, and are recomputed in the backward pass."""

    def forward(original_forward: Callable, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # never in a rollout, so never with a cache
            return checkpoint(original_forward, hidden_states, *args, use_reentrant=False, **kwargs)
        return original_forward(hidden_states, *args, **kwargs)

    for layer in policy.base_model.model.language_model.layers:
        layer.forward = partial(forward, layer.forward)


def add_lora(policy: Policy, rank: int, seed: int = 0) -> Policy:
    """A new LoRA adapter on the text layers, in float32. B is 0, so the policy starts as the reference."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=policy.processor.family.lora_targets)
    return replace(policy, model=get_peft_model(policy.model, config).eval())


def load_adapter(policy: Policy, folder: Path) -> Policy:
    """The policy with a trained adapter from a folder in PEFT's format; UserError where it does not fit."""
    checkpoints.check_adapter_files(folder, policy.base_model.name_or_path)
    remedy = "it does not fit the model, so pass the --model it was trained on"
    with checkpoints.one_sentence(folder, remedy, "--adapter"):
        model = PeftModel.from_pretrained(policy.model, folder, key_mapping=OLD_NAMES).eval()
        saved = load_peft_weights(str(folder), device="cpu", key_mapping=OLD_NAMES).keys()
        # PEFT only warns of layers without weights, and says nothing of weights without a layer.
        loaded = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        if unmatched := sorted(saved ^ loaded):
            raise ValueError(f"{len(unmatched)} weights have no counterpart, first {unmatched[0]}")
    return replace(policy, model=model)
