"""What packing a group saves: one GRPO step on one prompt, packed, as a batch of rows, and row by row.

    python tests/bench_group.py [--num-generations 8] [--prompt 600] [--answer 100] [--repeat 3]

Each layout samples G completions of full length and trains on them, in a process of its own: so its peak
memory is its own too.
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
from policy import Policy, collate, rollout
from prompts import EncodedPrompt, encode
from training.settings import Config

LAYOUTS = ("packed", "rows in a batch", "one row at a time")


def long_prompt(policy: Policy, length: int) -> EncodedPrompt:
    """A prompt of `length` tokens: an image, and text of one token a character."""
    policy.processor.family.__dict__.update(image_pixels=(1, 10**9))
    image = noise((320, 256), 0)
    prompt = encode(policy.processor, "x", image)
    return encode(policy.processor, "x" + "?" * (length - len(prompt.input_ids)), image)


def measure(
    layout: str, num_generations: int, prompt_length: int, length: int, repeat: int
) -> dict[str, float]:
    """Seconds of the rollout, of the policy and reference passes with backward, and peak memory in GB."""
    policy = random_policy("qwen3_vl", width=512, layers=10, intermediate_size=2048)
    policy.stop_ids = torch.tensor([-1])  # every completion has full length
    policy = add_lora(policy, 16)
    prompt = long_prompt(policy, prompt_length)
    # Of each pass: rows (copies of the prompt) and completions per row.
    passes = {
        "packed": [(1, num_generations)],
        "rows in a batch": [(num_generations, 1)],
        "one row at a time": [(1, 1)] * num_generations,
    }[layout]
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-6)
    cfg = Config(max_new_tokens=length, lr=1e-6, prompts=1)
    advantages = group_advantages(torch.arange(float(num_generations))[None])[0]  # [G]
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: dict[str, list[float]] = {"rollout": [], "passes": []}
    for seed in range(repeat):
        start, micro_batches = time.perf_counter(), []
        for rows, G in passes:
            batch, generator = collate(policy, [prompt] * rows), torch.Generator().manual_seed(seed)
            micro_batches.append((batch, rollout(policy, batch, G, length, generator)))
        times["rollout"].append(time.perf_counter() - start)
        start = time.perf_counter()
        shares = advantages.split([rows * G for rows, G in passes])
        micro_batches = [
            (batch, rollouts, share.view(rollouts.tokens.shape[:2]), None)
            for (batch, rollouts), share in zip(micro_batches, shares, strict=True)
        ]
        optimizer_step(policy, optimizer, micro_batches, cfg)
        times["passes"].append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before  # KiB
    parameters = sum(p.numel() for p in policy.model.parameters())
    fastest = {name: min(values) for name, values in times.items()}
    return fastest | {"memory_gb": memory / 2**20, "parameters": parameters, "prompt": len(prompt.input_ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-generations", type=int, default=8, help="completions of the prompt, G")
    parser.add_argument("--prompt", type=int, default=600, help="tokens of the prompt, P")
    parser.add_argument("--answer", type=int, default=100, help="tokens of a completion, T")
    parser.add_argument("--repeat", type=int, default=3, help="the fastest of so many steps counts")
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layout:
        numbers = (args.num_generations, args.prompt, args.answer, args.repeat)
        print(json.dumps(measure(args.layout, *numbers)))
        return
    results = {}
    for layout in LAYOUTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--layout", layout]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results[layout] = json.loads(output.strip().splitlines()[-1])
    packed = results["packed"]
    size = f"{packed['parameters'] / 1e6:.0f} M parameters"
    print(f"{size}, P = {packed['prompt']}, G = {args.num_generations}, T = {args.answer}")
    print(f"{'':20}{'rollout':>10}{'passes':>10}{'step':>10}{'memory':>10}{'time':>8}{'memory':>8}")
    for layout, result in results.items():
        step = result["rollout"] + result["passes"]
        seconds = "".join(f"{value:8.2f} s" for value in (result["rollout"], result["passes"], step))
        time_ratio = step / (packed["rollout"] + packed["passes"])
        memory_ratio = result["memory_gb"] / packed["memory_gb"]
        line = f"{layout:20}{seconds}{result['memory_gb']:7.2f} GB{time_ratio:7.1f}×{memory_ratio:7.1f}×"
        print(line)


if __name__ == "__main__":
    main()
