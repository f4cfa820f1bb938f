"""Export and reward in TRL: `pytest tests/scale/ -s` in the environment of scale/requirements.txt."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed here: pip install -r scale/requirements.txt")

sys.path.append(str(Path(__file__).parents[2] / "tests"))

import families
import torch
from accelerate.commands.config.config_args import load_config_from_file
from bench_trl import GROUP, make_trainer, rows_of
from datasets import load_dataset
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, TrainerCallback

from data import Cue, CueConfig, encode_cue, scene_cues
from files.errors import model_folder
from locus_mini import group_advantages, optimizer_step
from models import add_lora, load_policy
from policy import Policy, Rollout, collate, decode_completions, rollout, token_logps
from prompts import box_frame
from reward import reward
from scale.export import find_target
from training.settings import Config

ROOT = Path(__file__).parents[2]
HERE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run(*command: object, **env: str) -> str:
    """Output of a command that must succeed."""
    options = dict(cwd=ROOT, env=HERE | env, capture_output=True, text=True)
    done = subprocess.run([*map(str, command)], **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


MULTI = (
    "--multi_gpu --num_processes 2 --mixed_precision no --dynamo_backend no"  # with --use_cpu: two on a CPU
)
TWO = [
    f"--num_machines 2 --machine_rank {i} --main_process_ip 127.0.0.1 --main_process_port 29511"
    for i in (0, 1)
]


@pytest.mark.parametrize(("steps", "machines"), [(10, ["--num_machines 1"]), (2, TWO)])
def test_two_processes_train_and_the_adapter_loads_into_eval(tmp_path, steps, machines):
    """From one launch, and from two that act as two machines."""
    cues, out, launched = tmp_path / "cues", tmp_path / "out", []
    run(sys.executable, "-m", "scale.export", cues, "--format", "trl", "--limit", 80)
    flags = f"--lora-rank 16 --prompts 8 --updates 1 --max_steps {steps} --learning_rate 7e-4 --use_cpu"
    train = ["scale.train_trl", cues, "--output_dir", out, "--max_completion_length", 40, *flags.split()]
    accelerate, cache = Path(sys.executable).with_name("accelerate"), str(tmp_path / "cache")
    with ThreadPoolExecutor() as pool:
        for machine in machines:
            command = [accelerate, "launch", *MULTI.split(), *machine.split(), "--module", *train]
            launched.append(pool.submit(run, *command, HF_DATASETS_CACHE=cache))
    assert all("reward" in future.result() for future in launched[:1]) and launched[-1].result()
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    rewards = [line["reward"] for line in log if "reward" in line]
    print(f"\n{len(machines)} launch: rewards {' '.join(f'{r:.3f}' for r in rewards)}")
    assert len(rewards) == steps and all(0 <= r <= 1 for r in rewards) and max(rewards) > 0
    weights = load_file(out / "adapter_model.safetensors")
    assert any(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)
    scores = run(sys.executable, "eval.py", "scenes", "--adapter", out, "--n", 20, "--out", tmp_path / "eval")
    assert "cue search (IoU)" in scores


@pytest.mark.parametrize(("name", "processes"), [("one_machine", 8), ("two_machines", 16)])
def test_accelerate_reads_the_configurations(name, processes):
    config = load_config_from_file(str(ROOT / "scale" / f"{name}.yaml"))  # refuses keys that it does not know
    assert (config.num_processes, config.num_machines) == (processes, processes // 8)
    assert config.distributed_type == "DEEPSPEED" and config.deepspeed_config["zero_stage"] == 3


def test_rows_for_easyr1_pass_datasets(tmp_path):
    run(sys.executable, "-m", "scale.export", tmp_path / "cues", "--format", "easyr1", "--limit", 5)
    path, cache = str(tmp_path / "cues" / "train.jsonl"), str(tmp_path / "cache")
    data = load_dataset("json", data_files=path, split="train", cache_dir=cache)
    assert data.column_names == ["problem", "images", "answer"] and len(data) == 5
    for row in data:
        assert row["problem"].count("<image>") == len(row["images"]) == 2
        assert all((tmp_path / "cues" / name).is_file() for name in row["images"])


def test_trl_sees_what_the_loop_sees():
    """The processor of train_trl.py, torchvision's, gives the tokens and pixels that encode gives."""
    policy, scenes = load_policy("tiny"), scene_cues(CueConfig(), "train", 4)
    low, high = policy.processor.family.image_pixels
    processor = AutoProcessor.from_pretrained(model_folder("tiny"), min_pixels=low, max_pixels=high)
    for cue in (scenes[i] for i in range(4)):
        (row,), item = rows_of(policy, [cue], "object"), encode_cue(policy.processor, cue, "object")
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        seen = processor(images=row["images"], text=[text], return_tensors="pt")
        assert seen["input_ids"][0].tolist() == item.input_ids.tolist()
        assert seen["mm_token_type_ids"][0].tolist() == item.mm_token_type_ids.tolist()
        pixels = torch.cat([picture.pixel_values for picture in item.images])
        assert (seen["pixel_values"] - pixels).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct", "Qwen3-VL-4B-Instruct", "MiMo-VL-7B-RL"])
