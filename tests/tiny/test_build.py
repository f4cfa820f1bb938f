"""The build of the embedded model: its tokenizer, its fast paths against slow ones, and how it resumes."""

import random
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from programs import new_folder, start_early
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from files.disk import sha256
from files.errors import UserError
from models import make_policy
from policy import collate
from prompts import FAMILIES, Processor, encode
from tiny import architecture, scenes
from tiny import build as tiny_build
from tiny.scenes import Scene, SceneObject

ROOT = Path(__file__).parents[2]
STEPS = 2  # in each stage of the builds of these tests; BUILDS has them too


@pytest.fixture(scope="module")
def tokenizer():
    return architecture.build_tokenizer()


@pytest.fixture
def build(tmp_path):
    """An untrained build with three examples; `images` has each one's image and crops."""
    build = tiny_build.Build(tmp_path / "model", 0, STEPS)
    rng, examples, build.images = random.Random("examples"), [], []
    for _ in range(3):
        scene, image = tiny_build.random_scene(rng, 3, suppressed=0.0)
        shown, crops = zip(*[tiny_build.random_crop(rng, scene) for _ in range(2)])
        with torch.no_grad():
            (tokens,) = tiny_build.compute_image_tokens(build.model.model.visual, [image])
            crop_tokens = tiny_build.compute_image_tokens(build.model.model.visual, crops)
        examples.append((scene, tokens, tuple(zip(shown, crop_tokens))))
        build.images.append((image, crops))
    build.examples = {True: examples, False: examples}
    return build


# ---------------------------------------------------------------- the tokenizer


def test_any_text_survives_and_none_becomes_a_special_token(tokenizer):
    rng = random.Random("texts")
    plain = "az Z09\n\t\r<>|[], .é„😀"
    anywhere = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(rng.choices(plain, k=10) + rng.choices(anywhere, k=10)) for _ in range(50)]
    texts += ["".join(rng.choices([*plain, *anywhere[:3000]], k=20)) for _ in range(50)]
    texts += ["", " ", "[12, 345, 67, 890]", "[-1.5,2 ,  3]", "Find Image 2 in Image 1."]
    texts += ["<think> red star</think><answer> star</answer>", "<|im_stop|>", "endoftext", "<pad>"]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert not set(ids) & set(tokenizer.all_special_ids), text


def test_tags_words_and_digits_are_single_tokens(tokenizer):
    words = [f" {word}" for word in (*scenes.COLORS, *scenes.SHAPES, "top", "bottom", "left", "right")]
    for piece in ("<think>", "</think>", "<answer>", "</answer>", *words):
        assert len(tokenizer(piece).input_ids) == 1, piece
    assert len(tokenizer("0123456789").input_ids) == 10
    assert len(tokenizer("[12, 345]").input_ids) == len(["[", "1", "2", ", ", "3", "4", "5", "]"])
    assert len({ids[0] for ids in tokenizer(words).input_ids}) == len(words)


# ---------------------------------------------------------------- what the stages are shown


def test_image_tokens_are_those_of_image_processor_and_vision_tower(build):
    visual, processor = build.model.model.visual, architecture.build_image_processor()
    for images in ([image for image, _ in build.images], build.images[0][1]):
        inputs = processor(images, return_tensors="pt")
        with torch.no_grad():
            expected = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            tokens = tiny_build.compute_image_tokens(visual, images).flatten(0, 1)
        assert (expected - tokens).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["words", "boxes"])
