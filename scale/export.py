"""The training loop's cues as files for engines that scale: `python -m scale.export DIR --format easyr1|trl`.

DIR/train.jsonl           one row per cue, in the order in which the loop draws them
DIR/train.settings.json   the settings of the export, and the pixel limits that its boxes are valid for
DIR/images                a link to the folder of the full images; for scenes, a folder of files
DIR/crops, DIR/turned     crops; full images that an engine would not show as the loop does
DIR/format.jinja          the format prompt for EasyR1: the instruction to think
"""

import json
import math
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from data import Cue, CueConfig, cue_flags, open_cues
from files.checkpoints import read_processors
from files.disk import continue_lines, file_stats, fingerprint, read_json, write_json
from files.errors import FlagParser, UserError, exit_on_error, one_or_more
from models import read_family
from prompts import PROMPTS, QWEN2_5, QWEN3, BoxFrame, Family, box_frame, prompt_text
from training.run_folder import lock_run_folder, require_same_settings

EASYR1_PIXELS = (512**2, 2048**2)  # data.min_pixels and data.max_pixels in its examples and in easyr1.yaml
# For --frame without --model: family, cell, and the pixel limits of the published processors.
QWEN = {"resized": (QWEN2_5, 28, (56**2, 3584**2)), "relative1000": (QWEN3, 32, (256**2, 4096**2))}
FAMILY_SETTINGS = ("box_frame", "template", "crop_pixels", "opening")  # what rows take from the family


@dataclass(frozen=True)
class Target:
    """The engine and model that an export is for, and so how they resize an image."""

    engine: str  # easyr1 | trl
    family: Family
    cell: int  # side of an image token in pixels; the processor rounds sizes to multiples of it
    own: tuple[int, int]  # least and most pixels in the processor's own settings
    pixels: tuple[int, int]  # least and most pixels in the engine's settings

    def frame(self, width: int, height: int) -> BoxFrame:
        """The box frame of a full image of width × height as this engine shows it to the model.

        EasyR1 resizes twice: by its own rule to its own limits, and then the processor resizes to multiples
        of its cell within the processor's limits. In TRL only the processor resizes, with the limits of the
        export (train_trl.py sets them). Boxes in resized pixels refer to the size after the last step; boxes
        relative to 1,000 do not depend on it.
        """
        size, limits = (width, height), self.pixels
        if self.engine == "easyr1":
            size, limits = easyr1_size(width, height, *self.pixels), self.own
        try:
            rows, columns = smart_resize(size[1], size[0], self.cell, *limits)
        except ValueError:
            raise UserError(f"An image of {width} × {height} is too narrow for EasyR1: remove it.") from None
        return box_frame(self.family.box_frame, width, height, (1, rows, columns), 1)

    def crop(self, cue: Cue) -> Image.Image:
        """The crop of a cue. TRL has one pair of limits, the full image's, so the loop's are applied here."""
        crop = cue.crop
        if self.engine == "easyr1":
            return crop
        rows, columns = smart_resize(crop.height, crop.width, self.cell, *self.family.crop_pixels)
        return crop.resize((columns, rows), Image.Resampling.BICUBIC)


def easyr1_size(width: int, height: int, low: int, high: int) -> tuple[int, int]:
    """The size that EasyR1 resizes an image to before the processor sees it: `low` to `high` pixels."""
    for bound, limit in ((min, high), (max, low)):
        pixels = width * height
        factor = math.sqrt(bound(pixels, limit) / pixels)  # 1 within the limit
        width, height = int(width * factor), int(height * factor)
    return width, height


def find_target(engine: str, model: str | None, frame: str | None, pixels: list[int] | None) -> Target:
    """The target for a model folder or hub id; without one, for tiny or the Qwen family with that frame."""
    family, cell, own = QWEN[frame] if frame and model is None else read_model(model or "tiny", frame)
    low, high = pixels or (EASYR1_PIXELS if engine == "easyr1" else family.image_pixels)
    if not 0 < low <= high:
        raise UserError(f"--pixels {low} {high} is no range: give the least, then the most.")
    return Target(engine, family, cell, own, (low, high))


def read_model(name: str, frame: str | None) -> tuple[Family, int, tuple[int, int]]:
    """The family, cell and pixel limits of a model, read from its small files without its weights."""
    config, family = read_family(name, frame)
    _, processor, _ = read_processors(name, config)
    own = processor.size["shortest_edge"], processor.size["longest_edge"]
    return family, processor.patch_size * processor.merge_size, own


# ---------------------------------------------------------------- rows


