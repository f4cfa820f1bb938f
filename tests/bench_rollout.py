"""How much faster the embedded model's rollouts are than at another commit, in alternated pairs.

    python tests/bench_rollout.py 82217b1 [--pairs 5] [--steps 12] [--threads 2]

Each measurement is a process of its own, which samples the completions of the default run's first steps with
a fresh adapter: 8 new prompts × 8 completions a step, image features included. Times are wall-clock seconds
and processor seconds; the latter say something on a busy machine too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def measure(checkout: str, steps: int, threads: int) -> dict[str, float]:
    """Seconds and tokens of the rollouts of `steps` steps, by the code in a checkout."""
    sys.path.insert(0, checkout)
    import torch

    from data import CueConfig, open_cues
    from locus_mini import sample_batch, sample_completions
    from models import add_lora, load_policy
    from training.settings import resolve

    torch.set_num_threads(threads)
    policy = add_lora(load_policy("tiny", load_in_4bit=False), 16)
    cfg, _ = resolve({}, policy.processor.family)
    cues = open_cues("scenes", "train", 0, CueConfig())
    batches = [sample_batch(policy.processor, cues, step, cfg) for step in range(steps + 1)]
    sample_completions(policy, batches[0], 0, cfg)  # warms up
    start, processor_start, tokens = time.perf_counter(), time.process_time(), 0
    for step, batch in enumerate(batches[1:], 1):
        tokens += int(sample_completions(policy, batch, step, cfg).mask.sum())
    seconds, processor = time.perf_counter() - start, time.process_time() - processor_start
    return {"seconds": seconds / steps, "processor seconds": processor / steps, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with; or with --measure, a checkout's folder")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each of the two")
    parser.add_argument("--steps", type=int, default=12, help="rollouts of a measurement")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.commit, args.steps, args.threads)))
        return
    with tempfile.TemporaryDirectory() as before:
        archive = subprocess.run(
            ["git", "archive", args.commit], cwd=ROOT, stdout=subprocess.PIPE, check=True
        ).stdout
        path = Path(before) / "archive.tar"
        path.write_bytes(archive)
        with tarfile.open(path) as tar:
            tar.extractall(before, filter="data")
        pairs = []
        for i in range(args.pairs):
            results = {}
            # The order changes from pair to pair, so that neither always runs on the warmer machine.
            for checkout in (before, str(ROOT))[:: 1 if i % 2 == 0 else -1]:
                command = [sys.executable, __file__, checkout, "--measure", f"--steps={args.steps}"]
                command.append(f"--threads={args.threads}")
                output = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
                results[checkout] = json.loads(output.stdout.strip().splitlines()[-1])
            pairs.append((results[before], results[str(ROOT)]))
            first, second = pairs[-1]
            for name in ("seconds", "processor seconds"):
                ratio = first[name] / second[name]
                print(f"pair {i + 1}: {first[name]:.3f} and {second[name]:.3f} {name}, {ratio:.2f} ×")
    for name in ("seconds", "processor seconds"):
        ratio = statistics.median(first[name] / second[name] for first, second in pairs)
        print(f"median of {args.pairs} pairs, {name} a rollout: {ratio:.2f} × faster than {args.commit}")
    tokens = [sum(result[i]["tokens"] for result in pairs) for i in range(2)]
    print(f"tokens sampled: {tokens[0]} and {tokens[1]}, {args.threads} threads")


if __name__ == "__main__":
    main()