@torch.no_grad()
def test_a_turn_in_a_row_is_the_same_turn_alone(build, name, monkeypatch):
    """Positions and loss of the packed turns, against prompts.encode and the whole model, turn by turn."""
    turns, inputs, draw_turn = [], {}, tiny_build.draw_turn
    examples = build.examples[True]

    def recorded_draw_turn(rng, example, *rest):
        turns.append((examples.index(example), *draw_turn(rng, example, *rest)))
        return turns[-1][1:]

    monkeypatch.setattr(tiny_build, "draw_turn", recorded_draw_turn)
    with build.model.register_forward_pre_hook(lambda *call: inputs.update(call[2]), with_kwargs=True):
        metrics = build.turns_loss(random.Random("turns"), tiny_build.STAGES[name])[1]
    assert {len(images) for _, _, images, *_ in turns} == {1, 2}
    assert len(turns) == 8 * tiny_build.TURNS
    processor = Processor(build.tokenizer, architecture.build_image_processor(), FAMILIES["tiny"], "")
    policy = make_policy(build.model, processor, torch.device("cpu"))
    total, count = 0.0, 0
    for i, (index, text, images, *_) in enumerate(turns):
        image, crops = build.images[index]
        crop_ids = [id(tokens) for _, tokens in examples[index][2]]
        crop = crops[crop_ids.index(id(images[1]))] if len(images) == 2 else None
        question, answer = text.split("<|im_end|>\n<|im_start|>assistant\n")
        prompt = encode(processor, question.rpartition("<|vision_end|>")[2], image, crop=crop)
        ids = torch.cat([prompt.input_ids, build.tokenizer(answer, return_tensors="pt").input_ids[0]])
        assert ids.tolist() == build.tokenizer(text).input_ids
        P, T = len(prompt.input_ids), len(ids) - len(prompt.input_ids)
        vision = {"pixel_values": torch.cat([part.pixel_values for part in prompt.images])}
        vision |= {"image_grid_thw": torch.stack([part.grid_thw for part in prompt.images])}
        types = F.pad(prompt.mm_token_type_ids, (0, T))
        logits = build.model(input_ids=ids[None], mm_token_type_ids=types[None], **vision).logits
        total += F.cross_entropy(logits[0, P - 1 : -1], ids[P:], reduction="sum").item()
        count += T
        batch = collate(policy, [prompt])
        answer_positions = (batch.completion_start + torch.arange(T)).expand(3, -1)
        position_ids = torch.cat([batch.position_ids[:, 0], answer_positions], 1)  # [3, P + T]
        if i % tiny_build.TURNS == 0:
            column = 0
        else:
            position_ids = position_ids[:, len(build.tokenizer(tiny_build.SCENE).input_ids) :]
        row = inputs["position_ids"][:, i // tiny_build.TURNS]
        assert torch.equal(row[:, column : column + position_ids.shape[1]], position_ids)
        column += position_ids.shape[1]
    assert abs(metrics["loss"] - total / count) < 1e-4


@pytest.mark.parametrize("name", ["words", "boxes"])
@torch.no_grad()
def test_boxes_are_read_off_the_last_word_of_a_name(build, name, monkeypatch):
    """Of the name of everything that a question asks about, and of no other token."""
    turns, read, draw_turn, box_loss = [], {}, tiny_build.draw_turn, build.box_loss

    def recorded_draw_turn(*args):
        turns.append(draw_turn(*args))
        return turns[-1]

    def recorded_box_loss(tokens, objects):
        read.update(tokens=tokens, objects=objects)
        return box_loss(tokens, objects)

    monkeypatch.setattr(tiny_build, "draw_turn", recorded_draw_turn)
    monkeypatch.setattr(build, "box_loss", recorded_box_loss)
    record = lambda module, args, kwargs, output: read.update(kwargs, output=output)  # noqa: E731
    with build.model.register_forward_hook(record, with_kwargs=True):
        loss, metrics = build.turns_loss(random.Random("turns"), tiny_build.STAGES[name])
    added = 0.1 * box_loss(read["tokens"], read["objects"])[0].item()
    assert loss.item() == pytest.approx(metrics["loss"] + added)
    named = [turn for turn in turns if turn[2]]
    assert read["objects"] == [turn[3] for turn in named] and len(read["tokens"]) == len(named) > 30
    for text, _, words, scene_object in named:
        thought = text.partition("<think> ")[2]
        name = scene_object.description if words > 2 else scene_object.name
        assert thought.startswith((f"{name}<", f"{name}[")) and len(name.split()) == words
    assert all("What is Image 2?" in text for text, _, words, _ in turns if not words)
    # The tokens are those whose input is the last word of each name.
    hidden, embeds = read["output"].hidden_states[-1].flatten(0, 1), read["inputs_embeds"].flatten(0, 1)
    rows = [int((hidden == token).all(-1).nonzero()[0]) for token in read["tokens"]]
    last = [o.name.split()[1] if words == 2 else "inside" for _, _, words, o in named]
    ids = build.tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in last])
    assert torch.equal(embeds[rows], build.model.get_input_embeddings().weight[ids])


