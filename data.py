"""Cues: from images to windows that the policy must find.

A cue is a window of an image. The policy gets the full image and the window's crop, and must answer with
the window's box. Cues come from COCO boxes, a folder of images, or the embedded world (tiny/scenes.py).

    python data.py show [--data scenes|coco|DIR] [--source object|random|large|text] [--out cues.png]
    python data.py fetch DIR --annotations FILE --limit N     only the COCO images that the first N cues use

What differs from a typical data set:
- The target is the crop window itself, after padding, scaling and clipping, not the object's box.
- There is no epoch. Cue i depends on (split, seed, i) alone, so a resumed run neither repeats nor skips any.
- Scaling moves windows between size classes. So the class is drawn first, then windows until one has it.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from files import download
from files.coco import index_coco, parse_ids, read_input
from files.errors import FlagParser, UserError, exit_on_error, one_or_more, require_file
from files.pictures import NARROWEST, SUFFIXES, LeftOut, Photos, contact_sheet, open_folder, warn_once
from prompts import EncodedPrompt, Processor, encode, prompt_text
from reward import Box
from tiny import scenes
from tiny.scenes import Scene, SceneObject

SOURCES = ("object", "random", "large", "text")  # Tables 5 to 7


@dataclass(frozen=True)
class CueConfig:
    """Which windows are drawn; the numbers are those of the paper's Table 9."""

    source: str = "object"  # one of SOURCES
    tiny_ratio: float = 0.7  # share of tiny cues; the rest is small
    padding: tuple[float, float] = (0.0, 0.1)  # fraction of a tiny object's sides, added on each side
    scale: tuple[float, float] = (0.8, 2.0)  # of a tiny object's window; the crop is not resampled
    min_side: int = 16  # pixels of the full image


@dataclass
class Cue:
    image: Image.Image  # the full image, RGB
    box: Box  # (x1, y1, x2, y2) in its pixels: the crop window itself
    size: str  # tiny | small | large
    text: str | None = None  # description of what is in the window, if there is one
    scene: Scene | None = None  # the scene that the image shows, if it is one
    target: SceneObject | None = None  # the object that the window was drawn for, if there is one
    name: str | None = None  # path of the image's file below its folder, if it has one

    @property
    def crop(self) -> Image.Image:
        """The window's pixels; the embedded world enlarges them to four image tokens."""
        crop, side = self.image.crop(self.box), scenes.CROP_SIDE
        return crop if self.scene is None else ImageOps.pad(crop, (side, side), Image.Resampling.BICUBIC)


def size_class(box: Box, width: int, height: int) -> str:
    """tiny below 1 % of the image's area, small to 5 %, large above 10 %, and medium between them."""
    share = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
    return "tiny" if share < 0.01 else "small" if share <= 0.05 else "large" if share > 0.1 else "medium"


def sample_cue_box(rng: random.Random, target: Box, width: int, height: int, cfg: CueConfig) -> Box | None:
    """The crop window of a target object's box, in whole pixels (Table 9); None where there can be none.

    >>> sample_cue_box(random.Random(0), (100, 100, 300, 250), 640, 480, CueConfig())  # not tiny: kept
    (100, 100, 300, 250)
    >>> sample_cue_box(random.Random(0), (100, 100, 120, 110), 640, 480, CueConfig())  # tiny: × 2.0
    (90, 95, 130, 115)
    """
    # Annotations can reach beyond the image; only what is visible counts.
    x1, y1, x2, y2 = target
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if not (x1 < x2 and y1 < y2):  # "not" catches a NaN too
        return None
    # Only tiny objects are padded and scaled, both sides by one factor; larger ones bring enough context.
    window_scale = 1.0
    if size_class((x1, y1, x2, y2), width, height) == "tiny":
        window_scale = (1 + 2 * rng.uniform(*cfg.padding)) * rng.uniform(*cfg.scale)
    edges = []
    for low, high, limit in ((x1, x2, width), (y1, y2, height)):
        # The box must be pixels that exist, so the window is cut at an edge of the image. Where it would drop
        # below the minimum side, it moves inward instead.
        half = max(window_scale * (high - low), cfg.min_side) / 2
        start = max(0, min(round((low + high) / 2 - half), limit - cfg.min_side))
        end = min(limit, max(round((low + high) / 2 + half), start + cfg.min_side))
        edges.append((start, end))
    (x1, x2), (y1, y2) = edges
    # Image processors refuse what is longer than 200 times its width.
    return (x1, y1, x2, y2) if max(x2 - x1, y2 - y1) <= NARROWEST * min(x2 - x1, y2 - y1) else None


