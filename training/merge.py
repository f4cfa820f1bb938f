"""Merges an adapter into the 16-bit weights of its base model, and compares the result with the two.

    python -m training.merge ADAPTER OUT [--base FOLDER] [--cpu]

What differs from PEFT's merge_and_unload:
- The weight files are copied, and each merged weight is written over its copy, so names, index and tied
  weights stay those of the base. Only the comparison loads models.
- It merges into the unquantised weights, although most adapters are trained on 4-bit ones.
- OUT exists only if its log-probabilities are those of base + adapter. Of the models that this compares, one
  is in memory at a time.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from data import CueConfig, encode_cue, scene_cues
from files.checkpoints import check_adapter_files, refusal, weight_file_names
from files.errors import FlagParser, UserError, exit_on_error, model_folder
from models import OLD_NAMES, load_adapter, load_policy
from policy import Batch, Policy, Rollout, collate, rollout, token_logps
from training.checks import HALF_LIMITS

# Entries of adapter_config.json that are plain LoRA whatever their value: they select modules, scale B·A, say
# where the adapter comes from, or act only together with others. Any other one has to be off.
KNOWN = "alpha_pattern auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern "
KNOWN += "layers_to_transform lora_alpha lora_dropout megatron_core peft_type peft_version qalora_group_size "
KNOWN += "r rank_pattern revision target_modules task_type use_rslora"
OFF = {"bias": "none", "init_lora_weights": True}  # elsewhere off is false or empty
# The base's weights in any format, and its model card, which is not that of the merged model.
NOT_COPIED = re.compile(r"README\.md|.*\.(safetensors|bin|pth?|gguf|onnx|h5|msgpack)")

# ---------------------------------------------------------------- the merge


def read_base(adapter: Path) -> str:
    """The base model that an adapter names, or "unknown"; UserError for one that is not plain LoRA."""
    check_adapter_files(adapter, "")
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    for name in sorted(config.keys() - KNOWN.split()):
        if config[name] and config[name] != OFF.get(name):
            raise refusal(adapter, f"its {name} is more than plain LoRA; train without it", "--adapter")
    return config.get("base_model_name_or_path") or "unknown"


def module_name(key: str) -> str:
    """The module of a weight, which older checkpoints call by another name.

    >>> module_name("model.layers.0.mlp.up_proj.weight")
    'model.language_model.layers.0.mlp.up_proj'
    """
    for pattern, replacement in OLD_NAMES.items():
        key = re.sub(pattern, replacement, key)
    return key.removesuffix(".weight")


def merge_file(source: Path, target: Path, layers: dict[str, torch.nn.Module]) -> set[str]:
    """Copies a safetensors file with W + scaling · B·A in place of W; returns the layers whose W it holds.

    layers: PEFT's LoRA layers by name.
    """
    shutil.copyfile(source, target)
    with safe_open(source, "pt") as weights, target.open("r+b") as file:
        # Shape and dtype stay, so a merged weight fits in the place that the header names.
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        found = {module_name(key): key for key in header if module_name(key) in layers}
        for name, key in found.items():
            weight = weights.get_tensor(key)  # [out, in]
            # In float32: if B·A were rounded to 16 bit before the sum, the result would be rounded twice.
            merged = weight.float() + layers[name].get_delta_weight("default").float().cpu()  # [out, in]
            file.seek(8 + header_size + header[key]["data_offsets"][0])
            file.write(merged.to(weight.dtype).view(torch.uint8).numpy())
    return set(found)


def merge(base: Path, layers: dict[str, torch.nn.Module], out: Path) -> None:
    """Writes the merged model into a new folder; UserError where the base has no weight for a layer."""
    out.mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file() and not NOT_COPIED.fullmatch(path.name):
            shutil.copyfile(path, out / path.name)
    found = set().union(*(merge_file(base / n, out / n, layers) for n in weight_file_names(base)))
    if missing := sorted(layers.keys() - found):
        raise UserError(f"{base} has no weight of its own for {missing[0]}: train an adapter without it.")


# ---------------------------------------------------------------- the comparison


def cue_batch(policy: Policy) -> Batch:
    """Four held-out cues of the embedded scenes, as prompts of the model's family."""
    cues = scene_cues(CueConfig(), "heldout", 0)
    return collate(policy, [encode_cue(policy.processor, cues[i], "object") for i in range(4)])


def logps_of(policy: Policy, rollouts: Rollout) -> torch.Tensor:
    """The log-probabilities of all tokens of completions of `cue_batch`, [N]."""
    return token_logps(policy, cue_batch(policy), rollouts.tokens, rollouts.mask)[rollouts.mask]


@torch.no_grad()
def merge_and_compare(adapter: Path, out: Path, base: str | None = None, cpu: bool = False) -> None:
    """A whole merge. UserError, and no OUT, if the merged model differs from base + adapter."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"OUT {out} exists and is not empty: give another folder.")
    named_base, new, gaps = read_base(adapter), out.with_name(f"{out.name}.new"), {}
    name, kwargs = base or named_base, dict(dtype=torch.bfloat16, cpu=cpu)
    shutil.rmtree(new, ignore_errors=True)  # a kill may have left one
    try:
        # What the merged model must equal: base + adapter in 16 bit, on completions that it samples itself.
        policy = load_adapter(load_policy(name, False, **kwargs), adapter)
        rollouts = rollout(policy, cue_batch(policy), 2, 32, torch.Generator(policy.device).manual_seed(0))
        expected = logps_of(policy, rollouts)  # [N]
        with policy.reference():
            gaps["base without adapter"] = logps_of(policy, rollouts) - expected
        layers = {key: m for key, m in policy.base_model.named_modules() if hasattr(m, "get_delta_weight")}
        # Of a hub id, the folder that it was downloaded to.
        merge(Path(cached_file(model_folder(name), "config.json")).parent, layers, new)
        # Out of memory before the next model is loaded.
        del policy, layers
        gaps["merged model"] = logps_of(load_policy(str(new), False, **kwargs), rollouts) - expected
        policy = load_adapter(load_policy(name, True, **kwargs), adapter)
        gaps["4 bit + adapter"] = logps_of(policy, rollouts) - expected
        means, limit = {key: gap.abs().mean().item() for key, gap in gaps.items()}, HALF_LIMITS["mean"]
        print("Mean gap to base + adapter in 16 bit, in nats per token, on cues of the embedded scenes:")
        print(*(f"{key:>22} {value:.4f}" for key, value in means.items()), sep="\n")
        if not means["merged model"] < limit:  # "not" catches a NaN too
            reason = f"differs from base + adapter by {means['merged model']:.2g} nats per token"
            raise UserError(f"The merged model {reason}, not by less than {limit}: OUT {out} is not written.")
        shutil.rmtree(out, ignore_errors=True)  # it is empty
        new.rename(out)
    except torch.OutOfMemoryError:
        raise UserError(f"The GPU is too small for {name} in 16 bit: give --cpu.") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a LoRA adapter")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write the merged model to")
    parser.add_argument("--base", "--model", help="folder or hub id of the base (default: the adapter's)")
    parser.add_argument("--cpu", action="store_true", help="compare on the CPU, if the GPU is too small")
    with exit_on_error("make room or check the path, then run it again", "Stopped: OUT is not written."):
        merge_and_compare(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
