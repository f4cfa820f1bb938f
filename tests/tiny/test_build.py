"""The build of the embedded model: its tokenizer, its fast paths against slow ones, and how it resumes."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from models import make_policy
from policy import collate
from prompts import FAMILIES, Processor, encode
from tiny import architecture, scenes
from tiny import build as tiny_build


@pytest.fixture(scope="module")
def tokenizer():
    return architecture.build_tokenizer()


@pytest.fixture
def build(tmp_path):
    """An untrained build on the CPU with three examples, and `images`: each one's image and crops."""
    build = tiny_build.Build(tmp_path / "model", 1.0, 0)
    build.model.cpu()
    build.heads.cpu()
    rng = random.Random("examples")
    build.examples, build.images = [], []
    for _ in range(3):
        scene, image = tiny_build.random_scene(rng, 3, suppressed=0.0)
        shown = [(scene, scene_object) for scene_object in rng.choices(scene.objects, k=2)]
        crops = [tiny_build.random_crop(rng, *pair) for pair in shown]
        with torch.no_grad():
            tokens = tiny_build.compute_image_tokens(build.model.model.visual, [image])[0]
            crop_tokens = tiny_build.compute_image_tokens(build.model.model.visual, crops)
        build.examples.append((scene, tokens, list(zip(shown, crop_tokens))))
        build.images.append((image, crops))
    return build


def test_any_text_survives_and_none_becomes_a_special_token(tokenizer):
    rng = random.Random("texts")
    plain = "az Z09\n\t\r<>|[], .é„😀"
    anywhere = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(rng.choices(plain, k=10) + rng.choices(anywhere, k=10)) for _ in range(50)]
    texts += ["".join(rng.choices([*plain, *anywhere[:3000]], k=20)) for _ in range(50)]
    texts += [
        "",
        " ",
        "[12, 345, 67, 890]",
        "[-1.5,2 ,  3]",
        "<think> red star</think><answer> star</answer>",
    ]
    texts += ["<|im_stop|>", "endoftext", "<pad>", "Find Image 2 in Image 1."]
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
    assert len(set(tokenizer(words).input_ids[i][0] for i in range(len(words)))) == len(words)


def test_image_tokens_are_those_of_image_processor_and_vision_tower(build):
    visual, processor = build.model.model.visual, architecture.build_image_processor()
    for images in ([image for image, _ in build.images], build.images[0][1]):
        inputs = processor(images, return_tensors="pt")
        with torch.no_grad():
            expected = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            tokens = tiny_build.compute_image_tokens(visual, images).flatten(0, 1)
        assert (expected - tokens).abs().max() < 1e-5


@pytest.mark.parametrize("settings", [dict(step=0, words_first=1), dict(step=0, crop_share=1 / 3)])
@torch.no_grad()
def test_a_turn_in_a_row_is_the_same_turn_alone(build, settings, monkeypatch):
    """Positions and loss of the packed turns, against prompts.encode and the whole model, turn by turn."""
    turns, inputs, draw_turn = [], {}, tiny_build.draw_turn

    def recorded_draw_turn(rng, example, *rest):
        turns.append((build.examples.index(example), *draw_turn(rng, example, *rest)))
        return turns[-1][1:]

    monkeypatch.setattr(tiny_build, "draw_turn", recorded_draw_turn)
    with build.model.register_forward_pre_hook(lambda *call: inputs.update(call[2]), with_kwargs=True):
        loss, _ = build.turns_loss(random.Random("turns"), **settings)
    assert {len(images) for *_, images in turns} == {1, 2}
    assert len(turns) == tiny_build.TURNS * (16 if "words_first" in settings else 8)
    image_processor = architecture.build_image_processor()
    processor = Processor(build.tokenizer, image_processor, FAMILIES["tiny"], "<|image_pad|>")
    policy = make_policy(build.model, processor, torch.device("cpu"))
    total, count = 0.0, 0
    for i, (index, text, images) in enumerate(turns):
        image, crops = build.images[index]
        crop_ids = [id(tokens) for _, tokens in build.examples[index][2]]
        crop = crops[crop_ids.index(id(images[1]))] if len(images) == 2 else None
        question, answer = text.split("<|im_end|>\n<|im_start|>assistant\n")
        prompt = encode(processor, question.rpartition("<|vision_end|>")[2], image, crop=crop)
        ids = torch.cat([prompt.input_ids, build.tokenizer(answer, return_tensors="pt").input_ids[0]])
        assert ids.tolist() == build.tokenizer(text).input_ids
        P, T = len(prompt.input_ids), len(ids) - len(prompt.input_ids)
        vision = {"pixel_values": torch.cat([part.pixel_values for part in prompt.images])}
        vision |= {"image_grid_thw": torch.stack([part.grid_thw for part in prompt.images])}
        types = F.pad(prompt.mm_token_type_ids, (0, T))
        logits = build.model(input_ids=ids[None], mm_token_type_ids=types[None], **vision).logits[
            0, P - 1 : -1
        ]
        total += F.cross_entropy(logits, ids[P:], reduction="sum").item()
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
    assert abs(loss.item() - total / count) < 1e-4


