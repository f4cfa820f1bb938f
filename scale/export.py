"""The loop's cues as files for engines that scale: `python -m scale.export DIR --format easyr1|trl`.

DIR/train.jsonl           a row a cue, in the order in which the loop draws them
DIR/train.settings.json   what the rows were drawn from, and the pixel limits that their boxes are for
DIR/images                one link to the folder of the full images; of scenes, a folder of files
DIR/crops, DIR/turned     crops; full images that engines would not show as they are meant
DIR/format.jinja          EasyR1's format prompt: the instruction to think
"""

import json
import math
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf
from PIL import Image
from tqdm import tqdm
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from data import Cue, CueConfig, cue_flags, open_cues
from files.disk import file_stats, fingerprint, write_json
from files.errors import FlagParser, UserError, exit_on_error, model_folder
from models import read_family
from prompts import FAMILIES, PROMPTS, BoxFrame, Family, box_frame, opening, prompt_text
from training.run_folder import lock_run_folder, require_same_settings

EASYR1_PIXELS = (512**2, 2048**2)  # data.min_pixels and data.max_pixels of its examples, and of easyr1.yaml
QWEN = {  # of a frame without a model: family, cell, the limits that its processors are published with
    "resized": ("qwen2_5_vl", 28, (56**2, 3584**2)),
    "relative1000": ("qwen3_vl", 32, (256**2, 4096**2)),
}
ORIENTATION = 0x0112  # the EXIF tag that says how to turn an image


@dataclass(frozen=True)
class Target:
    """What a picture goes through before the model's boxes refer to it."""

    engine: str  # easyr1 | trl
    family: Family
    cell: int  # pixels a side of an image token; the processor makes sizes multiples of it
    own: tuple[int, int]  # least and most pixels by the processor's own settings
    pixels: tuple[int, int]  # least and most pixels that the engine asks for

    def frame(self, width: int, height: int) -> BoxFrame:
        """The box frame of a full image of width × height as this engine shows it to the model.

        EasyR1 resizes twice: first by its own rule to its own limits, then the processor to multiples of
        its cell within the processor's limits. In TRL the processor is alone, with the limits of the export
        (train_trl.py sets them). An image ends at whatever size the last step gives, and boxes in resized
        pixels refer to that; boxes relative to 1,000 do not depend on it.
        """
        size, limits = (width, height), self.pixels
        if self.engine == "easyr1":
            size, limits = easyr1_size(width, height, *self.pixels), self.own
        try:
            rows, columns = smart_resize(size[1], size[0], self.cell, *limits)
        except ValueError:
            raise UserError(
                f"An image of {width} × {height} is too narrow for EasyR1: leave it out."
            ) from None
        return box_frame(self.family.box_frame, width, height, (1, rows, columns), 1)

    def crop(self, cue: Cue) -> Image.Image:
        """A cue's crop: for EasyR1 as it is; for TRL, whose limits are the full image's, as the loop's."""
        crop = cue.crop
        if self.engine == "trl":
            rows, columns = smart_resize(crop.height, crop.width, self.cell, *self.family.crop_pixels)
            crop = crop.resize((columns, rows), Image.Resampling.BICUBIC)
        return crop


def easyr1_size(width: int, height: int, low: int, high: int) -> tuple[int, int]:
    """What EasyR1 makes of an image before the processor sees it: at most `high` pixels, at least `low`."""
    for beyond, limit in ((int.__gt__, high), (int.__lt__, low)):
        if beyond(width * height, limit):
            factor = math.sqrt(limit / (width * height))
            width, height = int(width * factor), int(height * factor)
    return width, height


