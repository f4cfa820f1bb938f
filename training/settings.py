"""Every setting of a run: what it is, what the paper has, and where its value comes from."""

from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from files.errors import FlagParser, UserError, model_folder, require_file

MEMORY = ("rollout_batch", "micro_batch", "gradient_checkpointing")  # may change when a run is resumed
LOSSES = ("token_mean", "grpo", "dr_grpo")
SOURCES = ("object", "random", "large", "text")  # those of data.py, which takes seconds to import
FRAMES = ("resized", "relative1000")  # those of prompts.py


def setting(default: Any, note: str, choices: tuple = (), low: float = 0, high: float = 1e9) -> Any:
    """A field of Config that is also a flag; `note` says what it is and whether it is the paper's or ours."""
    return field(default=default, metadata={"note": note, "choices": choices, "range": (low, high)})


@dataclass
class Config:
    """Every setting of a run, and so every flag. None: the model family's row decides."""

    model: str = setting("tiny", "tiny, a model folder or a hub id; ours")
    data: str = setting("scenes", "scenes, coco or a folder of images; the paper: coco")
    annotations: Path | None = setting(None, "COCO instances JSON")
    images: Path | None = setting(None, "folder of the COCO images")
    exclude: Path | None = setting(None, "image ids to leave out, one a line (RefCOCO's); ours")
    expressions: Path | None = setting(None, "JSON of annotation id: expression, for text cues; ours")
    source: str = setting("object", "what a cue is; paper: object (Tables 5 to 7)", SOURCES)
    tiny_ratio: float = setting(0.7, "share of tiny cues, the rest is small; paper", high=1)
    out: Path | None = setting(None, "run folder; default a new one under runs/")
    preset: str = setting("", "paper: Table 8; qlora: one 24 GB card in a weekend", ("", "paper", "qlora"))
    steps: int = setting(300, "rollouts; paper: about 400 optimizer steps")
    prompts: int | None = setting(None, "prompts a rollout; paper: 512", low=1)
    num_generations: int = setting(8, "answers a prompt, G; paper", low=2)
    updates: int = setting(1, "optimizer steps a rollout, each on a share of the prompts; paper: 4", low=1)
    iterations: int = setting(1, "passes over a rollout; paper: 1", low=1)
    rollout_batch: int = setting(16, "prompts that are answered at a time; memory and speed; ours", low=1)
    micro_batch: int | None = setting(None, "prompts in one forward and backward pass; memory only", low=1)
    gradient_checkpointing: bool | None = setting(
        None, "keep text layers' inputs alone for the gradients; memory only"
    )
    image_pixels: int | None = setting(None, "most pixels of a full image as the model sees it; ours")
    crop_pixels: int | None = setting(None, "most pixels of a crop as the model sees it; ours")
    max_new_tokens: int | None = setting(None, "longest answer in tokens; ours", low=1)
    lr: float | None = setting(None, "learning rate; paper: 1e-6, for full fine-tuning")
    decay: str = setting("linear", "learning rate after warm-up; paper: constant", ("linear", "constant"))
    warmup: float = setting(0.05, "share of the optimizer steps that warm up; paper", high=1)
    weight_decay: float = setting(0.01, "AdamW's; paper")
    max_grad_norm: float = setting(1.0, "clipping of the gradient norm; paper")
    loss: str = setting("token_mean", "how tokens are averaged; paper: token_mean", LOSSES)
    beta: float = setting(0.04, "coefficient of the KL to the reference; paper: 0.01")
    clip_low: float = setting(0.2, "the ratio's lower clip; paper's framework")
    clip_high: float = setting(0.3, "the ratio's upper clip; paper's framework")
    dual_clip: float = setting(3.0, "the ratio's bound at negative advantages; paper's framework", low=1)
    alpha: float = setting(0.1, "weight of the format reward; paper", high=1)
    lora_rank: int = setting(16, "rank of the adapter; ours", low=1)
    box_frame: str | None = setting(None, "coordinates of the model's boxes", FRAMES)
    load_in_4bit: bool | None = setting(None, "NF4 weights; default where CUDA is; ours")
    seed: int = setting(0, "of cues, adapter and sampling; ours")
    kl_limit: float = setting(1.0, "mean KL of a step, nats a token, above which there is a warning; ours")
    save_every: int = setting(20, "steps between checkpoints; ours", low=1)
    eval_cues: int = setting(600, "held-out cues before and after; paper: 500", low=1)
    show_every: int = setting(30, "steps between completions on the screen, 0 for none; ours")


