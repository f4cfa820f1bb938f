"""Builds the embedded model in tiny/ from nothing: a Qwen3-VL of 2 million parameters that sees and answers.

    python -m tiny.build [--out tiny/model] [--minutes 74] [--seed 0]

1. vision: throw-away heads on every image token learn what thing has its centre there, and where its box is;
2. language: over the frozen tower, whose tokens are computed once, the text model learns to answer about one
   to four things;
3. few things: the same about one, seldom two, with a strong weight decay, under which fades what only crowds
   need: the visual context rot that LOCUS is to mend;
4. two images: the same while the rate falls, and a third of the finding turns also carry a crop of something.
Cue search, which LOCUS trains, it never sees. Started again, the build goes on from its last saved minute.
"""

import argparse
import math
import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Cue
from policy import group_mask
from prompts import PROMPTS, BoxFrame
from reward import Box
from tiny.architecture import build_image_processor, build_model, build_tokenizer
from tiny.scenes import COLORS, SHAPES, SIDE, Scene, SceneObject, draw_layout, keep_only, questions, render

STAGES = {"vision": 37, "language": 32, "few things": 1, "two images": 4}  # minutes
EXAMPLES = 20_000  # scenes whose image tokens are computed once
FRAME = BoxFrame(SIDE, SIDE, 1000, 1000)
TURNS = 8  # questions a scene is asked in one sequence
WORDS_FIRST = {"What shape": 4.0, "What color": 2.0, "find": 2.0, "name": 1.0}  # the mix of turns, at first
FINDING = {"find": 5.0, "What shape": 2.0, "What color": 2.0, "Where": 3.0, "name": 0.5}  # and from then on
SCENE = f"<|im_start|>user\n<|vision_start|>{36 * '<|image_pad|>'}<|vision_end|>"
CROP = f"<|vision_start|>{4 * '<|image_pad|>'}<|vision_end|>"


def random_window(rng: random.Random, scene_object: SceneObject, most: float) -> Box:
    """A thing's box, larger all around by 0 to `most` of its side, inside the scene."""
    more = rng.uniform(0, most) * (scene_object.box[2] - scene_object.box[0])
    return tuple(
        min(SIDE, max(0, round(v + d))) for v, d in zip(scene_object.box, (-more, -more, more, more))
    )


def random_scene(rng: random.Random, count: int, suppressed: float):
    """A scene of `count` things, and its picture; at times (`suppressed`) only one of them is left to see."""
    scene = draw_layout(rng, count)
    image = render(scene)
    if rng.random() < suppressed:
        scene.objects = [rng.choice(scene.objects)]
        image = keep_only(image, random_window(rng, scene.objects[0], 0.6))
    return scene, image


def random_crop(rng: random.Random, scene: Scene, scene_object: SceneObject):
    return Cue(render(scene), random_window(rng, scene_object, 0.1), "", scene=scene).crop


