"""Builds the embedded model in tiny/ from nothing: a Qwen3-VL of 2 million parameters that sees, names and finds.

    python tiny.py [--out tiny] [--minutes 105] [--seed 0]

1. vision: throw-away heads on every image token learn what thing has its centre there, and where its box is;
2. language: the vision tower is frozen, its tokens are computed once, and the text model learns to answer.

It learns to name crops, to find by text and to answer questions. Cue search, which LOCUS trains, it never
sees. The build saves its state every minute and, started again, goes on from there.
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import scenes
from data import PROMPTS, BoxFrame
from policy import group_mask
from scenes import COLORS, SHAPES, SIDE, Box

FRAME = BoxFrame(SIDE, SIDE, 1000, 1000)

STAGES = {"vision": 0.38, "language": 0.6, "two images": 0.02}  # shares of the minutes
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # single tokens, but text: decoding keeps them
SENTENCES = (
    "user\n", "assistant\n", "Find the thing.", "Find Image 2 in Image 1.", "What is Image 2?",
    "What shape is the thing?", "What color is the thing?", "Where is the thing?", "[1, 2, 3]",
    *(f" {word}" for word in (*COLORS, *SHAPES, "top", "bottom", "left", "right")),
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE cut as Qwen's is: any text survives, digits stand alone, words keep their leading space."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r", |[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=alphabet, special_tokens=list(SPECIAL))
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL, 128 wide: 3 vision layers, 4 text layers, tied embeddings, no deepstack."""
    token = tokenizer.convert_tokens_to_ids
    rope = dict(rope_type="default", rope_theta=10_000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)
    text = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=2048)
    text |= dict(rope_parameters=rope, tie_word_embeddings=True, initializer_range=0.05)
    vision = dict(depth=3, hidden_size=128, intermediate_size=512, num_heads=4, patch_size=16, out_hidden_size=128)
    vision |= dict(num_position_embeddings=(SIDE // 16) ** 2, deepstack_visual_indexes=[], initializer_range=0.05)
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )
    model = Qwen3VLForConditionalGeneration(config)
    nn.init.normal_(model.model.visual.pos_embed.weight, std=0.3)  # at 0.05, places are learned very late
    return model


def build_image_processor() -> Qwen2VLImageProcessorPil:
    limits = {"shortest_edge": 64 * 64, "longest_edge": SIDE * SIDE}
    half = [0.5, 0.5, 0.5]
    return Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, image_mean=half, image_std=half, size=limits)


@dataclass
class Build:
    """A build under way: what is trained, and the seconds and steps that each stage has had."""

    model: Qwen3VLForConditionalGeneration
    heads: "Heads"
    tokenizer: PreTrainedTokenizerFast
    state_file: Path
    seed: int
    device: torch.device
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))


# ---------------------------------------------------------------- stage 1: vision


class Heads(nn.Module):
    """What a merged image token must tell: is a centre here, the four coordinates, and their twelve digits."""

    def __init__(self, width: int):
        super().__init__()
        self.centre = nn.Linear(width, 1)
        self.coordinates = nn.Linear(width, 4)
        self.digits = nn.Linear(width, 4 * 3 * 10)


def to_patches(images: np.ndarray) -> Tensor:
    """uint8 pictures [N, H, W, 3] to patches [N·H/16·W/16, 3·16·16], in the image processor's order."""
    n, h, w, _ = images.shape
    x = torch.from_numpy(images).float().div_(127.5).sub_(1)
    x = x.view(n, h // 32, 2, 16, w // 32, 2, 16, 3)  # [N, cell y, patch y, y, cell x, patch x, x, 3]
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3 * 16 * 16)


