"""The model card of an embedded model: how it was built, and its visual context rot on held-out scenes.

    python -m tiny.card [--model FOLDER] [--n 900]     writes card.json and the tables in README.md

The same questions are asked about few objects and about many, about tiny and large ones, and once more with
everything but the object black (context suppression). A salient object is one that is not tiny: in its build,
the text model was asked about no other.
"""

import json
import re
from pathlib import Path
from typing import Any

from data import CueConfig, scene_cues
from evaluation.heldout import baselines, build_heldout_set, evaluate
from evaluation.scores import markdown_table, mean
from files.disk import sha256, write_json
from files.errors import FlagParser, UserError, exit_on_error, model_folder, one_or_more
from models import load_policy
from tiny.build import STAGES
from tiny.scenes import KINDS, SIDES

FEW, CROWDS = "1–4 objects", "8–12 objects"
CARD_SCENES = {FEW: (1, 4), "5–7 objects": (5, 7), CROWDS: (8, 12)}  # fewest and most objects of a scene
HEADER = ["scenes", *(title for kind in KINDS for title in (kind, "rest black")), "find, IoU", "cue, IoU"]
MEASURED = re.compile("(?<=<!-- measured -->).*(?=<!-- /measured -->)", re.DOTALL)  # the part to replace


def card_rows(name: str, scores: dict[str, Any]) -> list[list[str]]:
    """The rows of an entry of CARD_SCENES, in points of 100: all its objects, then those of each size."""
    rows, tasks = [], [scores[task]["by_kind"] for task in ("questions", "suppressed")]
    for title, ending in ((name, ""), *((f"  {size}", f"_{size}") for size in SIDES)):
        shares = [task[kind + ending]["accuracy"] for kind in KINDS for task in tasks]
        # To find an object, by its name or by its crop, is measured for all sizes together.
        shares += [] if ending else [scores["find"]["mean_iou"], scores["cue"]["mean_iou"]]
        rows.append([title, *points(shares), *["–", "–"] * bool(ending)])
    return rows


def points(shares: list[float]) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]


def card_text(card: dict[str, Any]) -> str:
    """What README.md has between its marks, from nothing but the content of card.json."""
    build, scores = card["build"], card["scores"]
    lines = [f"- {name}: {json.dumps(value)}" for name, value in build.items() if name != "accuracy"]
    accuracy = build.get("accuracy", {})
    lines += [f"- accuracy after {name}: {json.dumps(accuracy[name])}" for name in STAGES if name in accuracy]
    tables = [markdown_table(HEADER, [row for name in scores for row in card_rows(name, scores[name])])]
    # By the number of image tokens that the object touches.
    crowds = [scores[CROWDS][task]["by_tokens"] for task in ("questions", "suppressed")]
    rows = [[title, *points(part.values())] for title, part in zip(("questions", "rest black"), crowds)]
    tables.append(markdown_table(["image tokens touched", *crowds[0]], rows))
    few = scores[FEW]["questions"]["by_kind"]
    shares = [mean(few[f"{kind}_{size}"]["accuracy"] for size in ("small", "large")) for kind in KINDS]
    salient = ", ".join(f"{kind} {value}" for kind, value in zip(KINDS, points(shares)))
    named = f"{100 * scores[FEW]['crop_named_right']:.1f}"
    notes = f"Salient objects in scenes of 1 to 4: {salient}. Crops of all sizes named right: {named}."
    notes += f" {scores[FEW]['cue']['n']:,} cues a row, and a third as many questions of each kind and size."
    return "\n\n".join(["", "\n".join(lines), *tables, notes, ""])


def write_card(model: str, n: int) -> None:
    """Measures a model in the embedded world, and writes card.json and the tables into its folder.

    On each entry of CARD_SCENES: n cues, and n / 3 questions of each kind and size; keys as in results.json.
    UserError if its weights are not those that its config.json tells about.
    """
    readme = Path(model_folder(model)) / "README.md"
    if not (readme.is_file() and MEASURED.search(text := readme.read_text(encoding="utf-8"))):
        raise UserError(f"{readme} has no place for the tables: add <!-- measured --><!-- /measured -->.")
    policy, weights = load_policy(model), readme.with_name("model.safetensors")
    build = getattr(policy.base_model.config, "locus_build", {})
    if sha256(weights) != build.get("sha256"):
        raise UserError(f"{weights} is not what config.json tells about: run python -m tiny.build again.")
    longest, scores = policy.processor.family.max_new_tokens, {}
    for name, objects in CARD_SCENES.items():
        held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 1, objects), n)
        named = baselines(policy, held, longest)["crop_named_right"]
        scores[name] = evaluate(policy, held, longest).summary | {"crop_named_right": named}
    card = {"build": build, "scores": scores}
    write_json(readme.with_name("card.json"), card)
    readme.write_text(MEASURED.sub(lambda _: card_text(card), text), encoding="utf-8")
    print(card_text(card))


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="folder of the embedded model (default tiny/model)")
    parser.add_argument("--n", type=one_or_more, default=900, help="cues a row (default 900)")
    with exit_on_error():
        write_card(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
