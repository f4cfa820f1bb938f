"""The model card of the embedded model: its visual context rot, measured on held-out scenes.

python -m tiny.card [--model FOLDER] [--n 1000]     writes card.json and the table in README.md
"""

import re
from pathlib import Path
from typing import Any

from data import CueConfig, scene_cues
from evaluation.heldout import baselines, build_heldout_set, evaluate
from files.disk import write_json
from files.errors import FlagParser, UserError, exit_on_error, model_folder
from models import load_policy
from policy import Policy

# Row of the card: fewest and most objects of a scene, and whether the evidence must be alone in its cells.
CARD_SCENES = {"1 thing": ((1, 1), False), "2–3 things": ((2, 3), False), "4–8 things": ((4, 8), False)}
CARD_SCENES |= {"12–16 things": ((12, 16), False), "16 things": ((16, 16), False)}
CARD_SCENES |= {"16 things, evidence alone in its image tokens": ((16, 16), True)}
HEADER = "| scenes | attributes | suppressed | places | suppressed | find by text, IoU | cue search, IoU |"
MEASURED = re.compile("(?<=<!-- measured -->).*(?=<!-- /measured -->)", re.DOTALL)  # the part to replace


def measure(policy: Policy, objects: tuple[int, int], alone: bool, n: int) -> dict[str, Any]:
    """The scores of a row, on n samples of each task; keys as in results.json."""
    cues, longest = scene_cues(CueConfig(), "heldout", 1, objects), policy.processor.family.max_new_tokens
    held = build_heldout_set(policy, cues, n, alone=alone)
    named = baselines(policy, held, longest)["crop_named_right"]
    return evaluate(policy, held, longest).summary | {"crop_named_right": named}


def card_row(name: str, scores: dict[str, Any]) -> str:
    """A row of the table, in points of 100."""
    full, suppressed = scores["questions"]["by_kind"], scores["suppressed"]["by_kind"]
    values = [full["attribute"], suppressed["attribute"], full["place"], suppressed["place"]]
    # Evidence that is alone in its cells limits the questions only; boxes are of any object.
    ious = [] if CARD_SCENES[name][1] else [scores["find"]["mean_iou"], scores["cue"]["mean_iou"]]
    cells = [f"{100 * value:.1f}" for value in values + ious] + ["–", "–"] * (not ious)
    return f"| {name} | {' | '.join(cells)} |"


def card_table(card: dict[str, dict]) -> str:
    """The table of README.md and the line below it, from nothing but the content of card.json."""
    rows = "\n".join(card_row(name, scores) for name, scores in card.items())
    n, named = card["4–8 things"]["cue"]["n"], 100 * card["4–8 things"]["crop_named_right"]
    note = f"Crops named right (4–8 things): {named:.1f} %. Every cell: n = {n:,}; held-out scenes."
    return f"\n{HEADER}\n{'|---' * 7}|\n{rows}\n\n{note}\n"


def write_card(model: str, n: int) -> None:
    """Measures a model in the embedded world, and writes card.json and the table into its folder."""
    readme = Path(model_folder(model)) / "README.md"
    if not (readme.is_file() and MEASURED.search(text := readme.read_text(encoding="utf-8"))):
        raise UserError(f"{readme} has no place for the table: add <!-- measured --><!-- /measured -->.")
    if n < 1:
        raise UserError(f"--n {n} leaves nothing to measure: give 1 or more.")
    policy, card = load_policy(model), {}
    for name, scenes in CARD_SCENES.items():
        card[name] = measure(policy, *scenes, n)
        print(card_row(name, card[name]))
    write_json(readme.with_name("card.json"), card)
    readme.write_text(MEASURED.sub(lambda _: card_table(card), text), encoding="utf-8")


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="folder of the embedded model (default tiny/model)")
    parser.add_argument("--n", type=int, default=1000, help="samples of each task a row (default 1000)")
    args = parser.parse_args()
    with exit_on_error():
        write_card(args.model, args.n)


if __name__ == "__main__":
    main()