def compute_image_tokens(visual: nn.Module, pictures: list) -> Tensor:
    """Image tokens [N, cells, width] of equally large pictures, without the slow image processor."""
    n, (w, h), proj = len(pictures), pictures[0].size, visual.patch_embed.proj
    x = torch.from_numpy(np.stack(pictures)).to(proj.weight.device) / 127.5 - 1  # [N, H, W, 3]
    x = x.view(n, h // 32, 2, 16, w // 32, 2, 16, 3)  # [N, cell y, patch y, y, cell x, patch x, x, 3]
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3 * 16 * 16)  # [N·cells·4, 3·16·16]
    # As a picture is two equal frames, the summed kernel will do, three times as fast as the convolution.
    visual.patch_embed.forward = lambda x: F.linear(x, proj.weight.sum(2).flatten(1), proj.bias)
    tokens = visual(x, grid_thw=torch.tensor([[1, h // 16, w // 16]] * n, device=x.device)).pooler_output
    del visual.patch_embed.forward
    return tokens.view(n, -1, tokens.shape[-1])


def draw_turn(rng: random.Random, example: tuple, weights: dict[str, float], crop_share: float):
    """One turn about an example: its whole text, answer included, and the tokens of the images in it."""
    scene, tokens, crops = example
    scene_object = rng.choice(scene.objects)
    kind = rng.choices(list(weights), list(weights.values()))[0]
    asked = [q for q in questions(scene) if q.text.startswith(kind)]
    crop = []
    if asked:
        q = rng.choice(asked)
        # What the question gives comes first, and what the answer hangs on is written before it.
        thoughts = {"What shape": q.name, "What color": " ".join(reversed(q.name.split()))}
        text, thought, answer = q.text, thoughts.get(kind, q.name + FRAME.to_text(q.box)), f" {q.answer}"
    elif kind == "name":
        (_, scene_object), *crop = rng.choice(crops)
        text, thought, answer = PROMPTS["short"]["name"], scene_object.name, f" {scene_object.name}"
    else:
        crop = [rng.choice(crops)[1]] if rng.random() < crop_share else []
        where = " in Image 1" if crop else ""
        text = PROMPTS["short"]["text"].format(text=scene_object.name + where)
        thought, answer = scene_object.name, FRAME.to_text(scene_object.box)
    text = f"{SCENE}{CROP * len(crop)}{text}<|im_end|>\n<|im_start|>assistant\n"
    return f"{text}<think> {thought}</think><answer>{answer}</answer><|im_end|>", [tokens, *crop]


class Build:
    """A build under way; `state` holds the seconds and steps that each stage has had."""

    def __init__(self, out: Path, minutes: float, seed: int):
        torch.manual_seed(seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.minutes, self.seed, self.tokenizer, self.objects = minutes, seed, build_tokenizer(), ()
        self.model = build_model(self.tokenizer).to(device)
        heads = {"centre": nn.Linear(128, 1), "coordinates": nn.Linear(128, 4), "digits": nn.Linear(128, 120)}
        self.heads = nn.ModuleDict(heads).to(device)
        self.file = out.with_name(f"{out.name}-build") / "state.pt"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.state = {"stage": "", "spent": dict.fromkeys(STAGES, 0.0), "steps": dict.fromkeys(STAGES, 0)}
        if self.file.is_file():
            self.state = torch.load(self.file, weights_only=True, map_location=device)
            self.model.load_state_dict(self.state["model"])
            self.heads.load_state_dict(self.state["heads"])

    def train(self, stage: str, peak: float, parameters: list, loss_of, fall=True, objects=(), decay=0.01):
        """AdamW for a stage's minutes; `loss_of(rng, step)` gives a loss and what to show."""
        optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=decay)
        if self.state["stage"] == stage:
            optimizer.load_state_dict(self.state["optimizer"])
        spent, steps = self.state["spent"], self.state["steps"]
        total = 60 * STAGES[stage] * self.minutes / sum(STAGES.values())
        if objects != self.objects and spent[stage] < total:
            self.draw_examples(objects)
        begun = time.monotonic() - spent[stage]
        bar = tqdm(total=round(total), initial=round(spent[stage]), desc=stage, unit="s", mininterval=5)
        while (done := spent[stage] / total) < 1:
            # Warm-up, then a cosine, both over the minutes: a slower machine takes fewer steps.
            cosine = 0.5 + 0.5 * math.cos(math.pi * done) if fall else 1.0
            optimizer.param_groups[0]["lr"] = peak * min(1.0, done / 0.02 + 0.01) * cosine
            rng = random.Random(f"pretraining/{self.seed}/{stage}/{steps[stage]}")
            loss, report = loss_of(rng, steps[stage])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            spent[stage] = time.monotonic() - begun
            steps[stage] += 1
            bar.set_postfix(report, refresh=False)
            bar.update(round(spent[stage]) - bar.n)
            if spent[stage] >= total or spent[stage] // 60 > done * total // 60:  # once a minute
                self.state |= {"stage": stage, "optimizer": optimizer.state_dict()}
                self.state |= {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
                torch.save(self.state, self.file.with_suffix(".new"))
                self.file.with_suffix(".new").replace(self.file)  # a kill leaves one of them whole

    def vision_loss(self, rng: random.Random, step: int = 0):
        """On scenes and crops; color and shape are read off by the dot product with the embedded words."""
        visual, heads, device = self.model.model.visual, self.heads, self.model.device
        counts = (rng.randint(3, 8) if rng.random() < 0.8 else rng.randint(1, 2) for _ in range(32))
        drawn, pictures = zip(*[random_scene(rng, count, suppressed=0.15) for count in counts])
        told: dict[
            int, SceneObject
        ] = {}  # image token: thing; first the cells that hold a centre, of the 32·36
        for i, scene in enumerate(drawn):
            centres = [((t.box[0] + t.box[2]) / 2, (t.box[1] + t.box[3]) / 2, t) for t in scene.objects]
            for x, y, scene_object in sorted(
                centres, key=lambda c: abs(c[0] % 32 - 16) + abs(c[1] % 32 - 16)
            ):
                told.setdefault(
                    36 * i + int(y // 32) * 6 + int(x // 32), scene_object
                )  # of two, the nearer one
        K = len(told)
        objects, crops = zip(*[(t := rng.choice(s.objects), random_crop(rng, s, t)) for s in drawn])
        told |= {32 * 36 + j: objects[j // 4] for j in range(32 * 4)}  # then all of the 32·4 of crops
        at = torch.tensor(list(told), device=device)  # [K + 128]
        tokens = torch.cat(
            [compute_image_tokens(visual, seen).flatten(0, 1) for seen in (pictures, crops)]
        )  # [1280, width]
        held = tokens[at[:K]]  # [K, width]
        is_centre = torch.zeros(32 * 36, device=device).index_fill_(0, at[:K], 1.0)
        boxes = (
            torch.tensor([scene_object.box for scene_object in told.values()][:K], device=device) / SIDE
        )  # [K, 4]
        units = (1000 * boxes).round().clamp(max=999).long()
        digits = torch.stack([units // 100, units // 10 % 10, units % 10], -1)  # [K, 4, 3]
        l1 = (heads["coordinates"](held) - boxes).abs().mean()
        loss = F.binary_cross_entropy_with_logits(heads["centre"](tokens[: 32 * 36])[:, 0], is_centre)
        loss = loss + 10 * l1 + 4 * F.cross_entropy(heads["digits"](held).view(-1, 10), digits.flatten())
        for kind, names in (("color", list(COLORS)), ("shape", SHAPES)):
            ids = self.tokenizer.convert_tokens_to_ids([f"Ġ{name}" for name in names])
            logits = tokens[at] @ self.model.get_input_embeddings().weight[ids].T  # [K + 128, 8 or 6]
            right = torch.tensor([names.index(getattr(t, kind)) for t in told.values()], device=device)
            on_scenes, on_crops = (F.cross_entropy(logits[i], right[i]) for i in (slice(K), slice(K, None)))
            loss = loss + 2 * (on_scenes + on_crops)
        return loss, {"pixels": l1.item() * SIDE, "shape": on_scenes.item()}

    @torch.no_grad()
    def start_language(self) -> None:
        """Queries start as copies of the keys: so " red" looks at red things from the first step."""
        self.model.model.visual.requires_grad_(False)
        if not self.state["steps"]["language"]:
            for attention in (layer.self_attn for layer in self.model.model.language_model.layers):
                keys = attention.k_proj.weight.view(2, 32, 128)  # [kv heads, head, width]
                attention.q_proj.weight.copy_(keys.repeat_interleave(2, 0).flatten(0, 1))

    @torch.no_grad()
    def draw_examples(self, objects: tuple[int, ...], count: int | None = None) -> None:
        """Scenes of so many things: (scene, tokens [36, width], 2 × ((scene, thing), [4, width])) each."""
        visual, self.examples, self.objects = self.model.model.visual, [], objects
        for start in tqdm(range(0, count or EXAMPLES, 100), desc="image tokens", mininterval=5):
            rng = random.Random(f"pretraining/{self.seed}/examples/{start}")
            counts = rng.choices(objects, k=100)
            drawn, pictures = zip(*[random_scene(rng, count, suppressed=0.25) for count in counts])
            shown = [
                (scene, scene_object) for scene in drawn for scene_object in rng.choices(scene.objects, k=2)
            ]
            crops = list(
                zip(shown, compute_image_tokens(visual, [random_crop(rng, *pair) for pair in shown]))
            )
            self.examples += zip(drawn, compute_image_tokens(visual, pictures), zip(crops[::2], crops[1::2]))

    def language_loss(self, rng: random.Random, step: int):
        """Words first, then finding."""
        return self.turns_loss(rng, *((16, WORDS_FIRST) if step < 600 else (8, FINDING)))

    def finding_loss(self, rng: random.Random, step: int, crop_share: float = 0.0):
        return self.turns_loss(rng, 8, FINDING, crop_share)

    def turns_loss(self, rng: random.Random, batch: int, weights: dict[str, float], crop_share: float = 0.0):
        """Of the answers in rows `[scene | turn 1 | … | turn 8]`, laid out as a GRPO group is."""
        tokenizer, model = self.tokenizer, self.model.model
        chosen = rng.choices(self.examples, k=batch)
        texts, seen = zip(*[draw_turn(rng, e, weights, crop_share) for e in chosen for _ in range(TURNS)])
        # Every turn as it would be alone, behind its own copy of the scene …
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids  # [B·8, L]
        image, think = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<think>"])
        kinds, which = (ids == image).long().unique(dim=0, return_inverse=True)  # [2, L]: with a crop or not
        grids = torch.tensor([[1, 12, 12]] * len(kinds) + [[1, 4, 4]])
        places = model.get_rope_index(kinds, kinds, grids)[0][:, which]  # [3, B·8, L]
        # … then eight in a row with one copy: a turn sees that and itself, so it learns to be the first.
        segment_ids = torch.arange(2, TURNS + 2).repeat(batch)[:, None] * (ids != tokenizer.pad_token_id)
        segment_ids[:, : len(tokenizer(SCENE).input_ids)] = (torch.arange(batch * TURNS) % TURNS == 0)[
            :, None
        ]
        table = torch.stack([ids, segment_ids, (ids == think).cumsum(1), *places], -1).view(batch, -1, 6)
        table = nn.utils.rnn.pad_sequence([t[t[:, 1] > 0] for t in table], batch_first=True)  # [B, K, 6]
        ids, segment_ids, is_answer, *places = table.to(model.device).unbind(-1)
        features = torch.cat([f for i, images in enumerate(seen) for f in images[i % TURNS > 0 :]])
        embeds = model.get_input_embeddings()(ids).masked_scatter((ids == image)[..., None], features)
        ways = dict(attention_mask=group_mask(segment_ids - 1), position_ids=torch.stack(places))
        labels = ids.masked_fill(is_answer == 0, -100)
        loss = self.model(inputs_embeds=embeds, labels=labels, use_cache=False, **ways).loss
        return loss, {"loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tiny/model"), help="folder of the finished model")
    parser.add_argument("--minutes", type=float, default=sum(STAGES.values()), help="of training in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build = Build(args.out, args.minutes, args.seed)
    model, words = build.model, build.model.get_input_embeddings().weight
    seeing = [*model.model.visual.parameters(), *build.heads.parameters(), words]
    build.train("vision", 2e-3, seeing, build.vision_loss)
    build.start_language()
    speaking = list(model.model.language_model.parameters())
    build.train("language", 1.2e-3, speaking, build.language_loss, fall=False, objects=(1, 2, 3, 4))
    few = 9 * (1,) + (2,)
    build.train("few things", 1.2e-3, speaking, build.finding_loss, fall=False, objects=few, decay=0.7)
    build.train("two images", 1.2e-3, speaking, partial(build.finding_loss, crop_share=1 / 3), objects=few)
    model.config.locus_family = "tiny"
    minutes = {stage: round(seconds / 60, 1) for stage, seconds in build.state["spent"].items()}
    model.config.locus_build = {"seed": args.seed, "steps": build.state["steps"], "minutes": minutes}
    model.generation_config.do_sample = False
    for part in (model, build.tokenizer, build_image_processor()):
        part.save_pretrained(args.out)
    print(f"{args.out} is built. Measure it: python -m tiny.card --model {args.out}")


if __name__ == "__main__":
    main()
