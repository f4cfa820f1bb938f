"""The model card of an adapter: README.md in its folder, which the hub shows. Its text is model_card.md."""

import json
from dataclasses import fields
from pathlib import Path, PurePath
from string import Template

from files.disk import sync
from policy import Policy
from prompts import prompt_text
from training.settings import MEMORY, Config, flag_of

QUESTION = "Where is the red star?"  # in the card's code, where readers put in their own
NOT_LISTED = ("model", "data", "out", *MEMORY)  # settings that the text names, or that change no result


def write_model_card(folder: Path, policy: Policy, table: str) -> None:
    """Writes README.md and before_after.png into the adapter of a run folder; table: of the scores.

    It replaces the README.md of PEFT's save_pretrained. There is no date in it and no path: a resumed run
    writes the same bytes, and readers on the hub learn nothing about the folders of a computer.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shown = {name: PurePath(v).name if isinstance(v, str) else v for name, v in config.items()}
    changed = [f.name for f in fields(Config) if config[f.name] != f.default and f.name not in NOT_LISTED]
    rows = [f"| `{flag_of(name)}` | {shown[name]} | {config['origin'][name]} |" for name in changed]
    is_local = config["model"] == "tiny" or Path(config["model"]).is_dir()
    base = "tiny/model" if config["model"] == "tiny" else shown["model"] if is_local else config["model"]
    # The hub refuses a card whose base model or data set is none of its ids.
    head = "" if is_local else f"\nbase_model: {base}"
    head += "\ndatasets:\n- coco" if config["data"] == "coco" else ""
    is_4bit = getattr(policy.base_model, "is_loaded_in_4bit", False)
    precision = "4 bit (NF4)" if is_4bit else str(policy.base_model.dtype).removeprefix("torch.")
    prompt = prompt_text(policy.processor.family, "string", question=QUESTION)
    shown |= {"base": base, "head": head, "precision": precision, "prompt": repr(prompt), "table": table}
    text = Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    card, picture = folder / "adapter" / "README.md", folder / "before_after.png"
    card.with_name(picture.name).write_bytes(picture.read_bytes())
    card.write_text(text.substitute(shown, settings="\n".join(rows)), encoding="utf-8", newline="\n")
    sync(card)