@torch.no_grad()
def test_a_step_whose_scenes_hold_tiny_objects_alone_has_the_loss_of_its_replies(build):
    """Then every turn is to name a crop, and there is no box to read."""
    for scene, _, _ in build.examples[True]:
        scene.objects = [SceneObject("red", "star", "blue", (10, 10, 30, 30))]
    loss, metrics = build.turns_loss(random.Random("turns"), tiny_build.STAGES["words"])
    assert loss.item() == metrics["loss"] > 0 and metrics["pixels"] == 0


def test_a_cell_shows_the_object_that_covers_most_of_it():
    large = SceneObject("red", "star", "blue", (0, 0, 100, 100))
    tiny = SceneObject("blue", "circle", "red", (104, 90, 118, 104))
    corner = SceneObject("green", "cross", "red", (249, 25, 263, 39))
    scene = Scene([large, tiny], (40, 40, 40))
    found = {cell: tiny_build.object_in_cell(scene, cell) for cell in range(64)}
    # Of the cells beside it the large one fills an eighth. The tiny one has parts of itself in two.
    whole = {row * 8 + column: large for row in range(3) for column in range(3)}
    assert {cell: o for cell, o in found.items() if o} == whole | {19: tiny, 27: tiny}
    assert tiny_build.object_in_cell(Scene([corner], (0, 0, 0)), 7) is corner


def test_the_text_model_never_finds_a_tiny_object_nor_searches_a_crop():
    """So it is weak where its training is thin: the only turn about a tiny object is to name its crop."""
    rng, kinds, num_tiny = random.Random(0), dict(shape=1, detail=1, place=1, find=1, told=1, name=1), 0
    num_told = 0
    for _ in range(300):
        scene, _ = tiny_build.random_scene(rng, 6, suppressed=0.0)
        crops = [(rng.choice(scene.objects), torch.zeros(4, 1)) for _ in range(2)]
        num_tiny += sum(o.size == "tiny" for o in scene.objects)
        text, images, words, named = tiny_build.draw_turn(rng, (scene, torch.zeros(64, 1), crops), kinds)
        question, _, reply = text.rpartition("<|vision_end|>")[2].partition("<|im_end|>")
        assert "Find Image 2 in" not in question
        if question == "What is Image 2?":
            assert words == 0
            continue
        assert words and named.size != "tiny", "its box is read off its name"
        asked = [o for o in scene.objects if o.name in question or f" {o.color} object" in question]
        assert any(o.size != "tiny" for o in asked), question
        if question.startswith("Find"):
            boxes = {tiny_build.FRAME.to_text(o.box): o for o in scene.objects}
            target = boxes[reply.partition("<answer>")[2].partition("</answer>")[0]]
            assert target.size != "tiny" and len(images) == 1 + (" in Image 1" in question)
            if question.startswith("Find Image 2, the "):
                num_told += 1
                assert any(images[1] is tokens and o is target for o, tokens in crops)
            assert scene.is_unique(target) or target.description in question, "a twin needs its detail"
    assert num_tiny > 300 and num_told > 10


def test_no_stage_shrinks_the_range_of_counts():
    """No stage is without scenes of few objects or of many, and a scene has any number of them."""
    for stage in tiny_build.STAGES.values():
        counts = {tiny_build.draw_count(random.Random(i), stage.few_share) for i in range(4000)}
        assert counts == set(range(1, scenes.MAX_OBJECTS + 1))


# ---------------------------------------------------------------- the real build, small