def test_of_two_centres_in_a_cell_the_nearer_counts(build, monkeypatch):
    """The box of the object that loses its cell changes only the image, which is held fixed here."""
    near = scenes.SceneObject("red", "star", (8, 8, 24, 24))
    far = scenes.SceneObject("blue", "ring", (24, 24, 38, 38))
    image = scenes.render(scenes.Scene([near, far], (40, 40, 40)))
    monkeypatch.setattr(tiny_build, "random_crop", lambda *_: image.crop((0, 0, 64, 64)))
    losses = []
    for objects in ([near, far], [far, near], [near]):
        scene = scenes.Scene(objects, (40, 40, 40))
        monkeypatch.setattr(tiny_build, "random_scene", lambda *_, scene=scene, **__: (scene, image))
        rng = SimpleNamespace(choice=lambda _: near, random=lambda: 0.5, randint=lambda *_: 3)
        losses.append(build.vision_loss(rng)[0].item())
    assert losses[0] == losses[1] == losses[2]


def test_queries_start_as_copies_of_the_keys_once(build, monkeypatch):
    monkeypatch.setattr(tiny_build, "EXAMPLES", 100)
    attention = build.model.model.language_model.layers[1].self_attn
    build.start_language()
    build.draw_examples((1, 1, 2))
    assert len(build.examples) == 100 and {len(scene.objects) for scene, *_ in build.examples} == {1, 2}
    assert [t.shape for t in (build.examples[0][1], build.examples[0][2][1][1])] == [(36, 128), (4, 128)]
    queries, keys = attention.q_proj.weight.view(4, 32, 128), attention.k_proj.weight.view(2, 32, 128)
    for head in range(4):
        assert torch.equal(queries[head], keys[head // 2])
    with torch.no_grad():
        attention.q_proj.weight.zero_()
    build.state["steps"]["language"] = 1
    build.start_language()
    assert not attention.q_proj.weight.any()


def test_a_stopped_stage_continues_from_its_last_minute(tmp_path, monkeypatch):
    clock = iter(range(0, 100_000, 25))  # 25 seconds pass between any two calls
    monkeypatch.setattr(tiny_build, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(tiny_build, "STAGES", {"vision": 38, "language": 60, "two images": 2})
    draws = []

    def start(until):
        build = tiny_build.Build(tmp_path / "model", 20.0, 0)

        def loss_function(rng, step):
            draws.append(rng.random())
            if len(draws) > until:
                raise KeyboardInterrupt
            return sum((p**2).sum() for p in build.heads.parameters()), {}

        build.train("vision", 1e-3, list(build.heads.parameters()), loss_function)
        return build

    with pytest.raises(KeyboardInterrupt):
        start(until=6)  # at 25 seconds a step, the second minute is over after five
    state = torch.load(tmp_path / "model-build" / "state.pt", weights_only=True)
    assert set(state) == {"stage", "spent", "steps", "model", "heads", "optimizer"}
    assert state["stage"] == "vision" and state["steps"]["vision"] == 5 and state["spent"]["vision"] == 125
    assert torch.equal(
        tiny_build.Build(tmp_path / "model", 20.0, 0).heads["digits"].weight, state["heads"]["digits.weight"]
    )
    build = start(until=1000)
    expected = [random.Random(f"pretraining/0/vision/{i}").random() for i in range(19)]
    assert draws == expected[:7] + expected[5:]
    assert build.state["steps"] == {"vision": 19, "language": 0, "two images": 0}
    assert all(s["step"] == 19 for s in build.state["optimizer"]["state"].values())


def test_a_build_is_an_ordinary_folder_and_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_build, "EXAMPLES", 100)
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path / "model"), "--minutes", "0.05"])
    tiny_build.main()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.config.locus_family == "tiny" and not model.generation_config.do_sample
    assert model.lm_head.weight is model.get_input_embeddings().weight
    steps = torch.load(tmp_path / "model-build" / "state.pt", weights_only=True)["steps"]
    assert min(steps.values()) >= 1 and model.config.locus_build["steps"] == steps
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == architecture.CHAT_TEMPLATE
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").merge_size == 2
    tiny_build.main()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_make_no_sense_are_refused(minutes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path / "model"), "--minutes", minutes])
    with pytest.raises(SystemExit) as stopped:
        tiny_build.main()
    assert stopped.value.code == 2 and "--minutes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
