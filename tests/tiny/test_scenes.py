"""Scenes: what is drawn, which questions are asked, and that each question has its one answer."""

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from data import size_class
from tiny import scenes
from tiny.scenes import COLORS, PLACES, SHAPES, SIDE, SIDES, Scene, SceneObject


def layouts(count: int, seed: str, low: int = 1, high: int = 12, twins: bool | None = None):
    for i in range(count):
        rng = random.Random(f"{seed}/{i}")
        yield scenes.draw_layout(rng, rng.randint(low, high), twins)


def test_objects_are_apart_and_inside():
    for scene in layouts(150, "apart"):
        for scene_object in scene.objects:
            x1, y1, x2, y2 = scene_object.box
            assert 0 <= x1 < x2 <= SIDE and 0 <= y1 < y2 <= SIDE and x2 - x1 == y2 - y1
            assert scene_object.core != scene_object.color, "a core of the same colour could not be seen"
        for a, b in combinations(scene.objects, 2):
            across = max(a.box[0], b.box[0]) - min(a.box[2], b.box[2])
            down = max(a.box[1], b.box[1]) - min(a.box[3], b.box[3])
            assert max(across, down) >= scenes.GAP


@pytest.mark.parametrize("twins", [True, False])
@pytest.mark.parametrize("count", [1, 2, 8, 12])
def test_a_layout_has_the_requested_number_of_objects(count, twins):
    assert len(scenes.draw_layout(random.Random(count), count, twins).objects) == count


def test_twins_differ_in_their_core_and_place_alone():
    for scene in layouts(100, "twins", 2, twins=True):
        first, second = (o for o in scene.objects if not scene.is_unique(o))
        assert replace(first, core=second.core, box=second.box) == second
        assert first.side == second.side and first.core != second.core
        assert first.name == second.name and first.description != second.description


def test_scenes_without_twins_have_no_name_twice():
    for scene in layouts(100, "no twins", twins=False):
        assert all(map(scene.is_unique, scene.objects))


def test_half_of_the_scenes_of_two_objects_and_more_have_twins():
    drawn = [not all(map(scene.is_unique, scene.objects)) for scene in layouts(600, "share", 2)]
    assert abs(np.mean(drawn) - scenes.TWIN_SHARE) < 3 * (0.25 / 600) ** 0.5


def test_the_size_of_an_object_is_the_papers_class_of_its_box():
    objects = [o for scene in layouts(300, "sizes", 8) for o in scene.objects]
    for scene_object in objects:
        assert scene_object.size == size_class(scene_object.box, SIDE, SIDE)
        assert SIDES[scene_object.size][0] <= scene_object.side <= SIDES[scene_object.size][1]
    counts = Counter(o.size for o in objects)
    assert min(counts[size] for size in SIDES) > 50
    tiny_share = counts["tiny"] / (counts["tiny"] + counts["small"])
    assert abs(tiny_share - scenes.TINY_SHARE) < 0.06  # twins have one size, so 3 standard errors are more


def test_every_question_has_exactly_its_answer():
    kinds = Counter()
    for scene in layouts(200, "questions"):
        for question in scenes.questions(scene):
            kinds[question.kind] += 1
            words = question.text.rstrip("?").split()
            if question.kind == "shape":
                assert words[:4] == ["What", "shape", "is", "the"] and words[5:] == ["object"]
                (scene_object,) = [o for o in scene.objects if o.color == words[4]]
                answer = scene_object.shape
            else:
                (scene_object,) = [o for o in scene.objects if o.name == " ".join(words[-2:])]
            if question.kind == "detail":
                assert words[:4] == ["What", "is", "inside", "the"]
                answer = scene_object.core
            elif question.kind == "place":
                assert words[:3] == ["Where", "is", "the"]
                x1, y1, x2, y2 = scene_object.box
                x, y = (x1 + x2) / 2, (y1 + y2) / 2
                assert abs(x - SIDE / 2) >= 8 and abs(y - SIDE / 2) >= 8
                answer = ("top " if y < SIDE / 2 else "bottom ") + ("left" if x < SIDE / 2 else "right")
            assert (question.answer, question.evidence) == (answer, scene_object)
            assert question.answer not in question.text, "the question says the answer"
    assert set(kinds) == set(scenes.KINDS) and min(kinds.values()) > 200


def test_no_question_is_missing():
    a, twin, b = (
        SceneObject("red", "star", "blue", (0, 0, 16, 16)),
        SceneObject("red", "star", "white", (90, 0, 106, 16)),
        SceneObject("blue", "circle", "red", (150, 150, 192, 192)),
    )
    about_b = {
        ("What shape is the blue object?", "circle"),
        ("What is inside the blue circle?", "red"),
        ("Where is the blue circle?", "bottom right"),
    }
    about_a = {
        ("What shape is the red object?", "star"),
        ("What is inside the red star?", "blue"),
        ("Where is the red star?", "top left"),
    }
    for objects, expected in (([a, b], about_a | about_b), ([a, twin, b], about_b)):
        found = {(q.text, q.answer) for q in scenes.questions(Scene(objects, (0, 0, 0)))}
        assert found == expected