def test_processors_keep_the_limits_that_boxes_are_for(tmp_path, name):
    folder = str(families.settings(name, tmp_path))
    target = find_target("trl", folder, None, [56**2, 600 * 28**2])
    low, high = target.pixels
    processor = AutoProcessor.from_pretrained(folder, min_pixels=low, max_pixels=high).image_processor
    for size in ((640, 480), (2000, 1500), (60, 40)):
        grid = processor(Image.new("RGB", size), return_tensors="pt")["image_grid_thw"][0]
        assert target.frame(*size) == box_frame(target.family.box_frame, *size, grid, processor.patch_size)


# ---------------------------------------------------------------- one step, ours and TRL's


def with_random_adapter(model: torch.nn.Module) -> None:
    """B of every adapter drawn instead of 0, the same for models of the same shape."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name or "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


def gradient(model: PeftModel) -> torch.Tensor:
    found = sorted((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    assert found and all("lora_" in name for name, _ in found)
    return torch.cat([grad.flatten() for _, grad in found])


def cosine_of(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.double(), b.double(), dim=0).item()


@pytest.fixture(scope="module")
def recorded() -> tuple[Policy, list[Cue], list, Rollout, torch.Tensor, torch.Tensor]:
    """Our policy with a non-zero adapter, four cues, its completions for them, and their rewards."""
    policy = add_lora(load_policy("tiny"), 8)
    with_random_adapter(policy.model)
    scenes = scene_cues(CueConfig(), "train", 11)
    cues = [scenes[i] for i in range(4)]
    items = [encode_cue(policy.processor, cue, "object") for cue in cues]
    rollouts = rollout(policy, collate(policy, items), GROUP, 40, torch.Generator().manual_seed(2))
    groups = zip(decode_completions(policy, rollouts), items, cues)
    rewards = torch.tensor([[reward(t, i.frame.to_units(c.box)).total for t in g] for g, i, c in groups])
    assert rollouts.mask.sum(-1).unique().numel() > 1 and (rewards.std(1) > 0).any()
    return policy, cues, items, rollouts, rewards, group_advantages(rewards)


def replay(recorded: tuple, folder: Path, **settings) -> tuple:
    """TRL's trainer with our adapter, made to return the recorded completions, and its batch of prompts."""
    _, cues, _, rollouts, _, _ = recorded
    other = load_policy("tiny")
    rows = rows_of(other, cues, "object")
    batch = dict(per_device_train_batch_size=len(cues) * GROUP, max_completion_length=40, max_steps=1)
    trainer = make_trainer(other, 8, rows, str(folder), **batch, gradient_checkpointing=False, **settings)
    with_random_adapter(trainer.model)
    pairs = zip(rollouts.tokens.flatten(0, 1), rollouts.mask.flatten(0, 1))
    completions = [tokens[mask].tolist() for tokens, mask in pairs]
    trainer._generate_single_turn = lambda *_, **__: (completions, None)
    return trainer, [trainer.train_dataset[i] for i in range(len(cues)) for _ in range(GROUP)]


