"""The embedded world: small pictures of coloured shapes, with questions whose answers and evidence are known.

A scene is 192 × 192 pixels: a plain, dim background with faint rectangles and up to 16 things, each a
colour and a shape that no other thing of the scene has together ("the red star" is always one thing).
Most things cover less than 1 % of the picture, so a question is only as hard as finding its evidence.
"""

import random
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from reward import Box

SIDE = 192  # pixels: 12 × 12 patches of 16, merged 2 × 2 into the 36 image tokens of the embedded model
CROP_SIDE = 64  # a crop is enlarged to this: 4 image tokens
TINY_SIDES = (14, 18)  # below 1 % of the picture
SMALL_SIDES = (20, 42)  # 1 to 5 %
TINY_SHARE = 0.7
GAP = 2  # pixels between the boxes of two things

COLORS = {
    "red": (230, 40, 40),
    "green": (40, 185, 60),
    "blue": (60, 95, 245),
    "yellow": (240, 225, 50),
    "purple": (150, 60, 205),
    "orange": (245, 140, 30),
    "cyan": (60, 215, 225),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; `box` is (x1, y1, x2, y2) in scene pixels, right and bottom edge exclusive."""

    color: str
    shape: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Question:
    """A question on one full scene, and the evidence that decides it.

    kind: "attribute" (colour or shape) or "place"; answer: one word or two;
    name and box: the thing that has to be found, box in scene pixels.
    """

    kind: str
    text: str
    answer: str
    name: str
    box: Box


@dataclass
class Scene:
    """Things and background of a picture; things have distinct (colour, shape) pairs and disjoint boxes."""

    objects: list[SceneObject]
    background: tuple[int, int, int]
    rectangles: list[tuple[tuple[int, int, int, int], tuple[int, int, int]]] = field(default_factory=list)


def draw_layout(rng: random.Random, count: int) -> Scene:
    """A scene of `count` things (1 to 16) at places that do not overlap."""
    pairs = rng.sample([(c, s) for c in COLORS for s in SHAPES], count)
    sides = [rng.randint(*(TINY_SIDES if rng.random() < TINY_SHARE else SMALL_SIDES)) for _ in pairs]
    boxes: list[Box] = []
    while len(boxes) < count:
        boxes.clear()  # a crowded corner can leave no room: start over rather than shrink what was drawn
        for side in sorted(sides, reverse=True):
            for _ in range(50):
                x, y = rng.randint(0, SIDE - side), rng.randint(0, SIDE - side)
                box = (x, y, x + side, y + side)
                if all(not touches(box, other, GAP) for other in boxes):
                    boxes.append(box)
                    break
    rng.shuffle(boxes)
    background = tuple(rng.randint(15, 85) for _ in range(3))
    rectangles = []
    for _ in range(rng.randint(0, 5)):
        x, y, w, h = rng.randint(-20, SIDE), rng.randint(-20, SIDE), rng.randint(15, 90), rng.randint(15, 90)
        rectangles.append(((x, y, x + w, y + h), tuple(max(0, c + rng.randint(-14, 14)) for c in background)))
    return Scene([SceneObject(c, s, b) for (c, s), b in zip(pairs, boxes)], background, rectangles)


def touches(a: Box, b: Box, gap: float = 0) -> bool:
    """Do two boxes overlap, or come closer than `gap`?"""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def visible_fraction(box: Box, window: Box) -> float:
    """The share of a box's area that is inside a window."""
    width = max(0, min(box[2], window[2]) - max(box[0], window[0]))
    height = max(0, min(box[3], window[3]) - max(box[1], window[1]))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, 192 × 192; edges are smooth (drawn four times as large, then averaged)."""
    image = Image.new("RGB", (SIDE, SIDE), scene.background)
    draw = ImageDraw.Draw(image)
    for corners, color in scene.rectangles:
        draw.rectangle(corners, fill=color)
    for scene_object in scene.objects:
        x1, y1, x2, _ = scene_object.box
        mask = shape_mask(scene_object.shape, x2 - x1)
        image.paste(COLORS[scene_object.color], (x1, y1), mask)
    return image


def shape_mask(shape: str, side: int) -> Image.Image:
    """Coverage of a shape that fills its square, `L`, side × side."""
    n = 4 * side
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        if shape == "ring":
            draw.ellipse((0.28 * n, 0.28 * n, 0.72 * n, 0.72 * n), fill=0)
    elif shape == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, 0), (n - 1, n - 1), (0, n - 1)], fill=255)
    elif shape == "cross":
        draw.rectangle((0.34 * n, 0, 0.66 * n, n - 1), fill=255)
        draw.rectangle((0, 0.34 * n, n - 1, 0.66 * n), fill=255)
    else:
        draw.polygon([(x * (n - 1), y * (n - 1)) for x, y in STAR], fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


# A five-pointed star stretched to its square: outer and inner corners in turn, clockwise from the top.
STAR = (
    (0.5, 0.0), (0.618, 0.382), (1.0, 0.382), (0.691, 0.618), (0.809, 1.0),
    (0.5, 0.764), (0.191, 1.0), (0.309, 0.618), (0.0, 0.382), (0.382, 0.382),
)  # fmt: skip


def keep_only(image: Image.Image, *boxes: Box) -> Image.Image:
    """Context suppression (the paper's Table 1): black outside the boxes, canvas and scale unchanged."""
    out = Image.new("RGB", image.size)
    for box in boxes:
        corners = tuple(round(v) for v in box)
        out.paste(image.crop(corners), corners[:2])
    return out


def questions(scene: Scene) -> list[Question]:
    """Every question that has one answer here.

    Attribute questions name the one property and ask for the other, so they need a property that no other
    thing has. A place is a quarter of the picture; things within 8 pixels of a middle line are not asked for.
    """
    asked = []
    for scene_object in scene.objects:
        if sum(t.color == scene_object.color for t in scene.objects) == 1:
            text = f"What shape is the {scene_object.color} thing?"
            asked.append(Question("attribute", text, scene_object.shape, scene_object.name, scene_object.box))
        if sum(t.shape == scene_object.shape for t in scene.objects) == 1:
            text = f"What color is the {scene_object.shape}?"
            asked.append(Question("attribute", text, scene_object.color, scene_object.name, scene_object.box))
        x, y = (
            (scene_object.box[0] + scene_object.box[2]) / 2,
            (scene_object.box[1] + scene_object.box[3]) / 2,
        )
        if min(abs(x - SIDE / 2), abs(y - SIDE / 2)) >= 8:
            answer = f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"
            asked.append(
                Question(
                    "place", f"Where is the {scene_object.name}?", answer, scene_object.name, scene_object.box
                )
            )
    return asked


def alone_in_its_cells(scene: Scene, box: Box, cell: int = 32) -> bool:
    """True if no image token (a cell of 32 pixels) that `box` touches is touched by another thing."""
    x1, y1, x2, y2 = box
    cells = (x1 // cell * cell, y1 // cell * cell, -(-x2 // cell) * cell, -(-y2 // cell) * cell)
    return not any(touches(cells, t.box) for t in scene.objects if t.box != box)