def find_target(engine: str, model: str | None, frame: str | None, pixels: list[int] | None) -> Target:
    """The target of a model folder or hub id; without one, of tiny, or of the Qwen family with that frame."""
    if model is None and frame is not None:
        kind, cell, own = QWEN[frame]
        family = FAMILIES[kind]
    else:
        family, cell, own = read_model(model or "tiny", frame)
    limits = tuple(pixels or (EASYR1_PIXELS if engine == "easyr1" else family.image_pixels))
    if not 0 < limits[0] <= limits[1]:
        raise UserError(f"--pixels {limits[0]} {limits[1]} leaves no size: give the least, then the most.")
    return Target(engine, family, cell, own, limits)


def read_model(name: str, frame: str | None) -> tuple[Family, int, tuple[int, int]]:
    """Family, cell and pixel limits from a model's small files alone; its weights are not opened."""
    _, family = read_family(name, frame)
    folder, safe = model_folder(name), dict(trust_remote_code=False)
    try:
        processor = hf.AutoImageProcessor.from_pretrained(folder, **safe)
        begun = opening(hf.AutoTokenizer.from_pretrained(folder, **safe))
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name} cannot be loaded: {str(error).splitlines()[0]}") from None
    own = processor.size["shortest_edge"], processor.size["longest_edge"]
    return replace(family, opening=begun), processor.patch_size * processor.merge_size, own


# ---------------------------------------------------------------- rows


def shown_as_meant(path: Path, name: str) -> bool:
    """Do all engines open the file as the loop? Not if it asks to be turned, has 16 bits or an odd name."""
    with Image.open(path) as image:
        turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
        return not turned and image.mode[0] not in "IF" and name.isprintable()


def make_row(target: Target, cue: Cue, source: str, images: list[str]) -> dict[str, Any]:
    """A cue as the engine's row; `images` are the full image's path and the crop's, if there is one."""
    task, text = ("text", {"text": cue.text}) if source == "text" else ("cue", {})
    words, frame = partial(prompt_text, target.family, task, **text), target.frame(*cue.image.size)
    if target.engine == "easyr1":
        problem = words(think=False).replace("<image>", "image")  # each tag takes an image from the list
        return {
            "problem": "<image>" * len(images) + problem,
            "images": images,
            "answer": frame.to_text(cue.box),
        }
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": words()}]
    row = {"prompt": [{"role": "user", "content": content}], "images": images}
    row |= {"box": [round(v, 6) for v in frame.to_units(cue.box)], "frame": list(astuple(frame))}
    return row | {"opening": target.family.opening}


def image_folder(out: Path, source: Path | None) -> None:
    """DIR/images: a link to the folder of the images, or of scenes a folder to write them in."""
    link = out / "images"
    if source is None:
        link.mkdir(exist_ok=True)
    elif not link.is_symlink() and not link.exists():
        link.symlink_to(source.resolve(), target_is_directory=True)
    elif link.resolve() != source.resolve():
        raise UserError(f"{link} leads elsewhere than {source}: give another DIR.")


def save(image: Image.Image, out: Path, folder: str, number: str) -> str:
    """Writes an image below DIR and gives its path there."""
    (out / folder).mkdir(exist_ok=True)
    image.save(out / folder / f"{number}.png")
    return f"{folder}/{number}.png"


def write_full(out: Path, number: str, cue: Cue, source: Path | None) -> str:
    """The path, below DIR, of a cue's full image, which is written only where no file of `source` will do."""
    if source is None:
        return save(cue.image, out, "images", number)
    if shown_as_meant(source / cue.name, cue.name):
        return f"images/{cue.name}"
    return save(cue.image, out, "turned", number)


def whole_rows(path: Path) -> int:
    """How many rows a file holds; what an interruption left of one more is cut off."""
    rows = whole = 0
    with path.open("a+b") as file:
        file.seek(0)
        for line in file:
            if line.endswith(b"\n"):
                rows, whole = rows + 1, whole + len(line)
        file.truncate(whole)
    return rows