def look(visual: nn.Module, images: np.ndarray, device: torch.device) -> Tensor:
    """Image tokens [N, cells, width] of equal pictures uint8 [N, H, W, 3].

    A still picture is two equal frames, so the patch convolution is one matrix product with the summed kernel:
    three times as fast on a CPU as the convolution.
    """
    n, h, w, _ = images.shape
    proj = visual.patch_embed.proj
    kernel = proj.weight.sum(2).flatten(1)  # [width, 3·16·16]
    visual.patch_embed.forward = lambda patches: F.linear(patches, kernel, proj.bias)
    grid = torch.tensor([[1, h // 16, w // 16]] * n, device=device)
    tokens = visual(to_patches(images).to(device), grid_thw=grid).pooler_output  # [N·cells, width]
    del visual.patch_embed.forward
    return tokens.view(n, -1, tokens.shape[-1])


def random_scene(rng: random.Random, suppressed: float) -> tuple[scenes.Scene, np.ndarray]:
    """A scene of 1 to 8 things and its picture; with probability `suppressed` only one thing is left to see."""
    scene = scenes.draw_layout(rng, rng.randint(3, 8) if rng.random() < 0.8 else rng.randint(1, 2))
    image = scenes.render(scene)
    if rng.random() < suppressed:
        thing = rng.choice(scene.things)
        scene.things = [thing]
        image = scenes.keep_only(image, pad(thing.box, rng.uniform(0, 0.6)))
    return scene, np.asarray(image)


def pad(box: Box, share: float) -> Box:
    """The box, larger by `share` of its sides all around, inside the scene."""
    x1, y1, x2, y2 = box
    dx, dy = share * (x2 - x1), share * (y2 - y1)
    return (max(0, round(x1 - dx)), max(0, round(y1 - dy)), min(SIDE, round(x2 + dx)), min(SIDE, round(y2 + dy)))


def random_crop(rng: random.Random, scene: scenes.Scene, thing: scenes.Thing) -> np.ndarray:
    """The crop of one thing as the policy sees it: padded 0–10 %, enlarged to 64 × 64."""
    window = pad(thing.box, rng.uniform(0, 0.1))
    size = (scenes.CROP_SIDE, scenes.CROP_SIDE)
    return np.asarray(scenes.render(scene).crop(window).resize(size, scenes.Image.Resampling.BICUBIC))


def vision_targets(batch: list[scenes.Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets of the cells that hold a centre: cell index into [N·36], box / 192 [K, 4], colour [K], shape [K]."""
    cells, boxes, colors, shapes = [], [], [], []
    for i, scene in enumerate(batch):
        here: dict[int, tuple[float, scenes.Thing]] = {}
        for thing in scene.things:
            cx, cy = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
            cell = i * 36 + int(cy // 32) * 6 + int(cx // 32)
            off = abs(cx % 32 - 16) + abs(cy % 32 - 16)
            if cell not in here or off < here[cell][0]:  # of two centres in a cell, the one nearer to its middle
                here[cell] = (off, thing)
        for cell, (_, thing) in here.items():
            cells.append(cell)
            boxes.append([v / SIDE for v in thing.box])
            colors.append(list(COLORS).index(thing.color))
            shapes.append(SHAPES.index(thing.shape))
    return torch.tensor(cells), torch.tensor(boxes), torch.tensor(colors), torch.tensor(shapes)


def vision_loss(build: Build, rng: random.Random, batch: int = 32) -> tuple[Tensor, dict[str, float]]:
    """One batch of scenes and of crops; colour and shape are read off by the dot product with their words."""
    drawn = [random_scene(rng, suppressed=0.15) for _ in range(batch)]
    visual, heads, device = build.model.model.visual, build.heads, build.device
    tokens = look(visual, np.stack([image for _, image in drawn]), device).flatten(0, 1)  # [N·36, width]
    cells, boxes, colors, shapes = (t.to(device) for t in vision_targets([scene for scene, _ in drawn]))
    centre = torch.zeros(len(tokens), device=device).index_fill_(0, cells, 1.0)
    here = tokens[cells]  # [K, width]
    digits = torch.stack([(boxes * 1000).round().clamp(max=999).long() // d % 10 for d in (100, 10, 1)], -1)
    guess = heads.digits(here).view(-1, 4, 3, 10)  # [K, 4, 3, 10]
    l1 = (heads.coordinates(here) - boxes).abs().mean()
    crops, crop_colors, crop_shapes = [], [], []
    for scene, _ in drawn:
        thing = rng.choice(scene.things)
        crops.append(random_crop(rng, scene, thing))
        crop_colors += [list(COLORS).index(thing.color)] * 4
        crop_shapes += [SHAPES.index(thing.shape)] * 4
    crop_tokens = look(visual, np.stack(crops), device).flatten(0, 1)  # [N·4, width]
    words = {"color": torch.cat([colors, torch.tensor(crop_colors, device=device)])}
    words["shape"] = torch.cat([shapes, torch.tensor(crop_shapes, device=device)])
    parts = {
        "centre": F.binary_cross_entropy_with_logits(heads.centre(tokens)[:, 0], centre),
        "digits": F.cross_entropy(guess.flatten(0, 2), digits.flatten()),
    }
    loss = parts["centre"] + 10 * l1 + 4 * parts["digits"]
    embedding = build.model.get_input_embeddings().weight
    for kind, names in (("color", COLORS), ("shape", SHAPES)):
        ids = build.tokenizer.convert_tokens_to_ids([f"Ġ{name}" for name in names])
        logits = torch.cat([here, crop_tokens]) @ embedding[ids].T  # [K + N·4, 8 or 6]
        parts[kind] = F.cross_entropy(logits[: len(here)], words[kind][: len(here)])
        parts[f"crop_{kind}"] = F.cross_entropy(logits[len(here) :], words[kind][len(here) :])
        loss = loss + 2 * (parts[kind] + parts[f"crop_{kind}"])
    report = {name: value.item() for name, value in parts.items()}
    tens = (guess[:, :, 1].argmax(-1) == digits[:, :, 1]).float().mean().item()
    return loss, report | {"l1_px": l1.item() * SIDE, "tens": tens}


def train(build: Build, stage: str, minutes: float, peak: float, parameters: list[nn.Parameter], loss_of) -> None:
    """AdamW until the stage has had its share of the minutes, with a state saved every minute.

    `loss_of(rng, progress)` returns the loss and what to show; the rng of a step depends on (seed, stage, step)
    alone. Warm-up of 2 %, then a cosine, both over the minutes, so that a slower machine takes fewer steps.
    """
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    if build.state_file.is_file():
        state = torch.load(build.state_file, weights_only=True, map_location=build.device)
        if state["stage"] == stage:
            optimizer.load_state_dict(state["optimizer"])
    shown: dict[str, float] = {}
    saved = before = time.monotonic()
    total = 60 * minutes * STAGES[stage]
    with tqdm(total=round(total), initial=round(build.spent[stage]), desc=stage, unit="s", mininterval=5) as bar:
        while build.spent[stage] < total:
            progress = build.spent[stage] / total
            lr = peak * min(1.0, progress / 0.02 + 0.01) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = lr
            rng = random.Random(f"pretraining/{build.seed}/{stage}/{build.steps[stage]}")
            loss, report = loss_of(rng, progress)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            shown = {k: 0.98 * shown.get(k, v) + 0.02 * v for k, v in report.items()}
            now = time.monotonic()
            build.spent[stage] += now - before
            build.steps[stage] += 1
            bar.update(min(round(build.spent[stage]), bar.total) - bar.n)
            bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
            before = now
            if now - saved > 60 or build.spent[stage] >= total:
                save_state(build, stage, optimizer)
                saved = now


def save_state(build: Build, stage: str, optimizer: torch.optim.Optimizer) -> None:
    """The whole state in one file, written aside and renamed, so that a kill leaves the last one intact."""
    build.state_file.parent.mkdir(parents=True, exist_ok=True)
    state = {"stage": stage, "spent": build.spent, "steps": build.steps}
    state |= {"model": build.model.state_dict(), "heads": build.heads.state_dict()}
    aside = build.state_file.with_suffix(".new")
    torch.save(state | {"optimizer": optimizer.state_dict()}, aside)
    aside.replace(build.state_file)


# ---------------------------------------------------------------- stage 2: language

EXAMPLES = 20_000  # scenes whose image tokens are computed once
TURNS = 8  # questions a scene is asked in one sequence
WORDS_FIRST = {"shape": 4.0, "color": 2.0, "find": 2.0, "name": 1.0}
FINDING = {"find": 5.0, "shape": 2.0, "color": 2.0, "place": 3.0, "name": 0.5}


@dataclass
class Example:
    """A scene as the text model sees it: 36 tokens, and 4 for each of two crops."""

    scene: scenes.Scene
    tokens: Tensor  # [36, width]
    crops: list[tuple[scenes.Thing, Tensor]]  # (what it shows, [4, width])


@torch.no_grad()
def compute_examples(build: Build, count: int) -> list[Example]:
    """Scenes through the frozen vision tower, a quarter of them with all but one thing blacked out."""
    examples = []
    for start in tqdm(range(0, count, 100), desc="image tokens", mininterval=5):
        rng = random.Random(f"pretraining/{build.seed}/examples/{start}")
        drawn = [random_scene(rng, suppressed=0.25) for _ in range(100)]
        shown = [(scene, thing) for scene, _ in drawn for thing in rng.choices(scene.things, k=2)]
        crops = np.stack([random_crop(rng, scene, thing) for scene, thing in shown])
        visual = build.model.model.visual
        tokens = look(visual, np.stack([image for _, image in drawn]), build.device).cpu()  # [100, 36, width]
        crop_tokens = look(visual, crops, build.device).cpu()  # [200, 4, width]
        for i, (scene, _) in enumerate(drawn):
            pair = [(shown[j][1], crop_tokens[j]) for j in (2 * i, 2 * i + 1)]
            examples.append(Example(scene, tokens[i], pair))
    return examples


def draw_turn(rng: random.Random, example: Example, weights: dict[str, float], crop_share: float):
    """One turn: (crop tokens or None, what the user says, what the model should answer)."""
    asked = scenes.questions(example.scene)
    thing = rng.choice(example.scene.things)
    kind = rng.choices(list(weights), list(weights.values()))[0]
    if kind == "name":
        thing, crop = rng.choice(example.crops)
        return crop, PROMPTS["short"]["name"], f"<think> {thing.name}</think><answer> {thing.name}</answer>"
    start = {"shape": "What shape", "color": "What color", "place": "Where"}.get(kind, "?")
    fitting = [q for q in asked if q.text.startswith(start)]
    if kind == "find" or not fitting:
        crop = rng.choice(example.crops)[1] if rng.random() < crop_share else None
        answer = f"<think> {thing.name}</think><answer>{FRAME.to_text(thing.box)}</answer>"
        return crop, PROMPTS["short"]["text"].format(text=thing.name), answer
    question = rng.choice(fitting)
    thought = f" {question.name}"  # what the question gives comes first
    if kind == "color":
        thought = "".join(f" {word}" for word in reversed(question.name.split()))
    elif kind == "place":
        thought += FRAME.to_text(question.box)
    return None, question.text, f"<think>{thought}</think><answer> {question.answer}</answer>"


def language_loss(build: Build, examples: list[Example], rng: random.Random, batch: int, weights, crop_share=0.0):
    """Cross-entropy of the answers in rows `[scene | turn 1 | … | turn 8]`, laid out like a GRPO group.

    Every turn sees the scene and itself, never another turn, so each is trained as the first turn it will be.
    """
    tok, device, model = build.tokenizer, build.device, build.model.model
    image_id = model.config.image_token_id
    head = tok.encode("<|im_start|>user\n<|vision_start|>") + [image_id] * 36 + tok.encode("<|vision_end|>")
    rows, features = [], []
    chosen = rng.choices(examples, k=batch)
    turns = [draw_turn(rng, example, weights, crop_share) for example in chosen for _ in range(TURNS)]
    asked = tok([f"{text}<|im_end|>\n<|im_start|>assistant\n" for _, text, _ in turns]).input_ids
    answers = tok([f"{answer}<|im_end|>" for _, _, answer in turns]).input_ids
    for i, example in enumerate(chosen):
        # [token, segment, is it an answer, t, h, w] a column
        columns = [[token, 0, 0, *at] for token, at in zip(head, grid_positions(head, image_id, 6, 0))]
        features.append(example.tokens)
        for j in range(TURNS):
            crop, prompt, answer = turns[i * TURNS + j][0], asked[i * TURNS + j], answers[i * TURNS + j]
            if crop is not None:
                features.append(crop)
                prompt = tok.encode("<|vision_start|>") + [image_id] * 4 + tok.encode("<|vision_end|>") + prompt
            places = grid_positions(prompt + answer, image_id, 2, columns[len(head) - 1][3] + 1)
            mine = [0] * len(prompt) + [1] * len(answer)
            columns += [[t, j + 1, m, *at] for t, m, at in zip(prompt + answer, mine, places)]
        rows.append(torch.tensor(columns))
    padding = torch.tensor([tok.pad_token_id, -1, 0, 0, 0, 0])
    length = max(len(row) for row in rows)
    table = torch.stack([torch.cat([row, padding.expand(length - len(row), 6)]) for row in rows]).to(device)
    ids, segments, is_answer, positions = table[..., 0], table[..., 1], table[..., 2], table[..., 3:]
    embeds = model.get_input_embeddings()(ids)  # [B, L, width]
    seen = torch.cat(features).to(device)
    embeds = embeds.masked_scatter((ids == image_id)[..., None], seen)
    hidden = model.language_model(
        inputs_embeds=embeds,
        attention_mask=group_mask(segments),
        position_ids=positions.permute(2, 0, 1),  # [3, B, L]
        use_cache=False,
    ).last_hidden_state
    logits = build.model.lm_head(hidden[:, :-1][is_answer[:, 1:] == 1])  # [answer tokens, V]
    target = ids[:, 1:][is_answer[:, 1:] == 1]
    loss = F.cross_entropy(logits, target)
    right = (logits.argmax(-1) == target).float()
    digit = (target >= tok.convert_tokens_to_ids("0")) & (target <= tok.convert_tokens_to_ids("9"))
    return loss, {"loss": loss.item(), "words": right[~digit].mean().item(), "digits": right[digit].mean().item()}


def grid_positions(ids: list[int], image_id: int, side: int, start: int) -> list[tuple[int, int, int]]:
    """(t, h, w) positions of a run of tokens from `start`, as get_rope_index gives them; images are square."""
    places, now, cell = [], start, 0
    for token in ids:
        if token != image_id:
            places.append((now, now, now))
            now += 1
            continue
        places.append((now, now + cell // side, now + cell % side))
        cell += 1
        if cell == side * side:
            now, cell = now + side, 0
    return places


def start_language(model: Qwen3VLForConditionalGeneration) -> None:
    """Query projections start as copies of the key projections: " red" looks at red things from the first step."""
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        keys = attention.k_proj.weight.data.view(2, 1, 32, 128)  # [kv heads, 1, head, width]
        attention.q_proj.weight.data.copy_(keys.expand(2, 2, 32, 128).reshape(128, 128))


def build_embedded(out: Path, minutes: float, seed: int) -> None:
    """All stages, from where the state file beside `out` says; then the folder `out`."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(device)
    state_file = out.with_name(f"{out.name}-build") / "state.pt"
    build = Build(model, Heads(128).to(device), tokenizer, state_file, seed, device)
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True, map_location=device)
        build.spent, build.steps = state["spent"], state["steps"]
        model.load_state_dict(state["model"])
        build.heads.load_state_dict(state["heads"])
    words = model.get_input_embeddings().weight
    seeing = [*model.model.visual.parameters(), *build.heads.parameters(), words]
    train(build, "vision", minutes, 2e-3, seeing, lambda rng, progress: vision_loss(build, rng))
    if not build.steps["language"]:
        start_language(model)
    model.model.visual.requires_grad_(False)
    examples = compute_examples(build, EXAMPLES)
    speaking = list(model.model.language_model.parameters())

    def language(rng: random.Random, progress: float):
        early = progress < 0.12
        return language_loss(build, examples, rng, 16 if early else 8, WORDS_FIRST if early else FINDING)

    def two_images(rng: random.Random, progress: float):
        return language_loss(build, examples, rng, 8, FINDING, crop_share=1 / 3)

    train(build, "language", minutes, 1.2e-3, speaking, language)
    train(build, "two images", minutes, 3e-4, speaking, two_images)
    model.config.locus_family = "tiny"
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    build_image_processor().save_pretrained(out)
    record = {"seed": seed, "steps": build.steps, "minutes": {k: round(v / 60, 1) for k, v in build.spent.items()}}
    record |= {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    (out / "build.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tiny"), help="folder of the finished model")
    parser.add_argument("--minutes", type=float, default=100, help="of training in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build_embedded(args.out, args.minutes, args.seed)
    print(f"{args.out} is built. Measure it, and write its card: python eval.py scenes --card --model {args.out}")


if __name__ == "__main__":
    main()
