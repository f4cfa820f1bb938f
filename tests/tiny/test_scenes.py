"""Scenes: what is drawn, which questions are asked, and that each question has its one answer."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from tiny import scenes
from tiny.scenes import COLORS, PLACES, SHAPES, SIDE, Scene, SceneObject


def layouts(count: int, seed: str, low: int = 1, high: int = 16):
    for i in range(count):
        rng = random.Random(f"{seed}/{i}")
        yield scenes.draw_layout(rng, rng.randint(low, high))


def test_objects_are_distinct_apart_and_inside():
    for scene in layouts(150, "apart"):
        assert len({scene_object.name for scene_object in scene.objects}) == len(scene.objects)
        for scene_object in scene.objects:
            x1, y1, x2, y2 = scene_object.box
            assert 0 <= x1 < x2 <= SIDE and 0 <= y1 < y2 <= SIDE and x2 - x1 == y2 - y1
        for a, b in combinations(scene.objects, 2):
            across = max(a.box[0], b.box[0]) - min(a.box[2], b.box[2])
            down = max(a.box[1], b.box[1]) - min(a.box[3], b.box[3])
            assert max(across, down) >= scenes.GAP


@pytest.mark.parametrize("count", [1, 8, 16])
def test_a_layout_has_the_requested_number_of_objects(count):
    assert len(scenes.draw_layout(random.Random(count), count).objects) == count


def test_most_objects_are_tiny():
    sides = [o.box[2] - o.box[0] for scene in layouts(300, "tiny") for o in scene.objects]
    tiny = [side**2 / SIDE**2 < 0.01 for side in sides]
    assert abs(np.mean(tiny) - scenes.TINY_SHARE) < 3 * (0.21 / len(tiny)) ** 0.5
    assert all(is_tiny or 0.01 <= side**2 / SIDE**2 <= 0.05 for is_tiny, side in zip(tiny, sides))


def test_every_question_has_exactly_its_answer():
    kinds = Counter()
    for scene in layouts(200, "questions"):
        for question in scenes.questions(scene):
            kinds[question.kind] += 1
            words = question.text.rstrip("?").split()
            if question.text.startswith("What shape is the "):
                (scene_object,) = [o for o in scene.objects if o.color == words[4]]
                answer = scene_object.shape
            elif question.text.startswith("What color is the "):
                (scene_object,) = [o for o in scene.objects if o.shape == words[4]]
                answer = scene_object.color
            else:
                assert question.text.startswith("Where is the ")
                (scene_object,) = [o for o in scene.objects if (o.color, o.shape) == tuple(words[3:])]
                x1, y1, x2, y2 = scene_object.box
                x, y = (x1 + x2) / 2, (y1 + y2) / 2
                assert abs(x - SIDE / 2) >= 8 and abs(y - SIDE / 2) >= 8
                answer = ("top " if y < SIDE / 2 else "bottom ") + ("left" if x < SIDE / 2 else "right")
            assert question.answer == answer
            assert (question.name, question.box) == (scene_object.name, scene_object.box)
    assert kinds["attribute"] > 200 and kinds["place"] > 200


def test_no_question_is_missing():
    a, b, c = (SceneObject("red", "star", (0, 0, 16, 16)), SceneObject("red", "ring", (90, 0, 106, 16)),
               SceneObject("blue", "ring", (100, 100, 142, 142)))  # fmt: skip
    found = {(q.text, q.answer) for q in scenes.questions(Scene([a, b, c], (0, 0, 0)))}
    assert found == {
        ("What color is the star?", "red"),
        ("What shape is the blue thing?", "ring"),
        ("Where is the red star?", "top left"),
        ("Where is the blue ring?", "bottom right"),
    }


def test_places_are_balanced():
    answers = [
        q.answer
        for scene in layouts(400, "places", 8, 12)
        for q in scenes.questions(scene)
        if q.kind == "place"
    ]
    counts = Counter(answers)
    assert set(counts) == set(PLACES)
    expected = len(answers) / 4
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 16.3  # χ², 3 degrees, p = 0.001


def test_colours_and_shapes_are_balanced():
    objects = [o for scene in layouts(400, "kinds") for o in scene.objects]
    for names, counts in (
        (COLORS, Counter(o.color for o in objects)),
        (SHAPES, Counter(o.shape for o in objects)),
    ):
        assert min(counts[name] for name in names) > 0.8 * len(objects) / len(names)


def test_a_seed_always_gives_the_same_image():
    for i in range(5):
        first, again = (scenes.draw_layout(random.Random(i), 12) for _ in range(2))
        assert first == again
        assert scenes.render(first).tobytes() == scenes.render(again).tobytes()
        assert scenes.render(first).tobytes() == scenes.render(first).tobytes()
    assert scenes.draw_layout(random.Random(0), 12) != scenes.draw_layout(random.Random(1), 12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_an_object_is_drawn_inside_its_box_in_its_colour(color, shape):
    scene_object = SceneObject(color, shape, (40, 60, 56, 76))
    image = np.asarray(scenes.render(Scene([scene_object], (20, 30, 40)))).astype(int)
    assert image.shape == (SIDE, SIDE, 3)
    changed = (image != (20, 30, 40)).any(-1)
    assert changed[60:76, 40:56].sum() == changed.sum() > 0.2 * 16 * 16
    assert (image == COLORS[color]).all(-1).sum() > 20
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert abs(rows[0] - 60) <= 1 and abs(rows[-1] - 75) <= 1  # the box is tight
    assert abs(columns[0] - 40) <= 1 and abs(columns[-1] - 55) <= 1


def test_shapes_differ():
    masks = [np.asarray(scenes.shape_mask(shape, 16)).astype(int) for shape in SHAPES]
    for a, b in combinations(masks, 2):
        assert np.abs(a - b).mean() > 20


@pytest.mark.parametrize(
    "box", [(10, 20, 50, 60), (0, 0, 192, 192), (0, 180, 7, 192), (10.4, 20.6, 49.5, 60.2)]
)
def test_keep_only_is_black_outside_and_equal_inside(box):
    image = scenes.render(scenes.draw_layout(random.Random(3), 16))
    before = image.tobytes()
    kept, full = np.asarray(scenes.keep_only(image, box)), np.asarray(image)
    x1, y1, x2, y2 = (round(v) for v in box)
    assert (kept[y1:y2, x1:x2] == full[y1:y2, x1:x2]).all()
    outside = np.ones(full.shape[:2], bool)
    outside[y1:y2, x1:x2] = False
    assert (kept[outside] == 0).all()
    assert image.tobytes() == before


def test_alone_in_its_cells_against_brute_force():
    counts = Counter()
    for scene in layouts(60, "alone", 4, 16):
        for scene_object in scene.objects:
            cells = cells_of(scene_object.box)
            alone = not any(
                cells & cells_of(other.box) for other in scene.objects if other is not scene_object
            )
            assert scenes.alone_in_its_cells(scene, scene_object.box) == alone
            counts[alone] += 1
    assert min(counts[True], counts[False]) > 20


def cells_of(box) -> set[tuple[int, int]]:
    """The cells of 32 pixels in which the box has a pixel, one pixel at a time."""
    x1, y1, x2, y2 = box
    return {(x // 32, y // 32) for x in range(x1, x2) for y in range(y1, y2)}


def test_touching_edges_do_not_overlap():
    assert not scenes.touches((0, 0, 10, 10), (10, 0, 20, 10))
    assert scenes.touches((0, 0, 10, 10), (9, 9, 20, 20))
    assert scenes.touches((0, 0, 10, 10), (11, 0, 20, 10), gap=2)
    assert not scenes.touches((0, 0, 10, 10), (12, 0, 20, 10), gap=2)