def our_step(recorded: tuple, old: torch.Tensor | None, **settings) -> tuple[float, torch.Tensor, float]:
    policy, _, items, rollouts, _, advantages = recorded
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.0)
    batch = (collate(policy, items), rollouts, advantages, old)
    # TRL corrects for its sampler only where that is vLLM.
    cfg = Config(prompts=4, max_new_tokens=40, importance_sampling_cap=0.0, **settings)
    metrics = optimizer_step(policy, optimizer, [batch], cfg)
    return metrics["loss"], gradient(policy.model), metrics["grad_norm"]


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_loss_and_gradient_agree_on_recorded_completions(recorded, tmp_path, dual_clip):
    """Off policy, so that clips and KL matter; the same completions, rewards, advantages and old values."""
    policy, _, items, rollouts, rewards, advantages = recorded
    with torch.no_grad():
        logps = token_logps(policy, collate(policy, items), rollouts.tokens, rollouts.mask)
    generator = torch.Generator().manual_seed(3)
    old = logps + torch.randn(logps.shape, generator=generator) * rollouts.mask
    ratio = (logps - old).exp()
    assert (ratio > 3).any() and (ratio < 0.8).any()
    loss, ours, norm = our_step(recorded, old, beta=0.04, dual_clip=dual_clip or 1e9)
    trainer, inputs = replay(recorded, tmp_path, beta=0.04, delta=dual_clip)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    given = trainer._generate_and_score_completions(inputs)
    assert [row[row != 0].tolist() for row in given["prompt_ids"][::GROUP]] == [
        i.input_ids.tolist() for i in items
    ]
    assert torch.tensor(trainer._logs["rewards"]["box_reward"]).view_as(rewards).allclose(rewards, atol=1e-6)
    assert given["advantages"].view_as(advantages).allclose(advantages, atol=1e-2)  # std + 1e-4, not 1e-6
    given |= {"advantages": advantages.flatten(), "old_per_token_logps": old.flatten(0, 1)}
    its = trainer.compute_loss(trainer.model, given)
    its.backward()
    theirs = gradient(trainer.model)
    cosine = cosine_of(ours, theirs)
    print(f"\ndual clip {dual_clip}: loss {loss:.6f} and {its.item():.6f}, cosine {cosine:.7f}")
    assert loss == pytest.approx(its.item(), abs=1e-4) and abs(loss) > 1e-3
    assert cosine > 0.999 and norm == pytest.approx(theirs.norm().item(), rel=1e-2)


class Grab(TrainerCallback):
    """The gradient just before TRL's optimizer step."""

    def on_pre_optimizer_step(self, *_, model, **__) -> None:
        self.found = gradient(model)


def test_a_whole_step_of_trl_has_our_gradient(recorded, tmp_path):
    """TRL's own loop from prompts to optimizer, with its own advantages, on the recorded completions."""
    loss, ours, _ = our_step(recorded, None, beta=0.04, dual_clip=3.0)
    (trainer, _), grab = replay(recorded, tmp_path, beta=0.04, delta=3.0, learning_rate=1e-5), Grab()
    trainer.add_callback(grab)
    trainer.train()
    its = trainer.state.log_history[0]["loss"]
    cosine = cosine_of(ours, grab.found)
    print(f"\na whole step: loss {loss:.6f} and {its:.6f}, cosine {cosine:.7f}")
    assert loss == pytest.approx(its, abs=1e-3) and cosine > 0.999
