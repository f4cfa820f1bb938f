"""Builds the embedded model from nothing: a Qwen3-VL of 2.2 million parameters that sees, answers and finds.

    python -m tiny.build [--out tiny/model] [--minutes 74] [--seed 0]

Four stages, each for its share of the minutes:
1. vision: for each image token the vision tower learns which object has its centre there, and its box;
2. language: the vision tower is frozen, and the text model learns to answer about one to four objects;
3. few things: the same about one object, seldom two, with a strong weight decay. What only crowded scenes
   need decays: this is the visual context rot that LOCUS is to cure;
4. two images: the same while the learning rate falls; a third of the prompts for finding also show a crop.
Cue search, which LOCUS trains, is never shown. After a stop, the same command continues from the last minute.

What differs from a typical pretraining script:
- A stage has minutes, not steps, so that the build takes as long on every machine.
- The tokens of an image are computed once, by the frozen tower, and shared by every turn about it.
- Eight turns (a question and its answer) about one scene are packed in one row, laid out as a GRPO group is.
"""

import math
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data import Cue
from files.errors import FlagParser, UserError, exit_on_error
from policy import group_mask
from prompts import PROMPTS, BoxFrame
from reward import Box
from tiny.architecture import build_image_processor, build_model, build_tokenizer
from tiny.scenes import COLORS, SHAPES, SIDE, Scene, SceneObject, draw_layout, keep_only, questions, render

STAGES = {"vision": 37, "language": 32, "few things": 1, "two images": 4}  # minutes
# How many objects are in the scenes of a stage, all equally likely.
OBJECT_COUNTS = {"language": (1, 2, 3, 4), "few things": 9 * (1,) + (2,), "two images": 9 * (1,) + (2,)}
EXAMPLES = 20_000  # scenes whose image tokens are computed once
FRAME = BoxFrame(SIDE, SIDE, 1000, 1000)
TURNS = 8  # about one scene, in one row
# How often a turn is of each kind: in the first steps of the language stage, and after them.
WORDS_FIRST = {"What shape": 4.0, "What color": 2.0, "find": 2.0, "name": 1.0}
FINDING = {"find": 5.0, "What shape": 2.0, "What color": 2.0, "Where": 3.0, "name": 0.5}
SCENE = f"<|im_start|>user\n<|vision_start|>{36 * '<|image_pad|>'}<|vision_end|>"
CROP = f"<|vision_start|>{4 * '<|image_pad|>'}<|vision_end|>"

# A scene, its tokens [36, H], and two crops of it: 2 × ((scene, object), tokens [4, H]).
Example = tuple[Scene, Tensor, tuple]

# ---------------------------------------------------------------- images and turns


def random_window(rng: random.Random, box: Box, max_padding: float) -> Box:
    """A box, padded on each side by up to `max_padding` of its width, inside the scene."""
    padding = rng.uniform(0, max_padding) * (box[2] - box[0])
    edges = (box[0] - padding, box[1] - padding, box[2] + padding, box[3] + padding)
    return tuple(min(SIDE, max(0, round(v))) for v in edges)


def random_scene(rng: random.Random, count: int, suppressed: float) -> tuple[Scene, Image.Image]:
    """A scene of `count` objects and its image; with probability `suppressed` all but one object is black."""
    scene = draw_layout(rng, count)
    image = render(scene)
    if rng.random() < suppressed:
        scene.objects = [rng.choice(scene.objects)]
        image = keep_only(image, random_window(rng, scene.objects[0].box, 0.6))
    return scene, image


def random_crop(rng: random.Random, scene: Scene, scene_object: SceneObject) -> Image.Image:
    """A crop around an object, as the policy sees it."""
    return Cue(render(scene), random_window(rng, scene_object.box, 0.1), "", scene=scene).crop


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