def test_places_are_balanced():
    drawn = [q for scene in layouts(400, "places", 8) for q in scenes.questions(scene) if q.kind == "place"]
    for size in ("tiny", "small"):  # the middle of the image has no place for a large object beside others
        counts = Counter(q.answer for q in drawn if q.evidence.size == size)
        assert set(counts) == set(PLACES)
        expected = counts.total() / 4
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < 16.3  # χ², 3 degrees, p = 0.001


def test_colours_and_shapes_are_balanced():
    objects = [o for scene in layouts(400, "kinds") for o in scene.objects]
    for names, attribute in ((COLORS, "color"), (SHAPES, "shape"), (COLORS, "core")):
        counts = Counter(getattr(o, attribute) for o in objects)
        assert min(counts[name] for name in names) > 0.8 * len(objects) / len(names)


def test_a_seed_always_gives_the_same_image():
    for i in range(5):
        first, again = (scenes.draw_layout(random.Random(i), 12) for _ in range(2))
        assert first == again
        assert scenes.render(first).tobytes() == scenes.render(again).tobytes()
        assert scenes.render(first).tobytes() == scenes.render(first).tobytes()
    assert scenes.draw_layout(random.Random(0), 12) != scenes.draw_layout(random.Random(1), 12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [14, 25, 56])
def test_an_object_is_drawn_inside_its_box_in_its_colours(side, shape):
    scene_object = SceneObject("red", shape, "blue", (40, 60, 40 + side, 60 + side))
    image = np.asarray(scenes.render(Scene([scene_object], (20, 30, 40)))).astype(int)
    assert image.shape == (SIDE, SIDE, 3)
    changed = (image != (20, 30, 40)).any(-1)
    assert changed[60 : 60 + side, 40 : 40 + side].sum() == changed.sum() > 0.2 * side**2
    assert (image == COLORS["red"]).all(-1).sum() > 0.05 * side**2
    assert (image == COLORS["blue"]).all(-1).sum() > 0.04 * side**2, "the core can be seen"
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert abs(rows[0] - 60) <= 1 and abs(rows[-1] - (59 + side)) <= 1  # the box is tight
    assert abs(columns[0] - 40) <= 1 and abs(columns[-1] - (39 + side)) <= 1


def test_shapes_differ():
    masks = [np.asarray(scenes.shape_mask(shape, 14)).astype(int) for shape in SHAPES]
    for a, b in combinations(masks, 2):
        assert np.abs(a - b).mean() > 20


@pytest.mark.parametrize(
    "box", [(10, 20, 50, 60), (0, 0, 256, 256), (0, 180, 7, 256), (10.4, 20.6, 49.5, 60.2)]
)
def test_keep_only_is_black_outside_and_equal_inside(box):
    image = scenes.render(scenes.draw_layout(random.Random(3), 12))
    before = image.tobytes()
    kept, full = np.asarray(scenes.keep_only(image, box)), np.asarray(image)
    x1, y1, x2, y2 = (round(v) for v in box)
    assert (kept[y1:y2, x1:x2] == full[y1:y2, x1:x2]).all()
    outside = np.ones(full.shape[:2], bool)
    outside[y1:y2, x1:x2] = False
    assert (kept[outside] == 0).all()
    assert image.tobytes() == before


def test_image_tokens_of_an_object_against_brute_force():
    counts = Counter()
    for scene in layouts(60, "tokens", 4):
        for scene_object in scene.objects:
            number = scenes.num_cells(scene_object.box)
            assert number == len(cells_of(scene_object.box))
            counts[number] += 1
    assert {1, 2, 4, 6, 9, 12} <= counts.keys()


def cells_of(box) -> set[tuple[int, int]]:
    """The cells of 32 pixels in which the box has a pixel, one pixel at a time."""
    x1, y1, x2, y2 = box
    return {(x // 32, y // 32) for x in range(x1, x2) for y in range(y1, y2)}


def test_what_a_window_shows_of_a_box():
    assert scenes.visible_area((0, 0, 10, 10), (5, 5, 20, 8)) == 15
    assert scenes.visible_fraction((0, 0, 10, 10), (5, 5, 20, 20)) == 0.25
    assert scenes.visible_fraction((0, 0, 10, 10), (10, 0, 20, 20)) == 0


def test_touching_edges_do_not_overlap():
    assert not scenes.touches((0, 0, 10, 10), (10, 0, 20, 10))
    assert scenes.touches((0, 0, 10, 10), (9, 9, 20, 20))
    assert scenes.touches((0, 0, 10, 10), (11, 0, 20, 10), gap=2)
    assert not scenes.touches((0, 0, 10, 10), (12, 0, 20, 10), gap=2)