PRESETS = {
    "": {},
    "paper": dict(steps=100, prompts=512, updates=4, lr=1e-6, beta=0.01, decay="constant"),
    "qlora": dict(steps=400, prompts=16, lr=1e-5, beta=0.01, decay="constant"),
}


def resolve(flags: dict[str, Any], family: Any) -> tuple[Config, dict[str, str]]:
    """Settings and where each came from: flag, else preset, else the family's row, else default."""
    preset = PRESETS[flags.get("preset", "")]
    names = ("prompts", "lr", "max_new_tokens", "micro_batch", "gradient_checkpointing", "box_frame")
    row = {name: getattr(family, name) for name in names}
    row |= {"image_pixels": family.image_pixels[1], "crop_pixels": family.crop_pixels[1]}
    cfg = Config(**(row | preset | flags))
    origin = dict.fromkeys((f.name for f in fields(Config)), "default") | dict.fromkeys(row, "model family")
    origin |= dict.fromkeys(preset, f"preset {cfg.preset}") | dict.fromkeys(flags, "flag")
    for f in fields(Config):
        value, flag = getattr(cfg, f.name), f"--{f.name.replace('_', '-')}"
        low, high = f.metadata["range"]
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"{flag} {value} cannot be: give a number from {low} to {high}.")
    if cfg.prompts % cfg.updates:
        raise UserError(f"--updates {cfg.updates} does not divide --prompts {cfg.prompts}: give a divisor.")
    return cfg, origin


def read_flags(about: str, arguments: list[str] | None = None) -> dict[str, Any]:
    """The flags that were given, by the name of their field of Config; UserError where a file is missing.

    Our own argparse from the dataclass: HfArgumentParser takes over a second to import, knows no booleans of
    three states, and hides which flags were given.
    """
    parser = FlagParser(description=about)
    for f in fields(Config):
        note = f.metadata["note"] + ("" if f.default is None else f" (default {f.default})")
        ways: dict[str, Any] = {"help": note, "default": SUPPRESS}
        if "bool" in str(f.type):
            ways["action"] = BooleanOptionalAction
        else:
            ways["type"] = next(t for t in (int, float, Path, str) if t.__name__ in str(f.type))
            ways["choices"] = f.metadata["choices"] or None
        parser.add_argument(f"--{f.name.replace('_', '-')}", **ways)
    resume = "folder of a run that was stopped: goes on with it, by the same settings"
    parser.add_argument("--resume", type=Path, default=SUPPRESS, help=resume)
    dry = "the largest step twice, and its peak memory; without a GPU a prediction of it"
    parser.add_argument("--dry-run", action="store_true", default=SUPPRESS, help=dry)
    flags = vars(parser.parse_args(arguments))
    require_files(flags)
    return flags


def require_files(flags: dict[str, Any]) -> None:
    """UserError for the first file or folder among the flags that does not exist."""
    for name in ("images", "annotations", "exclude", "expressions", "resume"):
        require_file(f"--{name}", flags.get(name), folder=name in ("images", "resume"))
    model_folder(flags.get("model", "tiny"))
    data = flags.get("data", "scenes")
    if data not in ("scenes", "coco") and not Path(data).is_dir():
        raise UserError(f"--data {data} is neither scenes, coco nor a folder of images: no such folder.")


def print_settings(cfg: Config, family: Any, origin: dict[str, str]) -> None:
    """Every resolved value and where it came from."""
    for f in fields(Config):
        print(f"{f.name:>16} = {getattr(cfg, f.name)!s:<12} {origin[f.name]}")
    for name in ("template", "opening", "lora_targets", "skip_4bit"):
        print(f"{name:>16} = {getattr(family, name)!s:<12} model family")


def stored_flags(config: dict[str, Any]) -> dict[str, Any]:
    """The settings in a run's config.json as flags, by which it resolves to the same Config again."""
    arguments = []
    for f in fields(Config):
        flag, value = f.name.replace("_", "-"), config[f.name]
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments.append(f"--{flag}={value}")
    return read_flags("", arguments)
