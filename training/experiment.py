"""An experiment around the training loop: load, check, evaluate the base model, train, evaluate again.

What it hands over: the model card of its adapter, and report.html, one page with settings, curve, scores,
images and groups of completions. The texts of both are in this folder, model_card.md and report.html, with a
name after a dollar sign for each field.
"""

import base64
import io
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from html import escape
from pathlib import Path, PurePath
from string import Template
from typing import Any

from data import CueConfig, Cues, open_cues
from evaluation import heldout
from evaluation.reply_cache import ReplyCache
from evaluation.scores import summarize, table
from files.checkpoints import check_device
from files.coco import UNREADABLE
from files.disk import read_json, read_lines, sync, write_json
from files.errors import UserError, exit_on_error
from models import add_lora, device_and_dtype, enable_gradient_checkpointing, load_policy
from policy import Policy
from prompts import prompt_text
from training import checks, learning, pictures, run_folder, settings
from training.memory import phase
from training.settings import MEMORY, Config, absolute_paths, as_arguments, print_settings, resolve

QUESTION = "Where is the red star?"  # an example, where readers put in their own
NOT_LISTED = ("model", "data", "out", *MEMORY)  # settings that the text names, or that change no result
# Field of report.html: the files that it shows.
IMAGES = {"curve": "curve.png", "learning": "learning.gif", "cues": "before_after.png"}
IMAGES["attention"] = "*/attention.png"


@phase("loading")
def prepare(flags: dict, dtype: Any = None) -> tuple[Policy, Config, dict]:
    """The policy that the flags name, with an adapter; every setting, and where it comes from.

    dtype: as for `load_policy`.
    """
    model, cpu = flags.get("model", "tiny"), flags.get("cpu", False)
    check_device(model, *device_and_dtype(cpu), cpu)
    policy = load_policy(model, flags.get("load_in_4bit"), flags.get("box_frame"), dtype, cpu)
    cfg, origin = resolve(flags, policy.processor.family)
    family = settings.fit_family(policy.processor.family, flags)
    policy.processor.family = replace(family, cue_text=settings.read_cue_prompt(cfg.cue_prompt))
    if cfg.gradient_checkpointing:
        enable_gradient_checkpointing(policy)
    policy.temperature = cfg.temperature
    return add_lora(policy, cfg.lora_rank, cfg.seed), cfg, origin


def open_run_cues(cfg: Config) -> tuple[Cues, Cues, dict[str, dict[str, str]]]:
    """The cues that a run trains on, those that it is measured on, and the run's `run_folder.input_files`."""
    files = {name: getattr(cfg, name) for name in ("annotations", "images", "exclude", "expressions")}
    cues = open_cues(cfg.data, "train", cfg.seed, CueConfig(cfg.source, cfg.tiny_ratio), **files)
    # Every run measures on the same held-out cues, whatever its seed and its source of cues.
    heldout_cues = open_cues(cfg.data, "heldout", 0, CueConfig(), **files)
    return cues, heldout_cues, run_folder.input_files(*files.values(), cfg.cue_prompt, Path(cfg.data))


def open_experiment(flags: dict[str, Any], task: str) -> tuple[Policy, Cues, Cues, Config, Path, dict]:
    """Loads the model, opens the cues and the folder of a new or resumed run, and prints its settings.

    Returns the policy, the cues to train on, held-out cues, every setting, the folder, and the state that the
    checkpoints of the run hold too: its settings and inputs. UserError if a resumed run has others now.
    """
    folder, stored, flags = flags.pop("resume", None), None, absolute_paths(flags)
    if folder is not None:
        stored, flags = run_folder.resume_flags(folder, flags)
    policy, cfg, origin = prepare(flags)
    cues, heldout_cues, files = open_run_cues(cfg)
    folder = folder or run_folder.new_folder(cfg.out)
    inputs = {"task": task, "cue_text": policy.processor.family.cue_text}
    inputs |= run_folder.fingerprints(policy.base_model, files)
    origin = run_folder.write_config(folder, stored, cfg, origin, inputs, files)
    print_settings(cfg, policy.processor.family, origin)
    for part in (part for part in cues.left_out if part.reasons):
        print(part)
    state = inputs | {name: str(v) for name, v in asdict(cfg).items() if name not in ("out", *MEMORY)}
    return policy, cues, heldout_cues, cfg, folder, state