# Builds into a folder by processes that kill themselves with SIGKILL, each after so many optimizer steps
# (0: never).
BUILDS = """
import os, signal, sys
from itertools import count
from torch.optim.optimizer import register_optimizer_step_post_hook
from tiny import build

build.SAVE_EVERY = 1
for folder, kills in (argument.split("=") for argument in sys.argv[1:]):
    for last_step in map(int, kills.split(",")):
        if os.fork() == 0:
            done = count(1)
            kill = lambda *_: next(done) == last_step and os.kill(os.getpid(), signal.SIGKILL)
            register_optimizer_step_post_hook(kill)
            sys.argv = ["build.py", "--out", folder, "--steps-per-stage", "2"]
            build.main()
            os._exit(0)
        print("ended with", os.waitstatus_to_exitcode(os.wait()[1]))
"""


EARLY = {}


def start_early_programs() -> None:
    EARLY["folder"] = folder = new_folder()
    arguments = ("--out", folder / "model", "--seed", 0, "--steps-per-stage", STEPS)
    EARLY["finished"] = start_early(*arguments, code="from tiny import build; build.main()")
    # Each kill comes between the last step of a stage and the state that would have it.
    EARLY["builds"] = start_early(f"{folder}/again=0", f"{folder}/killed=2,3,3,0", code=BUILDS)


@pytest.fixture(scope="module")
def finished() -> tuple[Path, str]:
    """The folder of a build that nothing interrupted, and what it printed."""
    return EARLY["folder"] / "model", EARLY["finished"].result().stdout


def test_a_build_repeats_to_the_bit_also_when_it_is_killed_in_every_stage(finished):
    printed = EARLY["builds"].result().stdout
    ends = [int(line.removeprefix("ended with ")) for line in printed.splitlines() if "ended" in line]
    assert ends == [0, *[-signal.SIGKILL] * 3, 0]
    names = ("model", "again", "killed")
    hashes = {sha256(EARLY["folder"] / name / "model.safetensors") for name in names}
    assert len(hashes) == 1 and f"SHA-256 of model.safetensors: {hashes.pop()}\n" in finished[1]


def test_a_build_is_an_ordinary_folder_that_tells_how_it_was_made(finished):
    folder, printed = finished
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.locus_family == "tiny" and not model.generation_config.do_sample
    assert model.lm_head.weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == architecture.CHAT_TEMPLATE
    assert AutoImageProcessor.from_pretrained(folder).merge_size == 2
    made = model.config.locus_build
    assert (made["seed"], made["threads"], set(made["versions"])) == (0, 1, {"torch", "transformers"})
    assert made["steps"] == dict.fromkeys(tiny_build.STAGES, STEPS)
    assert made["sha256"] == sha256(folder / "model.safetensors")
    assert made["accuracy"].keys() == tiny_build.STAGES.keys()
    cells = {*scenes.KINDS} | {f"{kind}_{size}" for kind in scenes.KINDS for size in scenes.SIDES}
    for name in ("words", "boxes"):
        assert set(made["accuracy"][name]) == {"few", "crowds"}
        assert all(set(part) == cells for part in made["accuracy"][name].values())
        assert f"{name}, {STEPS} steps: " in printed


def test_a_finished_build_is_not_trained_again(finished, monkeypatch):
    folder, before = finished[0], sha256(finished[0] / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name in ("vision_loss", "turns_loss", "save"):
        monkeypatch.setattr(tiny_build.Build, name, lambda *_, **__: pytest.fail("it trains"))
    tiny_build.run_build(tiny_build.Build(folder, 0, STEPS), folder)
    assert sha256(folder / "model.safetensors") == before


@pytest.mark.parametrize(("seed", "steps"), [(1, STEPS), (0, STEPS + 1), (0, None)])
def test_other_settings_are_refused_on_resume(seed, steps, finished):
    with pytest.raises(UserError, match="state.pt has (seed|steps) .*, not .*: give the same"):
        tiny_build.Build(finished[0], seed, steps)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--out", str(ROOT / "tiny" / "other")], "is inside"),
        (["--out", str(ROOT)], "is inside"),
        (["--out", "X", "--steps-per-stage", "0"], "--steps-per-stage: 0"),
        (["--out", "X", "--steps-per-stage", "-3"], "--steps-per-stage: -3"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["build.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        tiny_build.main()
    assert stopped.value.code == 2 and problem in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and not (ROOT / "tiny" / "other-build").exists()
