"""The embedded world: small images of coloured shapes, and questions with known answers and evidence.

A scene is 256 × 256 pixels: a plain, dim background with faint rectangles, and 1 to 12 objects. An object is
a coloured shape with a core of another colour: its name ("red star") does not say the core, its description
("red star with blue inside") does.

What differs from a typical synthetic data set:
- Twins: half of the scenes hold two objects of one name and side, which differ in their core alone. So a crop
  tells an instance apart that its name does not.
- Objects are tiny, small or large (the paper's classes). A base model that never had to find a tiny one is
  weak on it, as real models are.
- A question is only asked where it has exactly one answer, and it comes with the box of its evidence.
"""

import random
from dataclasses import dataclass, field
from functools import cache

from PIL import Image, ImageDraw

from reward import Box

SIDE = 256  # pixels: 16 × 16 patches of 16, merged 2 × 2 into the 64 image tokens of the embedded model
CELL = 32  # pixels: the side of an image token
CROP_SIDE = 64  # pixels that the longer side of a crop is enlarged to: 4 image tokens
SIDES = {"tiny": (14, 25), "small": (26, 56), "large": (82, 110)}  # of objects, in pixels, from and to
TINY_SHARE = 0.5  # of the objects of a scene, beside the large one
LARGE_SHARE = 0.3  # of the scenes hold one large object
TWIN_SHARE = 0.5  # of the scenes of two objects and more hold a pair of twins
GAP = 3  # pixels between the boxes of two objects
MAX_OBJECTS = 12

COLORS = dict(red=(230, 40, 40), green=(40, 185, 60), blue=(60, 95, 245), yellow=(240, 225, 50))
COLORS |= dict(purple=(160, 60, 215), white=(240, 240, 240))
SHAPES = ("circle", "square", "triangle", "star", "cross")
KINDS = ("detail", "shape", "place")  # of questions
PLACES = ("top left", "top right", "bottom left", "bottom right")  # quarters of the image


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; `box` is (x1, y1, x2, y2) in scene pixels, right and bottom edge exclusive."""

    color: str
    shape: str
    core: str  # the colour of the disc in its middle
    box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def description(self) -> str:
        return f"{self.name} with {self.core} inside"

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def side(self) -> float:
        return self.box[2] - self.box[0]

    @property
    def size(self) -> str:
        """tiny, small or large: the class of its box among those of the paper."""
        return next(size for size, (_, longest) in SIDES.items() if self.side <= longest)


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and its evidence: the object that has to be found.

    kind: "detail" (what is inside), "shape" or "place". answer: one or two words.
    """

    kind: str
    text: str
    answer: str
    evidence: SceneObject


@dataclass
class Scene:
    """Objects and background of an image; the boxes of two objects never touch."""

    objects: list[SceneObject]
    background: tuple[int, int, int]
    rectangles: list[tuple[tuple[int, int, int, int], tuple[int, int, int]]] = field(default_factory=list)

    def is_unique(self, scene_object: SceneObject) -> bool:
        """True if no other object has the name of this one."""
        return sum(other.name == scene_object.name for other in self.objects) == 1


def draw_layout(rng: random.Random, count: int, twins: bool | None = None) -> Scene:
    """A scene of `count` objects (1 to 12), none of which overlap; twins: with a pair of them or without."""
    twins = (rng.random() < TWIN_SHARE if twins is None else twins) and count > 1
    names = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], count)
    sizes = ["tiny" if rng.random() < TINY_SHARE else "small" for _ in names]
    sides = [rng.randint(*SIDES[size]) for size in sizes]
    if rng.random() < LARGE_SHARE and not (twins and count == 2):
        sides[-1] = rng.randint(*SIDES["large"])
    cores = [rng.choice([core for core in COLORS if core != color]) for color, _ in names]
    if twins:
        names[1], sides[1] = names[0], sides[0]
        cores[1] = rng.choice([core for core in COLORS if core not in (names[0][0], cores[0])])
    boxes: dict[int, Box] = {}
    while len(boxes) < count:
        # If there is no room for one object, all are placed again: to shrink it would change the sizes drawn.
        boxes.clear()
        for index in sorted(range(count), key=lambda i: -sides[i]):
            side = sides[index]
            for _ in range(50):
                x, y = rng.randint(0, SIDE - side), rng.randint(0, SIDE - side)
                box = (x, y, x + side, y + side)
                if all(not touches(box, other, GAP) for other in boxes.values()):
                    boxes[index] = box
                    break
    background = tuple(rng.randint(15, 85) for _ in range(3))
    rectangles = []
    for _ in range(rng.randint(0, 5)):
        x, y = rng.randint(-20, SIDE), rng.randint(-20, SIDE)
        w, h = rng.randint(15, 120), rng.randint(15, 120)
        rectangles.append(((x, y, x + w, y + h), tuple(max(0, c + rng.randint(-14, 14)) for c in background)))
    parts = zip(names, cores, (boxes[index] for index in range(count)))
    return Scene([SceneObject(*name, core, box) for name, core, box in parts], background, rectangles)


