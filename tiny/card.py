"""The model card of the embedded model: its visual context rot, measured (`python -m tiny.card`)."""

from pathlib import Path

from data import CueConfig, scene_cues
from evaluation.heldout import baselines, build_heldout_set, evaluate
from files.disk import write_json
from files.errors import FlagParser, UserError, exit_on_error, model_folder
from models import load_policy
from policy import Policy

CARD_SCENES = {  # row of the card: things in a scene, is the evidence alone in its cells
    "1 thing": ((1, 1), False),
    "2–3 things": ((2, 3), False),
    "4–8 things": ((4, 8), False),
    "12–16 things": ((12, 16), False),
    "16 things": ((16, 16), False),
    "16 things, evidence alone in its image tokens": ((16, 16), True),
}


def card(policy: Policy, folder: Path, n: int) -> None:
    """Visual context rot of the embedded model, measured and written into its model card."""
    readme = folder / "README.md"
    if "<!-- /measured -->" not in (text := readme.read_text(encoding="utf-8") if readme.is_file() else ""):
        raise UserError(f"{readme} has no place for figures: give it <!-- measured --><!-- /measured -->.")
    columns = ["scenes", "attributes", "suppressed", "places", "suppressed"]
    columns += ["find by text, IoU", "cue search, IoU"]
    lines = [f"| {' | '.join(columns)} |", "|---" * 7 + "|"]
    measured, longest = {}, policy.processor.family.max_new_tokens
    for name, (objects, alone) in CARD_SCENES.items():
        cues = scene_cues(CueConfig(), "heldout", 1, objects)
        held = build_heldout_set(policy, cues, n, alone=alone)
        scores = evaluate(policy, held, longest, name)
        named = baselines(policy, held, longest)["crop_named_right"]
        s = measured[name] = scores.summary | {"crop_named_right": named}
        kinds, black = s["questions"]["by_kind"], s["suppressed"]["by_kind"]
        shown = (kinds["attribute"], black["attribute"], kinds["place"], black["place"])
        shown += () if alone else (s["find"]["mean_iou"], s["cue"]["mean_iou"])  # of all things alike
        lines.append(
            f"| {name} | " + " | ".join(f"{100 * v:.1f}" for v in shown) + " |" + " – |" * (2 * alone)
        )
        print(lines[-1])
    named = measured["4–8 things"]["crop_named_right"]
    lines.append(
        f"\nCrops named right (4–8 things): {100 * named:.1f} %. Every cell: n = {n:,}; held-out scenes."
    )
    write_json(folder / "card.json", measured)
    head, start, rest = text.partition("<!-- measured -->")
    tail = rest.partition("<!-- /measured -->")[2]
    body = "\n".join(["", *lines, "<!-- /measured -->"])
    readme.write_text(head + start + body + tail, encoding="utf-8")


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="folder of the embedded model")
    parser.add_argument("--n", type=int, default=1000, help="samples a cell")
    args = parser.parse_args()
    with exit_on_error():
        card(load_policy(args.model), Path(model_folder(args.model)), args.n)


if __name__ == "__main__":
    main()