def begin(out: Path, split: str, settings: dict[str, Any]) -> None:
    """The settings of an export in its folder, or UserError where it was begun with others."""
    path, settings = out / f"{split}.settings.json", json.loads(json.dumps(settings, default=str))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        require_same_settings(path, found, settings)
    except FileNotFoundError:
        if (out / f"{split}.jsonl").exists():
            raise UserError(f"{out} holds a {split}.jsonl of something else: give another DIR.") from None
        write_json(path, settings)
    except (ValueError, AttributeError):
        raise UserError(f"{path} is damaged: delete {out}, or give another DIR.") from None


def export_cues(
    cfg: CueConfig, out: Path, format: str, split: str, limit: int, data: str, seed: int, **flags: Any
) -> None:
    """Rows up to `limit` into `out`, as many as are missing; UserError for wrong use and where writing fails.

    flags: model, frame and pixels as in find_target; annotations, images, exclude and expressions of COCO.
    """
    if limit < 1:
        raise UserError(f"--limit {limit} leaves nothing to export: give 1 or more.")
    target = find_target(format, *(flags.pop(name) for name in ("model", "frame", "pixels")))
    source = flags["images"] if data == "coco" else None if data == "scenes" else Path(data)
    if source is not None and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies among the images of {source}: give a DIR outside.")
    cues = open_cues(data, split, seed, cfg, **flags)
    paths = [path for path in (*flags.values(), source) if path is not None]
    family = {
        name: getattr(target.family, name) for name in ("box_frame", "template", "crop_pixels", "opening")
    }
    settings = {"data": data, "seed": seed} | asdict(cfg) | asdict(replace(target, family=None)) | family
    settings |= {name: path and path.resolve() for name, path in flags.items()}
    settings |= {f"{path.resolve()} as of": fingerprint(file_stats(path)) for path in paths}
    rows = out / f"{split}.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock_run_folder(out):
            begin(out, split, settings)
            image_folder(out, source)
            if format == "easyr1":
                think = "{{ content | trim }}" + PROMPTS[target.family.template]["think"]
                (out / "format.jinja").write_text(f"{think}\n", encoding="utf-8")
            done = whole_rows(rows)
            with rows.open("a", encoding="utf-8") as file, tqdm(total=limit, initial=min(done, limit)) as bar:
                for i in range(done, limit):
                    number, cue = f"{split}-{i:06}", cues[i]
                    images = [write_full(out, number, cue, source)]
                    if cfg.source != "text":
                        images.append(save(target.crop(cue), out, "crops", number))
                    file.write(json.dumps(make_row(target, cue, cfg.source, images)) + "\n")
                    file.flush()
                    bar.update()
    except OSError as error:
        why = f"{error.filename or out} cannot be written ({error.strerror or error})"
        raise UserError(f"{why}: make room or allow it, then give the same command again.") from None
    for part in (part for part in cues.left_out if part.reasons):
        print(part)
    print(f"{rows} is complete: {max(done, limit):,} cues.")


def main() -> None:
    parser = FlagParser(description=__doc__, parents=[cue_flags()])
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write, or to go on with")
    parser.add_argument("--format", choices=("easyr1", "trl"), required=True)
    parser.add_argument("--data", default="scenes", help="scenes, coco or a folder of images")
    parser.add_argument("--images", type=Path, help="of COCO")
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--limit", type=int, default=99_500, help="how many cues (default: the paper's)")
    parser.add_argument("--model", help="whose prompt and box frame; default tiny, or Qwen's of --frame")
    parser.add_argument("--frame", "--box-frame", choices=("resized", "relative1000"), help="of the boxes")
    pixels = "least and most pixels of an image in the engine; default EasyR1's, or in TRL the loop's"
    parser.add_argument("--pixels", type=int, nargs=2, metavar=("MIN", "MAX"), help=pixels)
    args = vars(parser.parse_args())
    cfg = CueConfig(args.pop("source"), args.pop("tiny_ratio"))
    with exit_on_error():
        export_cues(cfg, **args)


if __name__ == "__main__":
    main()