def sample_random_box(
    rng: random.Random, width: int, height: int, size: str, cfg: CueConfig, must_contain: Box | None = None
) -> Box | None:
    """A window of a size class anywhere in the image (Table 7), or around a box; None if it does not fit."""
    min_share, max_share = {"tiny": (0.001, 0.01), "small": (0.01, 0.05), "large": (0.1, 0.3)}[size]
    window_area, aspect_ratio = rng.uniform(min_share, max_share) * width * height, 2 ** rng.uniform(-1, 1)
    w = max(cfg.min_side, round((window_area * aspect_ratio) ** 0.5))
    h = max(cfg.min_side, round((window_area / aspect_ratio) ** 0.5))
    # Without must_contain: an inverted box, around which every place is allowed.
    x1, y1, x2, y2 = (round(v) for v in must_contain or (width, height, 0, 0))
    x_range, y_range = (max(0, x2 - w), min(width - w, x1)), (max(0, y2 - h), min(height - h, y1))
    if x_range[0] > x_range[1] or y_range[0] > y_range[1]:
        return None
    x, y = rng.randint(*x_range), rng.randint(*y_range)
    return (x, y, x + w, y + h) if size_class((x, y, x + w, y + h), width, height) == size else None


@dataclass(frozen=True)
class Cues:
    """An endless sequence of cues; `left_out` counts annotations and images that cannot be used."""

    cfg: CueConfig
    split: str
    seed: int
    draw: Callable[[random.Random, str, CueConfig], Cue | None]  # None: draw again
    left_out: tuple[LeftOut, ...] = ()  # annotations are counted at once, images when they are opened

    def __getitem__(self, index: int) -> Cue:
        rng, cfg = random.Random(f"{self.split}/{self.seed}/{index}"), self.cfg
        size = "large" if cfg.source == "large" else "tiny" if rng.random() < cfg.tiny_ratio else "small"
        draws = (self.draw(rng, size, cfg) for _ in range(5000))
        if (cue := next(filter(None, draws), None)) is None:
            reasons = "".join(f"; {part}" for part in self.left_out)
            raise UserError(f"No {size} {cfg.source} cue in 5,000 draws{reasons}: add images.")
        return cue


def scene_cues(
    cfg: CueConfig, split: str, seed: int, num_objects: tuple[int, int] = (8, 12), twins: bool | None = None
) -> Cues:
    """Cues from the embedded world: half of them, with `twins` all or none of them, show one of two twins.

    A tiny window is drawn for a tiny object and a small one for a small object: a small window that shows a
    tiny object enlarged would teach the model to overlook what is small.
    """

    def draw(rng: random.Random, size: str, cfg: CueConfig) -> Cue | None:
        side, scene = scenes.SIDE, scenes.draw_layout(rng, rng.randint(*num_objects), twins)
        # Where there are twins, the crop is of one of them: their name is not enough to find it.
        target = rng.choice([o for o in scene.objects if not scene.is_unique(o)] or scene.objects)
        if cfg.source in ("object", "text"):
            box = sample_cue_box(rng, target.box, side, side, cfg) if target.size == size else None
        else:
            box = sample_random_box(rng, side, side, size, cfg, target.box if size == "large" else None)
        if box is None or size_class(box, side, side) != size:
            return None
        # A crop of plain background could be from anywhere; COCO's random crops have texture.
        if max(scenes.visible_fraction(o.box, box) for o in scene.objects) < 0.05:
            return None
        target = None if cfg.source == "random" else target
        return Cue(scenes.render(scene), box, size, target and target.name, scene, target)

    return Cues(cfg, f"scenes-{split}", seed, draw)


def coco_cues(
    annotations: Path, images: Path, cfg: CueConfig, split: str, seed: int, exclude: Path | None = None,
    expressions: Path | None = None, photos: Photos | None = None,
) -> Cues:  # fmt: skip
    """Cues from COCO's boxes; training and held-out cues never share an image.

    exclude: file of ids to leave out; expressions: JSON of texts by annotation id; photos: opens images.
    """
    require_file("--images", images, folder=True)
    if exclude is None:
        warn_once("without --exclude FILE, RefCOCO's test images may be among the cues")
    excluded_ids = read_input("exclude", exclude, "list of image ids", parse_ids)
    text_by_id = read_input("expressions", expressions, "JSON object", lambda t: dict(json.loads(t or "[]")))
    options = dict(split=split, excluded=excluded_ids, texts=text_by_id, need_text=cfg.source == "text")
    index = partial(index_coco, name=str(annotations), folder=images, **options)
    objects, left_out = read_input("annotations", annotations, "COCO instances JSON", index)
    if not objects:
        reasons = "; ".join(map(str, left_out))
        raise UserError(f"--annotations {annotations} leaves no {split} cue ({reasons}): give another.")
    for part in left_out:
        part.warn()
    num_files = len({annotation.name for annotation in objects})
    photos = photos or Photos(images, LeftOut(f"{split} images in {images}", num_files))

    def draw(rng: random.Random, size: str, cfg: CueConfig) -> Cue | None:
        annotation = rng.choice(objects)
        if cfg.source == "random":
            box, text = sample_random_box(rng, *annotation.size, size, cfg), None
        else:
            box, text = sample_cue_box(rng, annotation.box, *annotation.size, cfg), annotation.text
        if box is None or size_class(box, *annotation.size) != size:
            return None
        image = photos.open(annotation.name, annotation.size, annotation.address)
        return image and Cue(image, box, size, text, name=annotation.name)

    return Cues(cfg, f"coco-{split}", seed, draw, (*left_out, photos.left_out))


