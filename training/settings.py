"""Every setting of a run: its flag, its value in the paper, and where its value comes from."""

import importlib.util
import os
import re
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from files.errors import FlagParser, UserError, model_folder, require_file

PIXELS = ("image_pixels", "crop_pixels", "crop_min_pixels")  # areas that prompts of cues are made with
MEMORY = ("rollout_batch", "micro_batch", "gradient_checkpointing")  # may change when a run is resumed
LOSSES = ("token_mean", "grpo", "dr_grpo")
SOURCES = ("object", "random", "large", "text")  # those of data.py, which takes seconds to import
FRAMES = ("resized", "relative1000")  # those of prompts.py
TRACKERS = ("none", "tensorboard", "wandb")  # --report-to: each but none is the name of its package


def setting(default: Any, note: str, choices: tuple = (), low: float = 0, high: float = 10**9) -> Any:
    """A field of Config that is also a flag; `note` says what it is and whether it is the paper's or ours."""
    return field(default=default, metadata={"note": note, "choices": choices, "range": (low, high)})


@dataclass
class Config:
    """Every setting of a run; each is a flag. None: the model family's row of prompts.FAMILIES decides."""

    model: str = setting("tiny", "tiny, a model folder or a hub id; ours")
    data: str = setting("scenes", "scenes, coco or a folder of images; paper: coco")
    annotations: Path | None = setting(None, "COCO instances JSON")
    images: Path | None = setting(None, "folder of the COCO images")
    exclude: Path | None = setting(None, "file of image ids to leave out, one a line (RefCOCO's); ours")
    expressions: Path | None = setting(None, "JSON of annotation id: expression, for text cues; ours")
    source: str = setting("object", "what a cue shows (in a folder: random); paper: object", SOURCES)
    tiny_ratio: float = setting(0.7, "share of tiny cues, the rest is small; paper", high=1)
    out: Path | None = setting(None, "run folder; default: a new one under runs/")
    preset: str = setting("", "paper: Table 8; qlora: one 24 GB card, a weekend", ("", "paper", "qlora"))
    steps: int | None = setting(None, "rollouts, 0: evaluate alone; paper: about 400")
    prompts: int | None = setting(None, "prompts per rollout; paper: 512", low=1)
    num_generations: int = setting(8, "completions per prompt, G; paper", low=2)
    updates: int = setting(1, "optimizer steps per rollout, each on a share of its prompts; paper: 4", low=1)
    iterations: int = setting(1, "passes over a rollout; paper: 1", low=1)
    rollout_batch: int = setting(16, "prompts in one rollout pass; memory and speed; ours", low=1)
    micro_batch: int | None = setting(None, "prompts in one training pass; memory and speed", low=1)
    gradient_checkpointing: bool | None = setting(None, "recompute layers; less memory, slower")
    image_pixels: int | None = setting(None, "largest area of a full image, in pixels; ours", low=1)
    crop_pixels: int | None = setting(None, "largest area of a crop, in pixels; ours", low=1)
    crop_min_pixels: int | None = setting(None, "least area, to which crops are enlarged; paper: 512²", low=1)
    cue_prompt: Path | None = setting(None, "file of the request for a crop's box; default: in our words")
    max_new_tokens: int | None = setting(None, "longest completion, in tokens; ours", low=1)
    lr: float | None = setting(None, "learning rate, 0: no learning; paper: 1e-6, fully fine-tuned", high=100)
    decay: str = setting("linear", "learning rate after warm-up; paper: constant", ("linear", "constant"))
    warmup: float = setting(0.05, "share of the optimizer steps that warm up; paper", high=1)
    weight_decay: float = setting(0.01, "AdamW's weight decay; paper")
    max_grad_norm: float = setting(1.0, "gradient norm to clip at, above 0; paper", low=1e-9)
    loss: str = setting("token_mean", "how the loss averages tokens; paper: token_mean", LOSSES)
    beta: float | None = setting(None, "coefficient of the KL to the reference; paper: 0.01")
    clip_low: float = setting(0.2, "clip range of the ratio below 1; paper's framework")
    clip_high: float = setting(0.3, "clip range of the ratio above 1; paper's framework")
    importance_sampling_cap: float = setting(2.0, "cap of the ratio training / sampling, 0: off; ours")
    temperature: float = setting(1.0, "divides the logits; paper", low=0.01, high=100)
    dual_clip: float = setting(3.0, "bound of the loss at negative advantages; paper's framework", low=1)
    alpha: float = setting(0.1, "weight of the format reward; paper", high=1)
    lora_rank: int = setting(16, "rank of the adapter; ours", low=1)
    box_frame: str | None = setting(None, "coordinates of the model's boxes", FRAMES)
    load_in_4bit: bool | None = setting(None, "NF4 weights; default: on CUDA; ours")
    cpu: bool = setting(False, "run on the CPU, also a large model (very slow); ours")
    seed: int = setting(0, "of cues, adapter and sampling; ours")
    kl_limit: float = setting(1.0, "warn where a step's mean KL is higher, in nats per token; ours")
    save_every: int = setting(20, "steps between checkpoints; ours", low=1)
    eval_cues: int = setting(600, "held-out cues before and after; paper: 500", low=1)
    eval_every: int = setting(0, "steps between evaluations while training, 0: none; ours")
    show_every: int = setting(30, "steps between completions on the screen, 0: none; ours")
    log_entropy: bool = setting(False, "record the entropy of the policy, which costs a little time; ours")
    report_to: str = setting("none", "where metrics go besides metrics.jsonl; ours", TRACKERS)