def run_experiment(flags: dict[str, Any], task: str, train: Callable, encode: Callable) -> None:
    """Checks the policy, evaluates it, trains it and evaluates it again; all results are in the run folder.

    After Ctrl-C it prints how to resume, and exits with 130. UserError if another process is in the folder.
    train: (policy, cues, cfg, folder, state, evaluate=) -> None, which calls evaluate(step) after each step;
    encode: (processor, cue, index, cfg) -> EncodedPrompt.
    """
    started = time.monotonic()
    policy, cues, heldout_cues, cfg, folder, state = open_experiment(flags, task)
    command = f"{run_folder.command_of(task)} --resume {shlex.quote(str(folder))}"
    remedy, stopped = f"make room or allow it, then run: {command}", f"Stopped. Resume with: {command}"
    with exit_on_error(remedy, stopped), run_folder.lock_run_folder(folder):
        if (folder / "results.json").exists():
            print(f"{folder} is complete: it holds results.json.")
            return
        num_prompts = min(4, cfg.prompts, max(2, cfg.micro_batch))
        prompts = [encode(policy.processor, cues[i], i, cfg) for i in range(num_prompts)]
        with phase("rollout"):
            gaps = checks.self_check(policy, prompts, cfg.num_generations, cfg.max_new_tokens, cfg.seed)
        print("self-check passed: " + ", ".join(f"{name} {value:.2g}" for name, value in gaps.items()))
        # Measure the base model.
        cache, longest = ReplyCache(folder / "answers.jsonl", state), cfg.max_new_tokens
        held = heldout.build_heldout_set(policy, heldout_cues, cfg.eval_cues)
        before = heldout.evaluate(policy, held, longest, "before", cache)
        checks.check_frame(policy, held, before)
        baselines = heldout.baselines(policy, held, longest, cache)
        # Train, and measure again.
        evaluate = learning.evaluator(policy, heldout_cues, cfg, folder, before.boxes)
        train(policy, cues, cfg, folder, state, evaluate=evaluate)
        run_folder.save_adapter(policy.model, folder / "adapter")
        after = heldout.evaluate(policy, held, longest, "after", cache)
        pictures.draw_cues(held.cues, before.boxes, after.boxes, folder / "before_after.png")
        learning.draw_run(folder, heldout_cues)
        # Write it down: results.json last, because a folder that holds it is complete.
        write_model_card(folder, policy, table(before, after))
        training = sum(metrics["seconds"] for metrics in read_lines(folder / "metrics.jsonl"))
        seconds = {"training": round(training, 1), "all": round(time.monotonic() - started, 1)}
        results = summarize(before, after) | {"baselines": baselines, "self_check": gaps, "seed": cfg.seed}
        left_out = {part.what: dict(part.reasons) for part in cues.left_out + heldout_cues.left_out}
        results |= {"settings": asdict(cfg), "seconds": seconds, "left_out": left_out}
        write_json(folder / "results.json", results)
        print(table(before, after))
        print("baselines: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in baselines.items()))
        print(f"{seconds['all']:.0f} seconds; adapter, results.json and images are in {folder}. Next:")
        print(*eval_commands(folder), shlex.join(["python", "eval.py", "report", str(folder)]), sep="\n")


# ---------------------------------------------------------------- the model card, and what to run next


def write_model_card(folder: Path, policy: Policy, scores: str) -> None:
    """Writes README.md, the model card, and before_after.png into the adapter of a run; scores: their table.

    The hub shows the card. It replaces the README.md of PEFT's save_pretrained. There is no date in it and no
    path: a resumed run writes the same bytes, and readers on the hub learn nothing about the folders of a
    computer.
    """
    config = read_json(folder / "config.json")
    shown = {name: PurePath(v).name if isinstance(v, str) else v for name, v in config.items()}
    changed = [f.name for f in fields(Config) if config[f.name] != f.default and f.name not in NOT_LISTED]
    rows = [f"| `{settings.flag_of(name)}` | {shown[name]} | {config['origin'][name]} |" for name in changed]
    is_local = config["model"] == "tiny" or Path(config["model"]).is_dir()
    base = "tiny/model" if config["model"] == "tiny" else shown["model"] if is_local else config["model"]
    # The hub refuses a card whose base model or data set is none of its ids.
    head = "" if is_local else f"\nbase_model: {base}"
    head += "\ndatasets:\n- coco" if config["data"] == "coco" else ""
    is_4bit = getattr(policy.base_model, "is_loaded_in_4bit", False)
    precision = "4 bit (NF4)" if is_4bit else str(policy.base_model.dtype).removeprefix("torch.")
    prompt = prompt_text(policy.processor.family, "string", question=QUESTION)
    shown |= {"base": base, "head": head, "precision": precision, "prompt": repr(prompt), "table": scores}
    text = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    card, picture = folder / "adapter" / "README.md", folder / "before_after.png"
    card.with_name(picture.name).write_bytes(picture.read_bytes())
    card.write_text(text.substitute(shown, settings="\n".join(rows)), encoding="utf-8", newline="\n")
    sync(card)


def eval_commands(folder: Path) -> list[str]:
    """Commands to run next, on the adapter of a complete run and with the flags that the run was given."""
    config = read_json(folder / "config.json")
    names = ("model", "load_in_4bit", "cpu", "box_frame", "data", "annotations", "images", "exclude")
    names += ("cue_prompt", "max_new_tokens", *settings.PIXELS)
    given = {name: config[name] for name in names if config["origin"][name] == "flag"}
    flags = as_arguments({"adapter": folder / "adapter"} | given)
    tasks = [["scenes" if config["data"] == "scenes" else "cues"]]
    if config["model"] == "tiny":
        tasks.append(["ask", "docs/scene.png", QUESTION])
    return [shlex.join(["python", "eval.py", *task, *flags]) for task in tasks]


# ---------------------------------------------------------------- report.html

# The page loads nothing: its images are inside it. All text is escaped, because a model may write anything.


def embed(content: bytes, kind: str, title: str) -> str:
    return f'<img alt="{title}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def missing(name: str) -> str:
    return f"<p>There is no {name} in the run folder: see docs/fault_tolerance.md for what writes it.</p>"


def settings_table(config: dict) -> str:
    """Every setting with its value and where it comes from: first those that flags or a preset have set."""
    origin = config["origin"]
    names = sorted(origin, key=lambda name: origin[name] in ("default", "model family"))
    rows = [(settings.flag_of(name), config[name], origin[name]) for name in names]
    rows += [(name, version, "version") for name, version in config["versions"].items()]
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def scores_table(folder: Path) -> str:
    """The table of scores, in points of 100, as the run has printed it and as the model card has it."""
    card = folder / "adapter" / "README.md"
    found = card.exists() and re.search(r"^held-out .*?(?=^```)", card.read_text("utf-8"), re.M | re.S)
    return f"<pre>{escape(found[0])}</pre>" if found else missing("adapter/README.md")


def group_section(line: dict, cues: Cues | None) -> str:
    """A group of completions.jsonl, the best completion first, with its image if there are cues."""
    ranked, image, items = sorted(line["completions"], key=lambda row: -row["advantage"]), "", []
    if cues is not None:
        boxes, file = [(pictures.line_name(row["advantage"]), row["box"]) for row in ranked], io.BytesIO()
        drawing = pictures.draw_numbered_boxes(cues[line["cue"]], boxes, 480)
        drawing.save(file, "JPEG", quality=88, subsampling=0)
        image = embed(file.getvalue(), "jpeg", "the image with the box of each completion")
    for row in ranked:
        values = "advantage {advantage:+.2f}, reward {total:.2f} (IoU {iou:.2f}, format {format:.0f})"
        style = "better" if row["advantage"] > 0 else ""
        items.append(f'<li class="{style}">{values.format(**row)}<pre>{escape(row["text"])}</pre></li>')
    texts = f"<h3>Step {line['step']}</h3><ol>{''.join(items)}</ol>"
    return f'<section id="step-{line["step"]}">{image}<article>{texts}</article></section>'


def page(folder: Path) -> str:
    """The page of a run folder; draws its curve.png and learning.gif again.

    Where the data of the run is missing or has changed, the page has no image of a cue.
    """
    config, problem = read_json(folder / "config.json"), ""
    try:
        cues, heldout_cues, files = open_run_cues(Config(**settings.stored_flags(config)))
        if change := run_folder.first_change((folder / "inputs.json").read_text(encoding="utf-8"), files):
            raise UserError(f"The data is not that of the run{change}: put it back.")
    except UserError as error:
        cues, heldout_cues = None, None
        problem = f"<p>Images are left out. {escape(str(error))}</p>"
    learning.draw_run(folder, heldout_cues)
    parts = {"name": escape(folder.resolve().name), "settings": settings_table(config)}
    steps = len(read_lines(folder / "metrics.jsonl"))
    summary = f"{steps} of {config['steps']} steps of {config['task']}: {config['model']} on {config['data']}"
    parts |= {"summary": escape(summary), "scores": scores_table(folder)}
    for name, pattern in IMAGES.items():
        found = [embed(path.read_bytes(), path.suffix[1:], name) for path in sorted(folder.glob(pattern))]
        parts[name] = "".join(found) or missing(pattern)
    groups = [group_section(line, cues) for line in read_lines(folder / "completions.jsonl")]
    parts["groups"] = problem + ("".join(groups) or missing("completions.jsonl"))
    return Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(parts)


def write_report(folder: Path) -> None:
    """Writes report.html into a run folder; UserError for a damaged file in it."""
    try:
        (folder / "report.html").write_text(page(folder), encoding="utf-8")
    except UNREADABLE as error:
        reason = f"{folder} holds a file that no run writes ({error!r:.99})"
        raise UserError(f"{reason}: give the folder of another run.") from None
    print(f"The report is {folder / 'report.html'}")
