"""Models of the published families without their weights: their settings, in full size or in miniature.

The folders of tests/families/ hold config.json, generation_config.json and preprocessor_config.json with the
values that the hub has. The chat templates are our own; for a turn of images and text they write what the
published ones write. The tokenizer is the embedded model's: only its special tokens matter here.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tiny import architecture

FOLDER = Path(__file__).parent / "families"
PARAMETERS = {  # of the published weights
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen3-VL-4B-Thinking": 4_437_815_808,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "MiMo-VL-7B-RL": 8_306_217_216,
}
IDS = {  # published token id: token
    151643: "<|endoftext|>",
    151645: "<|im_end|>",
    151652: "<|vision_start|>",
    151653: "<|vision_end|>",
    151655: "<|image_pad|>",
    151656: "<|video_pad|>",
}
SYSTEM = {  # start of a model's name: its system prompt
    "Qwen2.5": "You are a helpful assistant.",
    "MiMo-VL": "You are MiMo, an AI assistant developed by Xiaomi.",
}


def chat_template(name: str) -> str:
    """What a model's published template writes around a turn and at the start of a completion."""
    prompt = next((text for prefix, text in SYSTEM.items() if name.startswith(prefix)), None)
    system = f"<|im_start|>system\n{prompt}<|im_end|>\n" if prompt else ""
    think = "<think>\n" if name.endswith("Thinking") else ""
    return system + architecture.CHAT_TEMPLATE.replace("assistant\n", f"assistant\n{think}")


def merged(base: dict, overrides: dict) -> dict:
    """`base` with the values of `overrides`, in nested dicts too."""
    parts = ((k, v, isinstance(base.get(k), dict)) for k, v in overrides.items())
    return base | {k: merged(base[k], v) if nested else v for k, v, nested in parts}


def small(config: dict) -> dict:
    """A config with the same keys and miniature sizes."""
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, initializer_range=0.1, vocab_size=512)
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
    if config["model_type"] == "qwen3_vl":
        text |= dict(head_dim=16, rope_scaling=dict(mrope_section=[3, 3, 2]))
        vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=64)
        return merged(config, dict(text_config=text, vision_config=vision))
    text["rope_scaling"] = dict(mrope_section=[2, 3, 3])
    return merged(config, text | dict(vision_config=vision | dict(fullatt_block_indexes=[1], window_size=56)))


def settings(name: str, folder: Path, miniature: bool = False, **overrides: Any) -> Path:
    """A model folder as on the hub, but without weights and with the token ids of our tokenizer.

    overrides: values of config.json to replace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = architecture.build_tokenizer()
    new_ids = {number: tokenizer.convert_tokens_to_ids(token) for number, token in IDS.items()}

    def replace_ids(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace_ids(v) for key, v in value.items()}
        if isinstance(value, list):
            return [replace_ids(v) for v in value]
        return new_ids.get(value, value) if isinstance(value, int) else value

    for path in (FOLDER / name).glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "config.json":
            content = merged(small(content) if miniature else content, overrides)
        (folder / path.name).write_text(json.dumps(replace_ids(content), indent=2), encoding="utf-8")
    tokenizer.chat_template = chat_template(name)
    tokenizer.save_pretrained(folder)
    return folder


def random_weights(folder: Path, std: float = 0.02, shard: int = 4 * 10**9) -> Path:
    """Adds random bf16 weights to a model folder, in safetensors of about `shard` bytes, as on the hub."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    device = (
        "cuda" if torch.cuda.is_available() else "cpu"
    )  # billions of random numbers take minutes on a CPU
    torch.manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map = {}
    for name, weight in model.named_parameters():
        if sum(value.nbytes for value in shards[-1].values()) > shard:
            save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors", metadata={"format": "pt"})
            shards += [{}]
            shards[-2].clear()  # only one shard is in memory at a time
        if weight.dim() == 1:  # 1 for a norm's weight, 0 for a bias
            value = torch.full(weight.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
        else:
            value = torch.randn(weight.shape, device=device, dtype=torch.bfloat16).mul_(std).cpu()
        shards[-1][name], weight_map[name] = value, f"model-{len(shards):05}.safetensors"
    save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors", metadata={"format": "pt"})
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
