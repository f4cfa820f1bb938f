"""From a name to a policy: a model loaded, in 4 bit where asked, its family recognised, an adapter added."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files.errors import UserError, model_folder
from policy import Policy
from prompts import FAMILIES, Family, Tools, opening

# PEFT asks transformers for gradient checkpointing by a name that transformers 5 renames.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

MIMO_WORDS = 151_680  # size of MiMo-VL's vocabulary, by which a renamed folder is recognised


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """Where a model goes, and in which numbers: bf16 on a GPU that has it, else float16; CPU: float32."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)  # older cards say yes, and emulate it
    return torch.device("cuda"), torch.bfloat16 if native else torch.float16


def read_family(name: str, frame: str | None = None) -> tuple[Any, Family]:
    """The config of a folder or hub id, and the row of FAMILIES for it, with another box frame if given.

    MiMo-VL's architecture is Qwen2.5-VL's. UserError where the family, and so its box frame, is unknown.
    """
    try:
        config = hf.AutoConfig.from_pretrained(model_folder(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name} cannot be loaded: {str(error).splitlines()[0]}") from None
    kind = getattr(config, "locus_family", config.model_type)
    if kind not in FAMILIES and frame is None:
        raise UserError(f"--model {name} is of the unknown family {kind}: name its --box-frame.")
    last = Path(name).name.lower()
    if kind == "qwen2_5_vl" and ("mimo" in last or config.text_config.vocab_size == MIMO_WORDS):
        kind = "mimo_vl"
    if kind == "qwen3_vl" and "thinking" in last:
        kind = "qwen3_vl_thinking"
    family = FAMILIES.get(kind, FAMILIES["qwen2_5_vl"])
    return config, replace(family, box_frame=frame or family.box_frame)


def load_policy(
    name: str, load_in_4bit: bool | None = None, frame: str | None = None, dtype: torch.dtype | None = None
) -> Policy:
    """Model, tokenizer and image processor of a folder or hub id; 4-bit if asked (default: where CUDA is).

    dtype: of what is not 4-bit, by default the device's. No AutoProcessor: Qwen-VL's needs torchvision.
    UserError where the model cannot be had.
    """
    (_, family), folder, (device, usual) = read_family(name, frame), model_folder(name), device_and_dtype()
    dtype, four = dtype or usual, device.type == "cuda" if load_in_4bit is None else load_in_4bit
    safe = dict(trust_remote_code=False)  # unset, transformers asks whether to run a model's own code
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    nf4 |= dict(bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=list(family.skip_4bit))
    how = dict(dtype=dtype, quantization_config=hf.BitsAndBytesConfig(**nf4) if four else None)
    how |= dict(attn_implementation="sdpa", use_safetensors=True)  # a pickle could run anything
    try:
        # With a device map, each weight goes to the device and to 4 bit as it is read, never all in 16.
        model = hf.AutoModelForImageTextToText.from_pretrained(folder, device_map={"": device}, **how, **safe)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, **safe)
        processor = hf.AutoImageProcessor.from_pretrained(folder, **safe)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name} cannot be loaded: {str(error).splitlines()[0]}") from None
    if (begun := opening(tokenizer)) and family == replace(FAMILIES["qwen3_vl"], box_frame=family.box_frame):
        family = replace(FAMILIES["qwen3_vl_thinking"], box_frame=family.box_frame)
    tools = Tools(tokenizer, processor, replace(family, opening=begun), "")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its repacked weights would pass no gradient on
            module.support_avx512bf16_for_cpu = False
    return make_policy(model.eval().requires_grad_(False), tools, device)


def make_policy(model: nn.Module, tools: Tools, device: torch.device) -> Policy:
    """A policy around a loaded model: which tokens stop an answer, and which must never be part of one."""
    config = model.config
    tools.image_token = tools.tokenizer.convert_ids_to_tokens(config.image_token_id)
    forbidden = torch.zeros(config.get_text_config().vocab_size, device=device)
    forbidden[[config.image_token_id, config.video_token_id]] = -torch.inf
    for proj in (module for module in model.modules() if isinstance(module, nn.Conv3d)):
        proj.forward = partial(patch_product, proj)  # PyTorch's convolution takes several times as long
    stops = model.generation_config.eos_token_id
    stops = {tools.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    return Policy(model, tools, device, forbidden, torch.tensor(sorted(stops), device=device))


def patch_product(proj: nn.Conv3d, patches: Tensor) -> Tensor:
    """The convolution of patches [N, C, 2, p, p] as the one product that it is, [N, H]: none overlap."""
    return F.linear(patches.flatten(1), proj.weight.flatten(1), proj.bias)


def recompute_layers(policy: Policy) -> Policy:
    """Gradient checkpointing of the text layers: they keep their inputs alone, and run again for gradients.

    transformers' own needs train mode, and then drops the cache of a rollout without a word.
    """

    def forward(usual: Callable, hidden: Tensor, *args: Any, **ways: Any) -> Any:
        if torch.is_grad_enabled():  # never in a rollout, so never with a cache
            return checkpoint(usual, hidden, *args, use_reentrant=False, **ways)
        return usual(hidden, *args, **ways)

    for layer in policy.whole.model.language_model.layers:
        layer.forward = partial(forward, layer.forward)
    return policy


def add_lora(policy: Policy, rank: int, seed: int = 0) -> Policy:
    """LoRA on the text layers, float32 (bf16 would not move at small steps); B = 0: no change yet."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=policy.tools.family.lora_targets)
    return replace(policy, model=get_peft_model(policy.model, config).eval())


def load_adapter(policy: Policy, folder: Path) -> Policy:
    """The policy with a trained adapter from a folder in PEFT's format."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"--adapter {folder} holds no {name}: give the adapter folder of a run.")
    try:
        return replace(policy, model=PeftModel.from_pretrained(policy.model, folder).eval())
    except (OSError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"--adapter {folder} does not fit the model ({why}): give its own --model.") from None
