"""Builds the embedded model from nothing: a Qwen3-VL of 2.2 million parameters that sees, answers and finds.

    python -m tiny.build --out FOLDER [--seed 0] [--steps-per-stage K]

Stages, each for its number of steps (all of K, to try it out):
1. vision: for each image token the vision tower learns which object is there, of any size;
2. words: the tower is frozen, and the text model learns to name what a crop shows, shapes and details;
3. boxes: the same, but mostly where objects are, while the learning rate falls. It is short, and shows few
   crowds: a longer build with more of them reads tiny objects well by itself (docs/embedded_model.md).
Every stage shows 1 to 12 objects. The text model is asked about salient objects alone: it never has to find a
tiny one, though they stand in its images. That is where it is weak: where its training is thin. Cue search,
which LOCUS trains, is never shown: whatever is to be found has its name in the prompt.

What differs from a typical pretraining script:
- The tokens of an image are computed once, by the frozen tower, and shared by every turn about it.
- Eight turns (a question and its answer) about one scene are packed in one row, laid out as a GRPO group is.
- Where a thought has named what a question asks about, throw-away heads read its box off that token, as off
  an image token.
- Every draw depends on (seed, stage, step) alone, so a build that was killed continues to the same bytes. On
  an AMD CPU they are others, unless MKL is told otherwise (docs/embedded_model.md).
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data import Cue, CueConfig, sample_cue_box, sample_random_box, scene_cues
from evaluation.heldout import build_heldout_set, evaluate, target_object
from evaluation.scores import mean
from files.disk import sha256
from files.errors import FlagParser, UserError, exit_on_error, one_or_more
from models import make_policy
from policy import group_mask
from prompts import FAMILIES, PROMPTS, BoxFrame, Processor
from tiny import scenes
from tiny.architecture import build_image_processor, build_model, build_tokenizer
from tiny.scenes import COLORS, SHAPES, SIDE, Scene, SceneObject
from training.run_folder import require_same_settings

CELLS = (SIDE // scenes.CELL) ** 2  # image tokens of a scene
CROP_CELLS = (scenes.CROP_SIDE // scenes.CELL) ** 2  # image tokens of a crop
FEW = 4  # objects of an easy scene, at most


@dataclass(frozen=True)
class Stage:
    """How long a stage is, and what it shows."""

    steps: int
    peak_lr: float
    few_share: float  # of the scenes have 1 to 4 objects, the rest up to 12
    decay_lr: bool = True
    turns: dict[str, float] = field(default_factory=dict)  # how often a turn is of each kind


STAGES = {
    "vision": Stage(5000, 2e-3, 0.3),
    "words": Stage(2600, 1.2e-3, 0.85, False, dict(shape=3, detail=4, place=0.5, find=1.5, name=1.5)),
    "boxes": Stage(2000, 1.2e-3, 0.97, True, dict(shape=1, detail=2, place=1.5, find=3, told=1, name=0.5)),
}
THREADS = 1  # sums of one thread do not depend on what else the machine does
SAVE_EVERY = 200  # steps
MEASURED = 900  # held-out cues; three times as many questions about few objects, and as many about crowds
EXAMPLES = 24_000  # scenes whose image tokens are computed once
FRAME = BoxFrame(SIDE, SIDE, 1000, 1000)
TURNS = 8  # about one scene, in one row
IMAGE = "<|vision_start|>" + "<|image_pad|>" * CELLS + "<|vision_end|>"
CROP = "<|vision_start|>" + "<|image_pad|>" * CROP_CELLS + "<|vision_end|>"
SCENE = f"<|im_start|>user\n{IMAGE}"  # what all turns about a scene share
# A scene, its tokens [64, H], and two crops: the object that each shows, and its tokens [4, H].
Example = tuple[Scene, Tensor, tuple[tuple[SceneObject, Tensor], tuple[SceneObject, Tensor]]]
# Prompt and answer as text, the tokens [cells, H] of its images, the number of words with which its thought
# names the object that the prompt asks about (0 where it asks for a name: that must not teach to find a
# crop), and the object.
Turn = tuple[str, list[Tensor], int, SceneObject]

# ---------------------------------------------------------------- what is shown


def draw_count(rng: random.Random, few_share: float) -> int:
    return rng.randint(1, FEW) if rng.random() < few_share else rng.randint(FEW + 1, scenes.MAX_OBJECTS)


def random_scene(rng: random.Random, count: int, suppressed: float) -> tuple[Scene, Image.Image]:
    """A scene of `count` objects and its image; with probability `suppressed` all but one object is black."""
    scene = scenes.draw_layout(rng, count)
    image = scenes.render(scene)
    if rng.random() < suppressed:
        scene.objects = [rng.choice(scene.objects)]
        x1, y1, x2, y2 = scene.objects[0].box
        padding = rng.uniform(0, 0.6) * (x2 - x1)
        image = scenes.keep_only(image, (x1 - padding, y1 - padding, x2 + padding, y2 + padding))
    return scene, image


def random_crop(rng: random.Random, scene: Scene) -> tuple[SceneObject, Image.Image]:
    """The window of a cue or a large one, as the policy sees it, and the object that it shows.

    A large window (10 to 30 % of the scene) shows several objects; the one that covers most of it counts.
    """
    image, scene_object = scenes.render(scene), rng.choice(scene.objects)
    large = rng.random() < 0.2 and sample_random_box(rng, SIDE, SIDE, "large", CueConfig(), scene_object.box)
    window = large or sample_cue_box(rng, scene_object.box, SIDE, SIDE, CueConfig())
    cue = Cue(image, window, "", scene=scene, target=None if large else scene_object)
    return target_object(cue), cue.crop


def compute_image_tokens(visual: nn.Module, images: list[Image.Image]) -> Tensor:
    """Image tokens [N, cells, H] of N images of one size, without the slow image processor."""
    n, (w, h), conv = len(images), images[0].size, visual.patch_embed.proj
    x = torch.from_numpy(np.stack(images)).to(conv.weight.device) / 127.5 - 1  # [N, h, w, 3]
    x = x.view(n, h // 32, 2, 16, w // 32, 2, 16, 3)  # [N, cell y, patch y, y, cell x, patch x, x, 3]
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3 * 16 * 16)  # [N·cells·4, 3·16·16]
    # An image is two equal frames, so one frame and the sum of both kernels are enough: three times as fast.
    visual.patch_embed.forward = lambda x: F.linear(x, conv.weight.sum(2).flatten(1), conv.bias)
    tokens = visual(x, grid_thw=torch.tensor([[1, h // 16, w // 16]] * n, device=x.device)).pooler_output
    del visual.patch_embed.forward
    return tokens.view(n, -1, tokens.shape[-1])


def object_in_cell(scene: Scene, cell: int) -> SceneObject | None:
    """The object that covers most of a cell, of those that fill a quarter of it or have a quarter in it."""
    x, y = scenes.CELL * (cell % (SIDE // scenes.CELL)), scenes.CELL * (cell // (SIDE // scenes.CELL))
    window, fraction = (x, y, x + scenes.CELL, y + scenes.CELL), scenes.visible_fraction
    shown = [o for o in scene.objects if max(fraction(o.box, window), fraction(window, o.box)) >= 0.25]
    return max(shown, key=lambda o: fraction(window, o.box), default=None)


def draw_turn(rng: random.Random, example: Example, turns: dict[str, float]) -> Turn:
    """A turn about an example; turns: how often it is of each kind."""
    (scene, scene_tokens, crops), words = example, 0
    images = [scene_tokens]
    kind = rng.choices(list(turns), list(turns.values()))[0]
    # The text model is asked about salient objects alone: not the tiny ones.
    possible = [q for q in scenes.questions(scene) if q.kind == kind and q.evidence.size != "tiny"]
    # What can be found: an object; or, if the prompt tells which one Image 2 shows, that one and its crop.
    found = [x for x in (crops if kind == "told" else [(o,) for o in scene.objects]) if x[0].size != "tiny"]
    if possible:
        q = rng.choice(possible)
        text, answer, words, shown = q.text, f" {q.answer}", 2, q.evidence
        # The thought starts with the words that the question gives, and ends with what the answer needs.
        thought = shown.name + FRAME.to_text(shown.box) * (kind == "place")
    elif kind in ("find", "told") and found:
        shown, *crop_tokens = rng.choice(found)
        # With the detail where the name is not enough, and half of the time where it is.
        name = shown.name if scene.is_unique(shown) and rng.random() >= 0.5 else shown.description
        with_name = "Find Image 2, the {text}, in Image 1." if crop_tokens else PROMPTS["short"]["text"]
        text = with_name.format(text=name)
        if kind == "find" and rng.random() < 1 / 3:  # beside any crop
            crop_tokens, text = [rng.choice(crops)[1]], f"Find the {name} in Image 1."
        images += crop_tokens
        thought, answer, words = name, FRAME.to_text(shown.box), len(name.split())
    else:  # name, which also replaces a turn that this scene does not have
        shown, crop_tokens = rng.choice(crops)
        images.append(crop_tokens)
        name = shown.description if rng.random() < 0.5 else shown.name
        text, thought, answer = PROMPTS["short"]["name"], name, f" {name}"
    prompt = f"{SCENE}{CROP * (len(images) - 1)}{text}<|im_end|>\n<|im_start|>assistant\n"
    return f"{prompt}<think> {thought}</think><answer>{answer}</answer><|im_end|>", images, words, shown


# ---------------------------------------------------------------- the build


class Build:
    """A build in progress: the model, its throw-away heads, and what has been done so far."""

    def __init__(self, out: Path, seed: int, steps_per_stage: int | None = None):
        torch.set_num_threads(THREADS)
        torch.manual_seed(seed)
        self.seed, self.tokenizer, self.examples = seed, build_tokenizer(), {}
        self.steps = {name: steps_per_stage or stage.steps for name, stage in STAGES.items()}
        self.model = build_model(self.tokenizer)
        heads = {"object": nn.Linear(128, 1), "coordinates": nn.Linear(128, 4), "digits": nn.Linear(128, 120)}
        self.heads = nn.ModuleDict(heads | {"core": nn.Linear(128, 128)})
        self.file = out.with_name(f"{out.name}-build") / "state.pt"
        settings = {"seed": seed, "steps": self.steps, "threads": THREADS}
        # As str: torch's own class of versions could not be read back with weights_only.
        settings["versions"] = {m.__name__: str(m.__version__) for m in (torch, transformers)}
        # `step`: how many steps of `stage` are done; `accuracy`: after each stage that is complete.
        self.state = {"settings": settings, "stage": "vision", "step": 0, "accuracy": {}}
        if self.file.is_file():
            self.state = torch.load(self.file, weights_only=True)
            require_same_settings(self.file, self.state["settings"], settings)
            self.model.load_state_dict(self.state["model"])
            self.heads.load_state_dict(self.state["heads"])

    def save(self, **changes: Any) -> None:
        """Writes the state. A kill leaves the whole old file or the whole new one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.state |= {"model": self.model.state_dict(), "heads": self.heads.state_dict()} | changes
        torch.save(self.state, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").replace(self.file)

    def train(self, name: str, parameters: list, loss_function: Callable, measure: Callable) -> None:
        """AdamW on loss_function(rng, stage) for what a stage has left; then measure() gives accuracy."""
        if name in self.state["accuracy"]:
            return
        stage, num_steps = STAGES[name], self.steps[name]
        optimizer = torch.optim.AdamW(parameters, stage.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
        first_step = self.state["step"] if self.state["stage"] == name else 0
        if first_step:
            optimizer.load_state_dict(self.state["optimizer"])
        bar = tqdm(range(first_step, num_steps), name, num_steps, initial=first_step, mininterval=5)
        for step in bar:
            # Warm-up, then a cosine or a plateau.
            progress = step / num_steps
            cosine = 0.5 + 0.5 * math.cos(math.pi * progress) if stage.decay_lr else 1.0
            optimizer.param_groups[0]["lr"] = stage.peak_lr * min(1.0, progress / 0.02 + 0.01) * cosine
            loss, metrics = loss_function(random.Random(f"pretraining/{self.seed}/{name}/{step}"), stage)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            bar.set_postfix(metrics, refresh=False)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == num_steps:
                self.save(stage=name, step=step + 1, optimizer=optimizer.state_dict())
        self.save(accuracy=self.state["accuracy"] | {name: measure()})
        print(f"{name}, {num_steps} steps: {self.state['accuracy'][name]}")

    def box_loss(self, tokens: Tensor, objects: list[SceneObject]) -> tuple[Tensor, float]:
        """The loss of boxes that are read off tokens [N, H] of N objects, and their mean error in pixels.

        Each box twice: in numbers, and digit by digit, as the text model has to write it.
        """
        boxes = torch.tensor([o.box for o in objects]) / SIDE  # [N, 4]
        distance = (self.heads["coordinates"](tokens) - boxes).abs().mean()
        units = (1000 * boxes).round().clamp(max=999).long()  # [N, 4]
        digits = torch.stack([units // 100, units // 10 % 10, units % 10], -1).flatten()  # [N·4·3]
        logits = self.heads["digits"](tokens).view(-1, 10)  # [N·4·3, 10]
        return 10 * distance + 4 * F.cross_entropy(logits, digits), distance.item() * SIDE

    def vision_loss(self, rng: random.Random, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        """The loss of stage 1 on 16 scenes and two crops of each; also what the progress bar shows.

        A token of a scene tells whether its cell shows an object; if so, its box, colour, shape and core too.
        A token of a crop tells colour, shape and core.
        """
        visual, heads = self.model.model.visual, self.heads
        drawn, images = zip(*[random_scene(rng, draw_count(rng, stage.few_share), 0.15) for _ in range(16)])
        # What each token should tell: first those of the K cells that show an object, then those of crops.
        cells = [object_in_cell(scene, cell) for scene in drawn for cell in range(CELLS)]
        targets = {i: scene_object for i, scene_object in enumerate(cells) if scene_object}
        K, C = len(targets), 16 * CELLS
        shown, crops = zip(*[random_crop(rng, scene) for scene in drawn for _ in range(2)])
        targets |= {C + j: shown[j // CROP_CELLS] for j in range(32 * CROP_CELLS)}
        index = torch.tensor(list(targets))  # [K + 128]
        tokens = torch.cat([compute_image_tokens(visual, part).flatten(0, 1) for part in (images, crops)])
        box_loss, pixels = self.box_loss(tokens[index[:K]], list(targets.values())[:K])
        is_object = torch.zeros(C).index_fill_(0, index[:K], 1.0)  # [16·64]
        loss = box_loss + F.binary_cross_entropy_with_logits(heads["object"](tokens[:C])[:, 0], is_object)
        # Words by the dot product with their own embeddings, so that the text model can read the tokens. Of
        # the core by way of a head: colour and core are words of one kind.
        metrics = {"pixels": pixels}
        words = tokens[index]  # [K + 128, H]
        for kind, names in (("color", list(COLORS)), ("shape", SHAPES), ("core", list(COLORS))):
            ids = self.tokenizer.convert_tokens_to_ids([f"Ġ{name}" for name in names])
            source = heads["core"](words) if kind == "core" else words
            logits = source @ self.model.get_input_embeddings().weight[ids].T  # [K + 128, 6 or 5]
            labels = torch.tensor([names.index(getattr(o, kind)) for o in targets.values()])
            on_scenes, on_crops = (F.cross_entropy(logits[i], labels[i]) for i in (slice(K), slice(K, None)))
            loss = loss + 2 * (on_scenes + on_crops)
            metrics[kind] = (logits[:K].argmax(-1) == labels[:K]).float().mean().item()
        return loss, metrics

    @torch.no_grad()
    def draw_examples(self) -> None:
        """Draws the scenes of the language stages, half of them of few objects, and two crops of each."""
        visual, count = self.model.model.visual, min(EXAMPLES, 8 * sum(self.steps.values()))
        self.examples = {True: [], False: []}  # by whether a scene has few objects
        for start in tqdm(range(0, count, 100), "image tokens", mininterval=5):
            rng = random.Random(f"pretraining/{self.seed}/examples/{start}")
            counts = [draw_count(rng, 0.5) for _ in range(100)]
            drawn, images = zip(*[random_scene(rng, count, suppressed=0.25) for count in counts])
            shown, crops = zip(*[random_crop(rng, scene) for scene in drawn for _ in range(2)])
            pairs = list(zip(shown, compute_image_tokens(visual, crops)))  # 200 × (object, [4, H])
            for example in zip(drawn, compute_image_tokens(visual, images), zip(pairs[::2], pairs[1::2])):
                self.examples[len(example[0].objects) <= FEW].append(example)

    def turns_loss(self, rng: random.Random, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        """The loss of the replies in rows `[scene | turn 1 | … | turn 8]`, and of boxes read off their names.

        Also what the progress bar shows, where `loss` is that of the replies alone.
        """
        tokenizer, model, batch = self.tokenizer, self.model.model, 8
        few = [rng.random() < stage.few_share for _ in range(batch)]
        drawn = [rng.choice(self.examples[is_few]) for is_few in few]
        examples = [example for example in drawn for _ in range(TURNS)]
        texts, images, words, objects = zip(*[draw_turn(rng, example, stage.turns) for example in examples])
        # 1. Every turn by itself, behind its own copy of the scene.
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids  # [B·8, L]
        image_id, think_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<think>"])
        # Positions depend only on where the image tokens are: there are two layouts, with a crop and without.
        layouts, index = (ids == image_id).long().unique(dim=0, return_inverse=True)  # [2, L] and [B·8]
        sides = [SIDE // 16] * len(layouts) + [scenes.CROP_SIDE // 16]  # in patches, of each image
        grids = [[1, side, side] for side in sides]
        position_ids = model.get_rope_index(layouts, layouts, torch.tensor(grids))[0][:, index]  # [3, B·8, L]
        # 2. Eight turns in a row share the first copy of the scene (segment 1); the others are dropped (0).
        segment_ids = torch.arange(2, TURNS + 2).repeat(batch)[:, None] * (ids != tokenizer.pad_token_id)
        is_first = torch.arange(batch * TURNS) % TURNS == 0  # [B·8]
        segment_ids[:, : len(tokenizer(SCENE).input_ids)] = is_first[:, None]  # [B·8, L]
        is_answer = (ids == think_id).cumsum(1)  # [B·8, L]
        # A word is a token. In a turn of 0 words no token ends a name.
        number = torch.tensor(words)[:, None]  # [B·8, 1]
        ends_name = (is_answer.cumsum(1) == number + 1) & (number > 0)  # [B·8, L]
        # Columns of a token: id, segment, is it of the answer, does it end a name, and its three positions.
        columns = torch.stack([ids, segment_ids, is_answer, ends_name, *position_ids], -1)
        rows = [row[row[:, 1] > 0] for row in columns.view(batch, -1, 7)]  # B × [tokens kept, 7]
        rows = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, K, 7]
        ids, segment_ids, is_answer, ends_name, *position_ids = rows.unbind(-1)  # [B, K] each
        features = torch.cat([f for i, turn in enumerate(images) for f in turn[i % TURNS > 0 :]])
        embeds = model.get_input_embeddings()(ids).masked_scatter((ids == image_id)[..., None], features)
        # As in a GRPO group, a turn sees the scene and itself: it learns what it would learn alone.
        kwargs = dict(attention_mask=group_mask(segment_ids - 1), position_ids=torch.stack(position_ids))
        kwargs |= dict(use_cache=False, output_hidden_states=True)
        output = self.model(inputs_embeds=embeds, labels=ids.masked_fill(is_answer == 0, -100), **kwargs)
        names = output.hidden_states[-1][ends_name > 0]  # [N, H], N turns that ask about an object
        asked = [o for o, number in zip(objects, words) if number]
        # There is none where all eight scenes hold tiny objects alone.
        box_loss, pixels = self.box_loss(names, asked) if asked else (0.0, 0.0)
        # A tenth of it: what counts is what the model writes.
        return output.loss + 0.1 * box_loss, {"loss": output.loss.item(), "pixels": pixels}

    @torch.no_grad()
    def measure_vision(self) -> dict[str, float]:
        """The vision stage's metrics on 480 scenes that no stage has seen; on fewer if the build is short."""
        rngs = [random.Random(f"held-out/{step}") for step in range(min(30, self.steps["vision"]))]
        rows = [self.vision_loss(rng, STAGES["vision"])[1] for rng in rngs]
        return {name: round(mean(row[name] for row in rows), 4) for name in rows[0]}

    def measure_language(self) -> dict[str, dict[str, float]]:
        """Accuracy of the questions by kind and size, on held-out scenes of few objects and on crowds."""
        processor = Processor(self.tokenizer, build_image_processor(), FAMILIES["tiny"], "")
        policy, accuracy = make_policy(self.model, processor, self.model.device), {}
        n = min(MEASURED, sum(self.steps.values()))  # a short build is a trial
        for name, counts in (("few", (1, FEW)), ("crowds", (8, scenes.MAX_OBJECTS))):
            held = build_heldout_set(policy, scene_cues(CueConfig(), "heldout", 1, counts), n)
            held = replace(held, find_prompts=[], suppressed_prompts=[])
            kinds = evaluate(policy, held, FAMILIES["tiny"].max_new_tokens).summary["questions"]["by_kind"]
            accuracy[name] = {kind: round(part["accuracy"], 4) for kind, part in kinds.items()}
        return accuracy


def run_build(build: Build, out: Path) -> None:
    """All stages, or what is left of them; then the finished model is a folder like any other."""
    model, word_embeddings = build.model, build.model.get_input_embeddings().weight
    vision = [*model.model.visual.parameters(), *build.heads.parameters(), word_embeddings]
    build.train("vision", vision, build.vision_loss, build.measure_vision)
    build.draw_examples()
    text = [*model.model.language_model.parameters(), *build.heads.parameters()]
    for name in ("words", "boxes"):
        build.train(name, text, build.turns_loss, build.measure_language)
    model.config.locus_family, model.generation_config.do_sample = "tiny", False
    for part in (model, build.tokenizer, build_image_processor()):
        part.save_pretrained(out)
    results = {"accuracy": build.state["accuracy"], "sha256": sha256(out / "model.safetensors")}
    model.config.locus_build = build.state["settings"] | results
    model.config.save_pretrained(out)
    print(f"The model is in {out}. Measure it with: python -m tiny.card --model {out}")
    print(f"SHA-256 of model.safetensors: {results['sha256']}")


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-per-stage", type=one_or_more, help="of every stage, to try it out")
    args = parser.parse_args()
    with exit_on_error():
        if args.out.resolve().is_relative_to(checkout := Path(__file__).resolve().parents[1]):
            raise UserError(f"--out {args.out} is inside {checkout}, as its state would be: give another.")
        run_build(Build(args.out, args.seed, args.steps_per_stage), args.out)


if __name__ == "__main__":
    main()