def objects_by_cell(scenes: tuple[Scene, ...]) -> dict[int, SceneObject]:
    """The object whose centre a cell holds, by the cell's index among the 36 of every scene.

    Of two centres in a cell, the one nearer to the cell's middle counts.
    """
    found: dict[int, SceneObject] = {}
    for i, scene in enumerate(scenes):
        for scene_object in sorted(scene.objects, key=lambda o: sum(abs(v % 32 - 16) for v in o.centre)):
            x, y = scene_object.centre
            found.setdefault(36 * i + int(y // 32) * 6 + int(x // 32), scene_object)
    return found


def draw_turn(rng: random.Random, example: Example, weights: dict, crop_share: float) -> tuple[str, list]:
    """A turn about an example: its text, prompt and answer, and the tokens [cells, H] of each of its images.

    weights: how often a turn is of each kind; crop_share: share of the finding turns that also show a crop.
    """
    scene, scene_tokens, crops = example
    scene_object, images = rng.choice(scene.objects), [scene_tokens]
    kind = rng.choices(list(weights), list(weights.values()))[0]
    if possible := [question for question in questions(scene) if question.text.startswith(kind)]:
        q = rng.choice(possible)
        # The thought starts with the words that the question gives, and ends with what the answer needs.
        thoughts = {"What shape": q.name, "What color": " ".join(reversed(q.name.split()))}
        text, thought, answer = q.text, thoughts.get(kind, q.name + FRAME.to_text(q.box)), f" {q.answer}"
    elif kind == "name":
        (_, scene_object), crop_tokens = rng.choice(crops)
        images.append(crop_tokens)
        text, thought, answer = PROMPTS["short"]["name"], scene_object.name, f" {scene_object.name}"
    else:  # find, which also replaces a question that this scene does not have
        if with_crop := rng.random() < crop_share:
            images.append(rng.choice(crops)[1])
        text = PROMPTS["short"]["text"].format(text=scene_object.name + " in Image 1" * with_crop)
        thought, answer = scene_object.name, FRAME.to_text(scene_object.box)
    prompt = f"{SCENE}{CROP * (len(images) - 1)}{text}<|im_end|>\n<|im_start|>assistant\n"
    return f"{prompt}<think> {thought}</think><answer>{answer}</answer><|im_end|>", images


# ---------------------------------------------------------------- the build


class Build:
    """A build in progress: the model, the heads of the vision stage, and what has been done so far."""

    def __init__(self, out: Path, minutes: float, seed: int):
        torch.manual_seed(seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.minutes, self.seed, self.tokenizer, self.object_counts = minutes, seed, build_tokenizer(), ()
        self.model = build_model(self.tokenizer).to(device)
        heads = {"centre": nn.Linear(128, 1), "coordinates": nn.Linear(128, 4), "digits": nn.Linear(128, 120)}
        self.heads = nn.ModuleDict(heads).to(device)
        self.file = out.with_name(f"{out.name}-build") / "state.pt"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # The seconds and steps that each stage has had, and the stage that the optimizer's state belongs to.
        self.state = {"stage": "", "spent": dict.fromkeys(STAGES, 0.0), "steps": dict.fromkeys(STAGES, 0)}
        if self.file.is_file():
            self.state = torch.load(self.file, weights_only=True, map_location=device)
            self.model.load_state_dict(self.state["model"])
            self.heads.load_state_dict(self.state["heads"])

    def train(
        self, stage: str, peak_lr: float, parameters: list, loss_function: Callable, decay_lr: bool = True,
        weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        """AdamW on loss_function(rng, step) for the minutes that a stage has left; saved once a minute."""
        optimizer = torch.optim.AdamW(parameters, peak_lr, betas=(0.9, 0.98), weight_decay=weight_decay)
        if self.state["stage"] == stage:
            optimizer.load_state_dict(self.state["optimizer"])
        seconds, steps = self.state["spent"], self.state["steps"]
        budget = 60 * STAGES[stage] * self.minutes / sum(STAGES.values())
        counts = OBJECT_COUNTS.get(stage, ())
        if counts != self.object_counts and seconds[stage] < budget:
            self.draw_examples(counts)
        start = time.monotonic() - seconds[stage]
        bar = tqdm(total=round(budget), initial=round(seconds[stage]), desc=stage, unit="s", mininterval=5)
        while (progress := seconds[stage] / budget) < 1:
            # Warm-up, then a cosine, both by time: a slower machine takes fewer steps.
            cosine = 0.5 + 0.5 * math.cos(math.pi * progress) if decay_lr else 1.0
            optimizer.param_groups[0]["lr"] = peak_lr * min(1.0, progress / 0.02 + 0.01) * cosine
            rng = random.Random(f"pretraining/{self.seed}/{stage}/{steps[stage]}")
            loss, metrics = loss_function(rng, steps[stage])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            seconds[stage] = time.monotonic() - start
            steps[stage] += 1
            bar.set_postfix(metrics, refresh=False)
            bar.update(round(seconds[stage]) - bar.n)
            if seconds[stage] >= budget or seconds[stage] // 60 > progress * budget // 60:  # once a minute
                self.state |= {"stage": stage, "optimizer": optimizer.state_dict()}
                self.state |= {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
                torch.save(self.state, self.file.with_suffix(".new"))
                # A kill leaves the whole old file or the whole new one.
                self.file.with_suffix(".new").replace(self.file)

    def vision_loss(self, rng: random.Random, step: int = 0) -> tuple[Tensor, dict[str, float]]:
        """The loss of stage 1 on 32 scenes and a crop of each; also what the progress bar shows.

        A token of a scene tells whether its cell holds a centre; if so, its box, colour and shape too.
        A token of a crop tells colour and shape.
        """
        visual, heads, device = self.model.model.visual, self.heads, self.model.device
        counts = (rng.randint(3, 8) if rng.random() < 0.8 else rng.randint(1, 2) for _ in range(32))
        scenes, images = zip(*[random_scene(rng, count, suppressed=0.15) for count in counts])
        # What each token should tell: first those of the K cells that hold a centre, then those of crops.
        targets = objects_by_cell(scenes)
        K = len(targets)
        shown, crops = zip(*[(o := rng.choice(s.objects), random_crop(rng, s, o)) for s in scenes])
        targets |= {32 * 36 + j: shown[j // 4] for j in range(32 * 4)}
        index = torch.tensor(list(targets), device=device)  # [K + 128]
        tokens = torch.cat([compute_image_tokens(visual, part).flatten(0, 1) for part in (images, crops)])
        # The box twice: in numbers, and digit by digit, as the text model will have to write it.
        centre_tokens = tokens[index[:K]]  # [K, H]
        boxes = torch.tensor([o.box for o in targets.values()][:K], device=device) / SIDE  # [K, 4]
        distance = (heads["coordinates"](centre_tokens) - boxes).abs().mean()
        units = (1000 * boxes).round().clamp(max=999).long()  # [K, 4]
        digits = torch.stack([units // 100, units // 10 % 10, units % 10], -1).flatten()  # [K·4·3]
        is_centre = torch.zeros(32 * 36, device=device).index_fill_(0, index[:K], 1.0)  # [32·36]
        loss = F.binary_cross_entropy_with_logits(heads["centre"](tokens[: 32 * 36])[:, 0], is_centre)
        loss = loss + 10 * distance + 4 * F.cross_entropy(heads["digits"](centre_tokens).view(-1, 10), digits)
        # Words by the dot product with their own embeddings, so that the text model can read the tokens.
        for kind, names in (("color", list(COLORS)), ("shape", SHAPES)):
            ids = self.tokenizer.convert_tokens_to_ids([f"Ġ{name}" for name in names])
            logits = tokens[index] @ self.model.get_input_embeddings().weight[ids].T  # [K + 128, 8 or 6]
            labels = torch.tensor([names.index(getattr(o, kind)) for o in targets.values()], device=device)
            on_scenes, on_crops = (F.cross_entropy(logits[i], labels[i]) for i in (slice(K), slice(K, None)))
            loss = loss + 2 * (on_scenes + on_crops)
        return loss, {"pixels": distance.item() * SIDE, "shape": on_scenes.item()}

    @torch.no_grad()
    def start_language(self) -> None:
        """Freezes the vision tower, and lets queries start as copies of the keys.

        So the word " red" attends to red objects from the first step.
        """
        self.model.model.visual.requires_grad_(False)
        if self.state["steps"]["language"] == 0:
            for attention in (layer.self_attn for layer in self.model.model.language_model.layers):
                keys = attention.k_proj.weight.view(2, 32, 128)  # [key heads, head, H]
                attention.q_proj.weight.copy_(keys.repeat_interleave(2, 0).flatten(0, 1))

    @torch.no_grad()
    def draw_examples(self, object_counts: tuple[int, ...], count: int | None = None) -> None:
        """Draws the scenes of a stage, whose numbers of objects are equally likely, and two crops of each."""
        visual, self.examples, self.object_counts = self.model.model.visual, [], object_counts
        for start in tqdm(range(0, count or EXAMPLES, 100), desc="image tokens", mininterval=5):
            rng = random.Random(f"pretraining/{self.seed}/examples/{start}")
            counts = rng.choices(object_counts, k=100)
            scenes, images = zip(*[random_scene(rng, count, suppressed=0.25) for count in counts])
            shown = [(scene, o) for scene in scenes for o in rng.choices(scene.objects, k=2)]
            crop_tokens = compute_image_tokens(visual, [random_crop(rng, *pair) for pair in shown])
            crops = list(zip(shown, crop_tokens))  # 200 × (scene and object, [4, H])
            self.examples += zip(scenes, compute_image_tokens(visual, images), zip(crops[::2], crops[1::2]))

    def turns_loss(self, rng: random.Random, step: int, words_first: int = 0, crop_share: float = 0) -> tuple:
        """The loss of the answers in rows `[scene | turn 1 | … | turn 8]`; also what the progress bar shows.

        words_first: the number of steps in which most turns are about words, which are learned before boxes.
        """
        tokenizer, model = self.tokenizer, self.model.model
        batch, weights = (16, WORDS_FIRST) if step < words_first else (8, FINDING)
        examples = [e for e in rng.choices(self.examples, k=batch) for _ in range(TURNS)]
        texts, images = zip(*[draw_turn(rng, example, weights, crop_share) for example in examples])
        # 1. Every turn by itself, behind its own copy of the scene.
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids  # [B·8, L]
        image_id, think_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<think>"])
        # Positions depend only on where the image tokens are: there are two layouts, with a crop and without.
        layouts, index = (ids == image_id).long().unique(dim=0, return_inverse=True)  # [2, L] and [B·8]
        grids = torch.tensor([[1, 12, 12]] * len(layouts) + [[1, 4, 4]])
        position_ids = model.get_rope_index(layouts, layouts, grids)[0][:, index]  # [3, B·8, L]
        # 2. Eight turns in a row share the first copy of the scene (segment 1); the others are dropped (0).
        segment_ids = torch.arange(2, TURNS + 2).repeat(batch)[:, None] * (ids != tokenizer.pad_token_id)
        is_first = torch.arange(batch * TURNS) % TURNS == 0  # [B·8]
        segment_ids[:, : len(tokenizer(SCENE).input_ids)] = is_first[:, None]  # [B·8, L]
        # Columns of a token: id, segment, is it of the answer, and its three positions.
        columns = torch.stack([ids, segment_ids, (ids == think_id).cumsum(1), *position_ids], -1)
        rows = [row[row[:, 1] > 0] for row in columns.view(batch, -1, 6)]  # B × [tokens kept, 6]
        rows = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, K, 6]
        ids, segment_ids, is_answer, *position_ids = rows.to(model.device).unbind(-1)  # [B, K] each
        features = torch.cat([f for i, turn in enumerate(images) for f in turn[i % TURNS > 0 :]])
        embeds = model.get_input_embeddings()(ids).masked_scatter((ids == image_id)[..., None], features)
        # As in a GRPO group, a turn sees the scene and itself: it learns what it would learn alone.
        kwargs = dict(attention_mask=group_mask(segment_ids - 1), position_ids=torch.stack(position_ids))
        labels = ids.masked_fill(is_answer == 0, -100)  # [B, K]
        loss = self.model(inputs_embeds=embeds, labels=labels, use_cache=False, **kwargs).loss
        return loss, {"loss": loss.item()}


def run_build(build: Build, out: Path) -> None:
    """All four stages, or what is left of them; then the finished model is a folder like any other."""
    out.mkdir(parents=True, exist_ok=True)
    model, word_embeddings = build.model, build.model.get_input_embeddings().weight
    vision = [*model.model.visual.parameters(), *build.heads.parameters(), word_embeddings]
    build.train("vision", 2e-3, vision, build.vision_loss)
    build.start_language()
    text = list(model.model.language_model.parameters())
    build.train("language", 1.2e-3, text, partial(build.turns_loss, words_first=600), decay_lr=False)
    build.train("few things", 1.2e-3, text, build.turns_loss, decay_lr=False, weight_decay=0.7)
    build.train("two images", 1.2e-3, text, partial(build.turns_loss, crop_share=1 / 3))
    minutes = {stage: round(seconds / 60, 1) for stage, seconds in build.state["spent"].items()}
    model.config.locus_build = {"seed": build.seed, "steps": build.state["steps"], "minutes": minutes}
    model.config.locus_family, model.generation_config.do_sample = "tiny", False
    for part in (model, build.tokenizer, build_image_processor()):
        part.save_pretrained(out)
    print(f"The model is in {out}. Measure it with: python -m tiny.card --model {out}")


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tiny/model"), help="folder of the finished model")
    parser.add_argument("--minutes", type=float, default=sum(STAGES.values()), help="of training in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with exit_on_error():
        if not 0 < args.minutes < math.inf:
            raise UserError(f"--minutes {args.minutes} is no time to train: give a number above 0.")
        run_build(Build(args.out, args.minutes, args.seed), args.out)


if __name__ == "__main__":
    main()
