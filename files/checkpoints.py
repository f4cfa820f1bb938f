"""What a model or adapter folder holds, and whether it can be loaded: a wrong load is refused, never trained.

What differs from a plain from_pretrained:
- Where weights and model do not match, transformers prints a table and continues with random weights, and
  PEFT only warns. Here both are refused in one sentence.
- What takes seconds (settings, tokenizer, chat template, headers of the weight files) is checked before what
  takes minutes (the weights).
"""

import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
import transformers as hf
from huggingface_hub import auth_check, constants, errors
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file, find_adapter_config_file

from files.errors import UserError, model_folder

# PEFT asks transformers for gradient checkpointing by a name that transformers 5 renames.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
# Both report weights that do not fit, and continue. Here they are refused.
warnings.filterwarnings("ignore", "Found missing adapter keys")
hf.logging.get_logger("transformers.modeling_utils").addFilter(lambda log: log.levelname != "WARNING")

INDEX = "model.safetensors.index.json"
SMALL_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", INDEX)
SMALL_FILES += ("tokenizer_config.json", "chat_template.json", "chat_template.jinja", "processor_config.json")
LARGE = 2 * 10**9  # bytes of weights; the smallest of the published models has more, even in 4 bit
QUANTISED_NAME = re.compile(r"[-_](awq|gptq|fp8|nvfp4|int[48]|w\d+a\d+|bnb|[48]bit)[^/\\]*$", re.IGNORECASE)


# ---------------------------------------------------------------- one sentence for each refusal


def refusal(name: str | Path, reason: str, flag: str = "--model") -> UserError:
    """The sentence about a folder or hub id; reason: what is wrong with it, and what to do."""
    return UserError(f"{flag} {name} cannot be loaded: {reason}.")


@contextmanager
def one_sentence(name: str | Path, remedy: str, flag: str = "--model") -> Iterator[None]:
    """Turns what transformers or PEFT raises about the files of a model or adapter into a refusal."""
    try:
        yield
    except Exception as error:  # tokenizers and Jinja raise nothing more special
        # Memory that runs out has a sentence of its own (training/memory.py), also while quantising.
        if isinstance(error, UserError) or re.search("memory|automatic conversion", str(error)):
            raise
        text = (str(error) or repr(error)).splitlines()[0].split(". ")[0][:120].rstrip(".: ")
        if "couldn't connect" in text:
            text, remedy = "the hub cannot be reached", "connect once to download it, or give a model folder"
        raise refusal(name, f"{text}; {remedy}", flag) from None


def check_files(folder: Path, names: Iterable[str], flag: str = "--model") -> None:
    """UserError unless these files of a folder are there, whole, and no git-lfs pointers."""
    for path in (folder / name for name in names):
        try:
            with path.open("rb") as file:
                # The text that git leaves in place of a large file.
                if file.read(23) == b"version https://git-lfs":
                    raise ValueError("it is a git-lfs pointer: run git lfs pull")
            if path.suffix == ".json" and not isinstance(json.loads(path.read_bytes()), dict):
                raise ValueError("it is no JSON object")
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as weights:  # compares the size of the file with its header
                    dtypes = {weights.get_slice(key).get_dtype() for key in weights.offset_keys()}
                if {"F8_E4M3", "F8_E5M2"} & dtypes:  # they would be read without their scales
                    raise ValueError("it holds FP8 weights: give the model in 16 bits")
        except (OSError, ValueError, SafetensorError) as error:
            text = f"{path.name} cannot be read ({getattr(error, 'strerror', None) or str(error)[:90]})"
            remedy = "give an adapter, as runs/NAME/adapter" if flag == "--adapter" else "download it again"
            remedy += ", or save it as safetensors" * (path.suffix == ".safetensors")
            raise refusal(folder, f"{text}; {remedy}", flag) from None


# ---------------------------------------------------------------- before the weights are loaded


def check_device(name: str, device: torch.device, dtype: torch.dtype, cpu: bool | None) -> None:
    """Prints device and dtype, before minutes of loading; UserError for a large model on a CPU without --cpu.

    A hub id counts as large. A folder does by the size of its weights: a small model of one's own, such as
    one of tiny/build.py, is quick on a CPU and needs no flag.
    """
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, dtype: {dtype}")
    folder = Path(model_folder(name))
    is_large = not folder.is_dir() or sum(f.stat().st_size for f in folder.glob("*.safetensors")) > LARGE
    if device.type == "cpu" and is_large and not cpu:
        raise refusal(name, "PyTorch finds no GPU with CUDA, and a CPU is very slow; give --cpu to use it")


def ask_hub(name: str) -> None:
    """UserError if a hub id is gated or unknown. Without a network, the cache alone is read from here on."""
    try:
        auth_check(name)
    except errors.RepositoryNotFoundError:
        remedy = f"check the id and its terms on https://huggingface.co/{name}, then run hf auth login"
        raise refusal(name, f"the hub has no such model, or it is gated or private; {remedy}") from None
    except Exception:  # of whichever HTTP library the hub uses; else each file is tried for half a minute
        constants.HF_HUB_OFFLINE = True