PRESETS = {
    "": {},
    "paper": dict(steps=400, prompts=512, updates=4, lr=1e-6, beta=0.01, decay="constant"),
    "qlora": dict(steps=400, prompts=16, lr=1e-5, beta=0.01, decay="constant"),
}


def resolve(flags: dict[str, Any], family: Any) -> tuple[Config, dict[str, str]]:
    """The settings and their origins: a flag, else the preset, else the family's row, else the default.

    UserError for a value out of range.
    """
    preset = PRESETS[flags.get("preset", "")]
    row = {f.name: getattr(family, f.name) for f in fields(Config) if hasattr(family, f.name)}
    row |= {"image_pixels": family.image_pixels[1], "crop_pixels": family.crop_pixels[1]}
    row["crop_min_pixels"] = min(family.crop_pixels[0], flags.get("crop_pixels", family.crop_pixels[1]))
    cfg = Config(**(row | preset | flags))
    origin = dict.fromkeys((f.name for f in fields(Config)), "default") | dict.fromkeys(row, "model family")
    origin |= dict.fromkeys(preset, f"preset {cfg.preset}") | dict.fromkeys(flags, "flag")
    for f in fields(Config):
        value, (low, high) = getattr(cfg, f.name), f.metadata["range"]
        if isinstance(value, int | float) and not low <= value <= high:  # "not" catches a NaN too
            raise UserError(f"{flag_of(f.name)} {value} is out of range: give a number from {low} to {high}.")
    if cfg.prompts % cfg.updates:
        raise UserError(f"--updates {cfg.updates} does not divide --prompts {cfg.prompts}: give a divisor.")
    if cfg.crop_min_pixels > cfg.crop_pixels:
        raise UserError(f"Lower --crop-min-pixels {cfg.crop_min_pixels}: --crop-pixels is {cfg.crop_pixels}.")
    return cfg, origin


def fit_family(family: Any, flags: dict[str, Any]) -> Any:
    """The model's family with the areas of images and crops that the flags give; UserError as `resolve`."""
    cfg, _ = resolve(flags, family)
    image_range = min(family.image_pixels[0], cfg.image_pixels), cfg.image_pixels
    return replace(family, image_pixels=image_range, crop_pixels=(cfg.crop_min_pixels, cfg.crop_pixels))


# ---------------------------------------------------------------- settings as flags


