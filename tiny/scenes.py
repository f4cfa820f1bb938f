"""The embedded world: small images of coloured shapes, and questions with known answers and evidence.

A scene is 192 × 192 pixels: a plain, dim background with faint rectangles, and 1 to 16 objects.

What differs from a typical synthetic data set:
- No two objects of a scene share both colour and shape, so "the red star" names exactly one of them.
- Most objects cover less than 1 % of the image. So what makes a question hard is to find its evidence.
- A question is only asked where it has exactly one answer, and it comes with the box of its evidence.
"""

import random
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from reward import Box

SIDE = 192  # pixels: 12 × 12 patches of 16, merged 2 × 2 into the 36 image tokens of the embedded model
CROP_SIDE = 64  # pixels that a crop is enlarged to: 4 image tokens
TINY_SIDES = (14, 18)  # pixels, from and to: below 1 % of the image
SMALL_SIDES = (20, 42)  # 1 to 5 % of the image
TINY_SHARE = 0.7  # share of tiny objects; the rest is small
GAP = 2  # pixels between the boxes of two objects

COLORS = dict(red=(230, 40, 40), green=(40, 185, 60), blue=(60, 95, 245), yellow=(240, 225, 50))
COLORS |= dict(purple=(150, 60, 205), orange=(245, 140, 30), cyan=(60, 215, 225), white=(240, 240, 240))
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # quarters of the image


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; `box` is (x1, y1, x2, y2) in scene pixels, right and bottom edge exclusive."""

    color: str
    shape: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and its evidence: the object that has to be found.

    kind: "attribute" (colour or shape) or "place". answer: one or two words. name, box: of the evidence, in
    scene pixels.
    """

    kind: str
    text: str
    answer: str
    name: str
    box: Box


@dataclass
class Scene:
    """Objects and background of an image. Objects have distinct (colour, shape) pairs and disjoint boxes."""

    objects: list[SceneObject]
    background: tuple[int, int, int]
    rectangles: list[tuple[tuple[int, int, int, int], tuple[int, int, int]]] = field(default_factory=list)


def draw_layout(rng: random.Random, count: int) -> Scene:
    """A scene of `count` objects (1 to 16), none of which overlap."""
    pairs = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], count)
    sides = [rng.randint(*(TINY_SIDES if rng.random() < TINY_SHARE else SMALL_SIDES)) for _ in pairs]
    boxes: list[Box] = []
    while len(boxes) < count:
        # If there is no room for one object, all are placed again: to shrink it would change the sizes drawn.
        boxes.clear()
        for side in sorted(sides, reverse=True):
            for _ in range(50):
                x, y = rng.randint(0, SIDE - side), rng.randint(0, SIDE - side)
                box = (x, y, x + side, y + side)
                if all(not touches(box, other, GAP) for other in boxes):
                    boxes.append(box)
                    break
    rng.shuffle(boxes)  # else the first pair would always be the largest object
    background = tuple(rng.randint(15, 85) for _ in range(3))
    rectangles = []
    for _ in range(rng.randint(0, 5)):
        x, y, w, h = rng.randint(-20, SIDE), rng.randint(-20, SIDE), rng.randint(15, 90), rng.randint(15, 90)
        rectangles.append(((x, y, x + w, y + h), tuple(max(0, c + rng.randint(-14, 14)) for c in background)))
    return Scene([SceneObject(c, s, b) for (c, s), b in zip(pairs, boxes)], background, rectangles)


def touches(a: Box, b: Box, gap: float = 0) -> bool:
    """True if two boxes overlap, or are less than `gap` apart."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def visible_fraction(box: Box, window: Box) -> float:
    """The share of a box's area that lies inside a window, from 0 to 1."""
    width = max(0, min(box[2], window[2]) - max(box[0], window[0]))
    height = max(0, min(box[3], window[3]) - max(box[1], window[1]))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


def render(scene: Scene) -> Image.Image:
    """The RGB image of a scene, 192 × 192 pixels."""
    image = Image.new("RGB", (SIDE, SIDE), scene.background)
    draw = ImageDraw.Draw(image)
    for corners, color in scene.rectangles:
        draw.rectangle(corners, fill=color)
    for scene_object in scene.objects:
        x1, y1, x2, _ = scene_object.box
        image.paste(COLORS[scene_object.color], (x1, y1), shape_mask(scene_object.shape, x2 - x1))
    return image


# x and y of a star's corners in the unit square: outer and inner ones in turn, clockwise from the top.
STAR = (0.5, 0.0, 0.618, 0.382, 1.0, 0.382, 0.691, 0.618, 0.809, 1.0)
STAR += (0.5, 0.764, 0.191, 1.0, 0.309, 0.618, 0.0, 0.382, 0.382, 0.382)


def shape_mask(shape: str, side: int) -> Image.Image:
    """How much of each pixel a shape covers, 0 to 255: a grey image of side × side pixels that it fills."""
    n = 4 * side  # drawn four times as large, then averaged: the edges are smooth
    square, low, high = (0, 0, n - 1, n - 1), 0.34 * n, 0.66 * n
    parts = {  # calls of ImageDraw, with the grey that each fills in
        "circle": [("ellipse", square, 255)],
        "ring": [("ellipse", square, 255), ("ellipse", (0.28 * n, 0.28 * n, 0.72 * n, 0.72 * n), 0)],
        "square": [("rectangle", square, 255)],
        "triangle": [("polygon", (n / 2, 0, n - 1, n - 1, 0, n - 1), 255)],
        "star": [("polygon", [v * (n - 1) for v in STAR], 255)],
        "cross": [("rectangle", (low, 0, high, n - 1), 255), ("rectangle", (0, low, n - 1, high), 255)],
    }
    mask = Image.new("L", (n, n))
    for method, corners, grey in parts[shape]:
        getattr(ImageDraw.Draw(mask), method)(corners, fill=grey)
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

    An attribute question names one property of an object and asks for the other, so no other object may have
    the named one. A place is a quarter of the image; objects within 8 pixels of a middle line have none.
    """
    unambiguous = []
    for scene_object in scene.objects:
        color, shape = scene_object.color, scene_object.shape
        name, box, (x, y) = scene_object.name, scene_object.box, scene_object.centre
        if sum(other.color == color for other in scene.objects) == 1:
            text = f"What shape is the {color} thing?"
            unambiguous.append(Question("attribute", text, shape, name, box))
        if sum(other.shape == shape for other in scene.objects) == 1:
            text = f"What color is the {shape}?"
            unambiguous.append(Question("attribute", text, color, name, box))
        if min(abs(x - SIDE / 2), abs(y - SIDE / 2)) >= 8:
            place = PLACES[2 * (y > SIDE / 2) + (x > SIDE / 2)]
            unambiguous.append(Question("place", f"Where is the {name}?", place, name, box))
    return unambiguous


def alone_in_its_cells(scene: Scene, box: Box, cell: int = 32) -> bool:
    """True if no other object shares an image token (a cell of 32 × 32 pixels) with the object in `box`."""
    x1, y1, x2, y2 = box
    cells = (x1 // cell * cell, y1 // cell * cell, -(-x2 // cell) * cell, -(-y2 // cell) * cell)
    return not any(touches(cells, other.box) for other in scene.objects if other.box != box)