def touches(a: Box, b: Box, gap: float = 0) -> bool:
    """True if two boxes overlap, or are less than `gap` apart."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def visible_area(box: Box, window: Box) -> float:
    """The pixels of a box that lie inside a window."""
    width = max(0, min(box[2], window[2]) - max(box[0], window[0]))
    return width * max(0, min(box[3], window[3]) - max(box[1], window[1]))


def visible_fraction(box: Box, window: Box) -> float:
    """The share of a box's area that lies inside a window, from 0 to 1."""
    return visible_area(box, window) / ((box[2] - box[0]) * (box[3] - box[1]))


def render(scene: Scene) -> Image.Image:
    """The RGB image of a scene, 256 × 256 pixels."""
    image = Image.new("RGB", (SIDE, SIDE), scene.background)
    draw = ImageDraw.Draw(image)
    for corners, color in scene.rectangles:
        draw.rectangle(corners, fill=color)
    for scene_object in scene.objects:
        x1, y1, x2, _ = scene_object.box
        for part, color in ((scene_object.shape, scene_object.color), ("core", scene_object.core)):
            image.paste(COLORS[color], (x1, y1), shape_mask(part, x2 - x1))
    return image


# x and y of a star's corners in the unit square: outer and inner ones in turn, clockwise from the top.
STAR = (0.5, 0.0, 0.618, 0.382, 1.0, 0.382, 0.691, 0.618, 0.809, 1.0)
STAR += (0.5, 0.764, 0.191, 1.0, 0.309, 0.618, 0.0, 0.382, 0.382, 0.382)


@cache
def shape_mask(shape: str, side: int) -> Image.Image:
    """How much of each pixel a shape covers, 0 to 255: a grey image of side × side pixels that it fills."""
    n = 4 * side  # drawn four times as large, then averaged: the edges are smooth
    square, low, high = (0, 0, n - 1, n - 1), 0.3 * n, 0.7 * n
    parts = {  # calls of ImageDraw
        "circle": [("ellipse", square)],
        "square": [("rectangle", square)],
        "triangle": [("polygon", (n / 2, 0, n - 1, n - 1, 0, n - 1))],
        "star": [("polygon", [v * (n - 1) for v in STAR])],
        "cross": [("rectangle", (low, 0, high, n - 1)), ("rectangle", (0, low, n - 1, high))],
        "core": [("ellipse", (0.33 * n, 0.38 * n, 0.67 * n, 0.72 * n))],  # lower: a triangle is wide there
    }
    mask = Image.new("L", (n, n))
    for method, corners in parts[shape]:
        getattr(ImageDraw.Draw(mask), method)(corners, fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def keep_only(image: Image.Image, *boxes: Box) -> Image.Image:
    """Context suppression (Table 1): the image with black outside the boxes, canvas and scale unchanged."""
    suppressed = Image.new("RGB", image.size)
    for box in boxes:
        corners = tuple(round(v) for v in box)
        suppressed.paste(image.crop(corners), corners[:2])
    return suppressed


def questions(scene: Scene) -> list[Question]:
    """Every question that has exactly one answer in this scene.

    Detail and place name an object, so it must not have a twin; shape names a colour, which no other object
    may have. A place is a quarter of the image; objects within 8 pixels of a middle line have none.
    """
    unambiguous = []
    for scene_object in scene.objects:
        color, name, (x, y) = scene_object.color, scene_object.name, scene_object.centre
        if sum(other.color == color for other in scene.objects) == 1:
            text = f"What shape is the {color} object?"
            unambiguous.append(Question("shape", text, scene_object.shape, scene_object))
        if scene.is_unique(scene_object):
            text = f"What is inside the {name}?"
            unambiguous.append(Question("detail", text, scene_object.core, scene_object))
            if min(abs(x - SIDE / 2), abs(y - SIDE / 2)) >= 8:
                place = PLACES[2 * (y > SIDE / 2) + (x > SIDE / 2)]
                unambiguous.append(Question("place", f"Where is the {name}?", place, scene_object))
    return unambiguous


def num_cells(box: Box) -> int:
    """The number of image tokens (cells of 32 × 32 pixels) that an object's box touches."""
    x1, y1, x2, y2 = box
    return (-(-x2 // CELL) - x1 // CELL) * (-(-y2 // CELL) - y1 // CELL)