def prepare_torch() -> None:
    """What must happen before torch is imported; UserError for a torchvision of another torch.

    With such a torchvision, importing any model of transformers fails with a message about BLOOM.
    """
    # Prompts differ in length at every step, so blocks of fixed size would leave gaps that nothing fits in.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception as error:  # what a library raises that does not fit differs from version to version
            text = f"torchvision does not fit torch ({str(error)[:99]!r}), and nothing here needs it: run"
            raise UserError(f"{text} python -m pip uninstall torchvision.") from None


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_flags(description: str, arguments: list[str] | None = None) -> dict[str, Any]:
    """The flags that were given, by the name of their field of Config; UserError where a file is missing.

    Our own argparse from the dataclass: HfArgumentParser takes over a second to import, knows no booleans of
    three states, and hides which flags were given.
    """
    parser = FlagParser(description=description, argument_default=SUPPRESS)
    for f in fields(Config):
        note = f.metadata["note"] + ("" if f.default in (None, "") else f" (default {f.default})")
        kind = next(t for t in (bool, int, float, Path, str) if t.__name__ in str(f.type))
        typed = {"type": kind, "choices": f.metadata["choices"] or None}
        options = {"action": BooleanOptionalAction} if kind is bool else typed
        parser.add_argument(flag_of(f.name), help=note, **options)
    parser.add_argument("--resume", type=Path, help="folder of a run that was stopped: continue it")
    parser.add_argument("--dry-run", action="store_true", help="predict peak memory, on a GPU measure it too")
    flags = vars(parser.parse_args(arguments))
    for name in ("images", "annotations", "exclude", "expressions", "cue_prompt", "resume"):
        require_file(flag_of(name), flags.get(name), folder=name in ("images", "resume"))
    model_folder(flags.get("model", "tiny"))
    read_cue_prompt(flags.get("cue_prompt"))
    if (tracker := flags.get("report_to", "none")) != "none" and not importlib.util.find_spec(tracker):
        raise UserError(f"--report-to {tracker} needs its package: run python -m pip install {tracker}.")
    if (data := flags.get("data", "scenes")) not in ("scenes", "coco") and not Path(data).is_dir():
        raise UserError(f"--data {data} does not exist: give scenes, coco or a folder of images.")
    return flags


def read_cue_prompt(path: str | Path | None) -> str:
    """The text of --cue-prompt, "" without it; UserError for an empty file or an unknown placeholder."""
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace").strip() if path else ""
    # The images come before the text, so a placeholder or special token for one would be read as words.
    unknown = set(re.findall(r"\{\w*\}|<image>|<\|\w+\|>|\ufffd", text)) - {"{units}", "{think}"}
    if unknown or (path and not text):
        problem = f"contains {min(unknown)}" if unknown else "is empty"
        raise UserError(f"--cue-prompt {path} {problem}: give UTF-8 text with {{units}} and {{think}} alone.")
    return text


def absolute_paths(flags: dict[str, Any]) -> dict[str, Any]:
    """The same flags with absolute paths, so that a run can be resumed from any working folder.

    tiny, scenes, coco and hub ids are no paths.
    """
    paths = ("data", "annotations", "images", "exclude", "expressions", "model", "cue_prompt")
    given = {name: flags[name] for name in paths if flags.get(name) not in (None, "tiny", "scenes", "coco")}
    return flags | {name: type(v)(Path(v).absolute()) for name, v in given.items() if Path(v).exists()}


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as the arguments of a command line, without those that are None.

    >>> as_arguments({"lr": 0.1, "images": None, "load_in_4bit": False})
    ['--lr=0.1', '--no-load-in-4bit']
    """
    arguments = []
    for name, value in settings.items():
        if isinstance(value, bool):
            arguments.append(flag_of(name if value else f"no_{name}"))
        elif value is not None:
            arguments.append(f"{flag_of(name)}={value}")
    return arguments


def stored_flags(config: dict[str, Any]) -> dict[str, Any]:
    """The settings in a run's config.json as flags, which resolve to the same Config again."""
    return read_flags("", as_arguments({f.name: config[f.name] for f in fields(Config)}))


def print_settings(cfg: Config, family: Any, origin: dict[str, str]) -> None:
    """Prints every resolved value and where it comes from."""
    for f in fields(Config):
        print(f"{f.name:>22} = {getattr(cfg, f.name)!s:<12} {origin[f.name]}")
    for name in ("template", "opening", "lora_targets", "skip_4bit"):
        print(f"{name:>22} = {getattr(family, name)!s:<12} model family")
