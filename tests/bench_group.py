"""What packing a group saves: one GRPO step of one prompt, packed, as G rows, and one row at a time.

    python tests/bench_group.py [--num-generations 8] [--prompt 600] [--answer 100] [--repeat 3]

Each way runs in a process of its own, so that its peak memory is its own; the answers are the same.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from random_models import noise, random_policy

from locus_mini import group_advantages, optimizer_step
from models import add_lora
from policy import collate, rollout
from prompts import encode
from training.settings import Config

WAYS = ("packed", "rows in a batch", "one row at a time")


def measure(way: str, group: int, prompt: int, length: int, repeat: int) -> dict[str, float]:
    """Seconds of the rollout and of the policy and reference passes with backward, and peak memory."""
    policy = random_policy("qwen3_vl", width=512, layers=10, intermediate_size=2048)
    policy.stop_ids = torch.tensor([-1])  # every answer has full length
    policy = add_lora(policy, 16)
    picture = noise((320, 256), 0)
    policy.processor.family.__dict__.update(image_pixels=(1, 10**9))
    item = encode(policy.processor, "x", picture)
    item = encode(policy.processor, "x" + "?" * (prompt - len(item.input_ids)), picture)  # a token each
    answers = {
        "packed": [(1, group)],
        "rows in a batch": [(group, 1)],
        "one row at a time": [(1, 1)] * group,
    }[way]
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    cfg = Config(max_new_tokens=length, lr=1e-6, prompts=1)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: dict[str, list[float]] = {"rollout": [], "passes": []}
    for seed in range(repeat):
        began, passes = time.perf_counter(), []
        for rows, G in answers:
            batch = collate(policy, [item] * rows)
            passes.append((batch, rollout(policy, batch, G, length, torch.Generator().manual_seed(seed))))
        times["rollout"].append(time.perf_counter() - began)
        began = time.perf_counter()
        advantages = group_advantages(torch.arange(float(group))[None])[0]  # [G]
        taken, full = 0, []
        for batch, rollouts in passes:
            count = rollouts.tokens.shape[0] * rollouts.tokens.shape[1]
            full.append(
                (batch, rollouts, advantages[taken : taken + count].view(rollouts.tokens.shape[:2]), None)
            )
            taken += count
        optimizer_step(policy, optimizer, full, cfg)
        times["passes"].append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(p.numel() for p in policy.model.parameters())
    best = {name: min(values) for name, values in times.items()}
    return best | {"memory_gb": (peak - base) / 2**20, "parameters": size, "prompt": len(item.input_ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=600)
    parser.add_argument("--answer", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    numbers = (args.num_generations, args.prompt, args.answer, args.repeat)
    if args.way:
        print(json.dumps(measure(args.way, *numbers)))
        return
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way]
        for name, value in zip(("--num-generations", "--prompt", "--answer", "--repeat"), numbers):
            command += [name, str(value)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[way] = json.loads(out.strip().splitlines()[-1])
    first = found["packed"]
    size = f"{first['parameters'] / 1e6:.0f} M parameters"
    print(f"{size}, P = {first['prompt']}, G = {args.num_generations}, T = {args.answer}")
    print(f"{'':20}{'rollout':>10}{'passes':>10}{'step':>10}{'memory':>10}{'time':>8}{'memory':>8}")
    for way, m in found.items():
        step = m["rollout"] + m["passes"]
        times = step / (first["rollout"] + first["passes"])
        line = f"{way:20}{m['rollout']:8.2f} s{m['passes']:8.2f} s{step:8.2f} s{m['memory_gb']:7.2f} GB"
        print(line + f"{times:7.1f}×{m['memory_gb'] / first['memory_gb']:7.1f}×")


if __name__ == "__main__":
    main()