def read_config(name: str) -> Any:
    """The config of a model folder or hub id; UserError if it is of no model that reads images."""
    folder = Path(model_folder(name))
    with one_sentence(name, "give a folder or hub id of a Qwen2.5-VL, Qwen3-VL or MiMo-VL model"):
        if not folder.is_dir():
            ask_hub(name)
        if path := find_adapter_config_file(model_folder(name)):
            base = json.loads(Path(path).read_bytes()).get("base_model_name_or_path")
            raise refusal(name, f"it is an adapter; give its base, {base}, and this to eval.py --adapter")
        check_files(folder, [file_name for file_name in SMALL_FILES if (folder / file_name).is_file()])
        config = hf.AutoConfig.from_pretrained(model_folder(name), trust_remote_code=False)
    if not hasattr(config, "vision_config"):
        remedy = "give a vision-language model such as Qwen/Qwen2.5-VL-3B-Instruct"
        raise refusal(name, f"{config.model_type} is text-only: it has no vision tower; {remedy}")
    return config


def read_processors(name: str, config: Any) -> tuple[Any, Any, str]:
    """Tokenizer, image processor, and what the chat template itself writes of a completion.

    That is "<think>" and a line break, or nothing. UserError if they do not fit the model, or write no image
    prompt.
    """
    folder, no_code = model_folder(name), dict(trust_remote_code=False)
    remedy = "copy tokenizer, chat template and preprocessor_config.json of the model it was trained from"
    with one_sentence(name, remedy):
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, **no_code)
        if not tokenizer.chat_template:  # where processors keep it, and AutoTokenizer does not look
            path = cached_file(folder, "chat_template.json", _raise_exceptions_for_missing_entries=False)
            tokenizer.chat_template = json.loads(Path(path).read_bytes())["chat_template"] if path else ""
        image_token, _ = tokenizer.convert_ids_to_tokens([config.image_token_id, config.video_token_id])
        highest_id, rows = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
        if highest_id >= rows:
            raise ValueError(f"the tokenizer has ids up to {highest_id}, but the embeddings have {rows} rows")
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if prompt.count(str(image_token)) != 1 or "Where?" not in prompt:
            raise ValueError(f"no {'chat template' if image_token else 'tokenizer'} for prompts with images")
        image_processor = hf.AutoImageProcessor.from_pretrained(folder, **no_code)
        if getattr(image_processor, "patch_size", None) != config.vision_config.patch_size:
            raise ValueError("the image processor does not cut images into the patches of the model")
    return tokenizer, image_processor, re.search(r"(<think>\s*)?\Z", prompt)[0]


def weight_file_names(folder: Path) -> list[str]:
    """The files of a model folder that hold its weights: one, or those that its index names."""
    if (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        return sorted(set(json.loads((folder / INDEX).read_bytes()).get("weight_map", {}).values()))
    return ["model.safetensors"]


def check_weight_files(name: str, config: Any, load_in_4bit: bool | None) -> bool:
    """Whether the weights are 4-bit already; UserError if they are damaged, or quantised in another form.

    load_in_4bit: as the flag has it, None without one.
    """
    parts = (config, config.get_text_config())
    quantised = next((found for part in parts if (found := getattr(part, "quantization_config", None))), {})
    is_4bit = bool(quantised.get("load_in_4bit"))  # bitsandbytes' own form
    if quantised and (not is_4bit or load_in_4bit is False):
        unquantised = QUANTISED_NAME.sub("", name)
        remedy = "leave --no-load-in-4bit out, or " * is_4bit + "give the unquantised model"
        remedy += f" {unquantised}" * (unquantised != name)
        raise refusal(name, f"its weights are quantised ({quantised.get('quant_method')}); {remedy}")
    if (folder := Path(model_folder(name))).is_dir():
        check_files(folder, weight_file_names(folder))
    return is_4bit


# ---------------------------------------------------------------- after the weights are loaded


def check_loaded_weights(name: str, loading_info: dict[str, Any]) -> None:
    """UserError if weights were missing, unexpected or of another size: part of the model would be random.

    loading_info: from from_pretrained(output_loading_info=True), which takes tied weights into account.
    """
    remedy = "save the whole model, unquantised, merged and without a wrapper, or download it again"
    for kind in ("unexpected_keys", "missing_keys", "mismatched_keys"):
        # Old checkpoints hold inv_freq, which the model computes itself.
        if keys := sorted(str(key) for key in loading_info[kind] if not str(key).endswith(".inv_freq")):
            found = f"{kind.replace('_', ' ')} in its weights: {keys[0][:110]}, one of {len(keys)}"
            raise refusal(name, f"{found}; {remedy}")


# ---------------------------------------------------------------- adapters


def base_name(name: str) -> str:
    """What stays of a model's name where its folder moves: the name of the folder, or of the cached hub id.

    >>> base_name("/hub/models--Qwen--Qwen3-VL-2B/snapshots/89af"), base_name("Qwen/Qwen3-VL-2B")
    ('Qwen3-VL-2B', 'Qwen3-VL-2B')
    """
    # A cached hub id is models--Qwen--NAME/snapshots/HASH; PureWindowsPath splits at / and at \.
    return PureWindowsPath(re.split(r"[/\\]snapshots[/\\]", name)[0].replace("--", "/")).name


def check_adapter_files(folder: Path, model_name: str) -> None:
    """UserError if a folder holds no LoRA adapter; a warning on stderr if it was trained on another base."""
    check_files(folder, ("adapter_config.json", "adapter_model.safetensors"), "--adapter")
    config = json.loads((folder / "adapter_config.json").read_bytes())
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    if kind != "LORA":
        raise refusal(folder, f"it is of the kind {kind}; give a LoRA adapter", "--adapter")
    if base and model_name and base_name(base) != base_name(model_name):
        text = f"--adapter {folder} was trained on {base}, not on {model_name}: its results mean little here."
        print(text, file=sys.stderr)
