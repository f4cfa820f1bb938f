"""The subcommand `export` of data.py: its flags. Its work is in export.py, which takes seconds to import."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any


def add_export(commands: Any, common: ArgumentParser) -> None:
    """`export` beside the other subcommands, with the flags about cues that they have in common."""
    parser = commands.add_parser("export", parents=[common], help="the cues as files for EasyR1 or TRL")
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write, or to go on with")
    parser.add_argument("--format", choices=("easyr1", "trl"), required=True)
    parser.add_argument("--data", default="scenes", help="scenes, coco or a folder of images")
    parser.add_argument("--images", type=Path, help="of COCO")
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument(
        "--limit", type=int, default=99_500, help="how many cues (default: the paper's 99,500)"
    )
    parser.add_argument("--model", help="whose prompt and box frame; default tiny, or Qwen's of --frame")
    parser.add_argument("--frame", "--box-frame", choices=("resized", "relative1000"), help="of the boxes")
    pixels = "least and most pixels of an image in the engine; default EasyR1's, or in TRL the loop's"
    parser.add_argument("--pixels", type=int, nargs=2, metavar=("MIN", "MAX"), help=pixels)


def export(*args: Any, **flags: Any) -> None:
    from scale.export import export_cues  # which imports data.py

    export_cues(*args, **flags)