def make_row(target: Target, cue: Cue, source: str, images: list[str]) -> dict[str, Any]:
    """A cue as a row for the engine; `images` are the paths of the full image and of the crop, if any."""
    task, think = "text" if source == "text" else "cue", target.engine == "trl"
    text = prompt_text(target.family, task, think, text=cue.text)
    frame = target.frame(*cue.image.size)
    if target.engine == "easyr1":
        # EasyR1 replaces every <image> by the next image of the list, so a description must not contain one.
        problem = "<image>" * len(images) + text.replace("<image>", "image")
        return {"problem": problem, "images": images, "answer": frame.to_text(cue.box)}
    turn = {"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]}
    row = {"prompt": [turn], "images": images, "box": [round(v, 6) for v in frame.to_units(cue.box)]}
    return row | {"frame": list(astuple(frame)), "opening": target.family.opening}


def link_images(out: Path, folder: Path | None) -> None:
    """Makes DIR/images a link to the folder of the images; UserError if it is something else already.

    Scenes need a folder, not a link: their images would be written among somebody's photos.
    """
    link, target = out / "images", folder.resolve() if folder else out.resolve() / "images"
    if folder and not link.is_symlink() and not link.exists():
        link.symlink_to(target, target_is_directory=True)
    if link.resolve() != target:
        raise UserError(f"{link} leads to {link.resolve()}, not to {target}: give another DIR.")


def save(image: Image.Image, out: Path, name: str) -> str:
    """Writes an image to `name` in DIR, and returns the name."""
    (out / name).parent.mkdir(exist_ok=True)
    image.save(out / name)
    return name


def save_full(cue: Cue, out: Path, name: str, folder: Path | None) -> str:
    """The path of a full image in DIR, which is written only where no file in `folder` will do.

    A file will do if every engine shows it as the loop does: without an EXIF turn, and with a printable name.
    """
    if folder:
        with Image.open(folder / cue.name) as image:
            turned = image.getexif().get(0x0112, 1) in range(2, 9)  # the tag Orientation; 1 means not turned
        if not turned and cue.name.isprintable():
            return f"images/{cue.name}"
    return save(cue.image, out, f"turned/{name}" if folder else f"images/{name}")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of an export, or UserError."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} is missing or damaged: run python -m scale.export with a new DIR.") from None


def check_settings(path: Path, settings: dict[str, Any], rows: Path) -> None:
    """Writes the settings of a new export; UserError if the folder holds something else."""
    if not path.exists() and not rows.exists():
        write_json(path, settings)
    # JSON turns tuples into lists and paths into text, so only what went through it can be compared.
    require_same_settings(path, read_settings(path), json.loads(json.dumps(settings, default=str)))


def export_cues(out: Path, format: str, split: str, limit: int, data: str, seed: int, **flags: Any) -> None:
    """Writes the rows up to `limit` that are missing in `out`; UserError for wrong use.

    flags: source and tiny_ratio of CueConfig; model, frame and pixels as in find_target; annotations, images,
    exclude and expressions of COCO.
    """
    cfg = CueConfig(flags.pop("source"), flags.pop("tiny_ratio"))
    target = find_target(format, flags.pop("model"), flags.pop("frame"), flags.pop("pixels"))
    folder = {"coco": flags["images"], "scenes": None}.get(data, Path(data))
    if folder and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} is inside {folder}, the folder of the images: give a DIR outside.")
    cues = open_cues(data, split, seed, cfg, **flags)
    settings = {"data": data, "seed": seed} | asdict(cfg) | asdict(replace(target, family=None))
    settings |= {name: getattr(target.family, name) for name in FAMILY_SETTINGS}
    settings |= {name: path and path.resolve() for name, path in flags.items()}
    for path in filter(None, (*flags.values(), folder)):
        settings[f"{path.resolve()} as of"] = fingerprint(file_stats(path).values())
    out.mkdir(parents=True, exist_ok=True)
    with lock_run_folder(out):
        rows_path = out / f"{split}.jsonl"
        check_settings(out / f"{split}.settings.json", settings, rows_path)
        link_images(out, folder)
        if format == "easyr1":
            think = PROMPTS[target.family.template]["think"]
            (out / "format.jinja").write_text("{{ content | trim }}" + think + "\n", encoding="utf-8")
        done = rows_path.read_bytes().count(b"\n") if rows_path.exists() else 0
        with continue_lines(rows_path, done) as rows:
            for i in tqdm(range(done, limit), initial=min(done, limit), total=limit):
                cue, name = cues[i], f"{split}-{i:06}.png"
                images = [save_full(cue, out, name, folder)]
                if cfg.source != "text":
                    images.append(save(target.crop(cue), out, f"crops/{name}"))
                rows.write(json.dumps(make_row(target, cue, cfg.source, images)) + "\n")
    for part in (part for part in cues.left_out if part.reasons):
        print(part)
    print(f"{rows_path} is complete: {max(done, limit):,} cues.")


def main() -> None:
    parser = FlagParser(description=__doc__, parents=[cue_flags()])
    parser.add_argument("out", type=Path, metavar="DIR", help="folder of a new export, or of one to continue")
    parser.add_argument("--format", choices=("easyr1", "trl"), required=True)
    parser.add_argument("--data", default="scenes", help="scenes, coco or a folder of images")
    parser.add_argument("--images", type=Path, help="of COCO")
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--limit", type=one_or_more, default=99_500, help="number of cues; paper: 99500")
    parser.add_argument("--model", help="for its prompt and boxes; default tiny, or Qwen if --frame is given")
    parser.add_argument("--frame", "--box-frame", choices=("resized", "relative1000"), help="box coordinates")
    parser.add_argument("--pixels", type=int, nargs=2, metavar=("MIN", "MAX"), help="limits of the engine")
    with exit_on_error("free space or change its permissions, then repeat the command"):
        export_cues(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