def folder_cues(folder: Path, cfg: CueConfig, split: str, seed: int) -> Cues:
    """Random windows of the images in a folder; one image in ten is held out."""
    names, photos = open_folder(folder, split)

    def draw(rng: random.Random, size: str, cfg: CueConfig) -> Cue | None:
        image = photos.open(name := rng.choice(names))
        box = image and sample_random_box(rng, *image.size, size, cfg)
        return box and Cue(image, box, size, name=name)

    cfg = replace(cfg, source="random")
    return Cues(cfg, f"folder-{split}", seed, draw, (photos.left_out,))


def open_cues(data: str, split: str, seed: int, cfg: CueConfig, **files: Any) -> Cues:
    """The cues that --data names; `files` are those of coco_cues."""
    if not 0 <= cfg.tiny_ratio <= 1:
        raise UserError(f"--tiny-ratio {cfg.tiny_ratio} is no share: give 0 to 1.")
    if data == "scenes":
        return scene_cues(cfg, split, seed)
    if data == "coco":
        if not (files.get("annotations") and files.get("images")):
            raise UserError("--data coco needs --annotations FILE and --images DIR.")
        return coco_cues(cfg=cfg, split=split, seed=seed, **files)
    if not Path(data).is_dir():
        raise UserError(f"--data {data} is neither scenes, coco nor a folder of images.")
    if cfg.source not in ("object", "random"):
        raise UserError(f"--source {cfg.source} needs boxes, but --data {data} has none: use random.")
    return folder_cues(Path(data), cfg, split, seed)


def encode_cue(processor: Processor, cue: Cue, source: str) -> EncodedPrompt:
    """The training prompt of a cue: image and crop, or for the text cue (Table 5) image and description."""
    if source == "text":
        return encode(processor, prompt_text(processor.family, "text", text=cue.text), cue.image)
    return encode(processor, prompt_text(processor.family, "cue"), cue.image, crop=cue.crop)


def fetch_images(cfg: CueConfig, limit: int, heldout: int, seed: int, **files: Path | None) -> None:
    """Downloads what training cues 0 to limit − 1 and the held-out ones use, as locus_mini.py opens them."""
    files["images"].mkdir(parents=True, exist_ok=True)
    downloads = download.ImageDownloads(files["images"], LeftOut(f"images of {files['annotations']}", 0))
    cues = open_cues("coco", "train", seed, cfg, photos=downloads, **files)
    heldout_cues = open_cues("coco", "heldout", 0, CueConfig(), photos=downloads, **files)
    downloads.left_out.total = cues.left_out[0].total
    parts = ((cues, limit), (heldout_cues, heldout))
    download.download_images(downloads, lambda: [part[i] for part, n in parts for i in range(n)])
    flags = files | {"source": cfg.source, "tiny-ratio": cfg.tiny_ratio, "seed": seed}
    print(download.training_command(downloads, limit, heldout, flags))


def cue_flags() -> FlagParser:
    """The flags of which cues are drawn, as a parent of each command that draws some."""
    parser = FlagParser(add_help=False)
    for name in ("annotations", "exclude", "expressions"):
        parser.add_argument(f"--{name}", type=Path, help="of COCO")
    parser.add_argument("--source", choices=SOURCES, default="object", help="what a cue is (Tables 5 to 7)")
    parser.add_argument("--tiny-ratio", type=float, default=0.7, help="share of tiny cues; the rest is small")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    parser = FlagParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    show_parser = commands.add_parser("show", parents=[cue_flags()], help="a sheet of cues")
    show_parser.add_argument("--data", default="scenes", help="scenes, coco or a folder of images")
    show_parser.add_argument("--images", type=Path, help="of COCO")
    show_parser.add_argument("--n", type=one_or_more, default=12, help="how many")
    show_parser.add_argument("--out", type=Path, default=Path("cues.png"))
    fetch_parser = commands.add_parser("fetch", parents=[cue_flags()], help="download what cues use")
    fetch_parser.add_argument("images", metavar="DIR", type=Path, help="where to; existing images are kept")
    fetch_parser.add_argument("--limit", type=one_or_more, default=6400, help="training: steps × prompts")
    fetch_parser.add_argument("--heldout", type=one_or_more, default=600, help="the run's --eval-cues")
    args = vars(parser.parse_args())
    command, cfg = args.pop("command"), CueConfig(args.pop("source"), args.pop("tiny_ratio"))
    with exit_on_error():
        if command == "fetch":
            fetch_images(cfg, **args)
        else:
            n, out = args.pop("n"), args.pop("out")
            if out.suffix.lower() not in SUFFIXES:
                raise UserError(f"--out {out} is not the name of an image: give one that ends in .png.")
            contact_sheet(open_cues(**args, split="train", cfg=cfg), n).save(out)
            print(out)


if __name__ == "__main__":
    main()
