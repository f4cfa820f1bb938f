"""Operators that one decoding step calls, plain and fused: 64 completions, 4 bit, LoRA of rank 16.

    python tests/count_dispatches.py [--layers 36]

A GPU spends a decoding step on launching kernels, so their number decides how long it takes. Every operator
that PyTorch dispatches is counted, views too, although they launch nothing. RMSNorm counts as one operator,
as on a GPU (a CPU computes it in seven). The count depends on the layers of a model and not on their width,
so a model of Qwen2.5-VL-3B's shape with miniature layers has that of the full size; two layers of full width
check it.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import families
import torch
from random_models import noise
from torch.utils._python_dispatch import TorchDispatchMode

from models import add_lora, load_policy
from policy import Policy, collate, rollout, run_text
from prompts import encode
from training.decoding import FusedDecoder

NAME, LIMIT = "Qwen2.5-VL-3B-Instruct", 1800
# Views that autograd knows as such, and `_unsafe_view`, the one in which a matrix product ends.
VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "slice",
    "transpose",
    "unsqueeze",
    "select",
    "expand",
    "permute",
    "alias",
}
VIEWS |= {"split", "split_with_sizes", "unbind", "detach"}


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that are dispatched while it is active, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def rms_norm_kernel(x: torch.Tensor, shape: list[int], weight: None, eps: float) -> tuple[torch.Tensor, ...]:
    """Stands in for a GPU's kernel of RMSNorm: a CPU has none."""
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x * scale).to(x.dtype), scale


def build_policy(folder: Path, layers: int, miniature: bool = True) -> Policy:
    """A policy of random weights in bf16 and 4 bit, with an adapter and completions that never stop."""
    overrides = dict(num_hidden_layers=layers, vocab_size=512)
    families.random_weights(families.settings(NAME, folder, miniature=miniature, **overrides))
    policy = add_lora(load_policy(str(folder), load_in_4bit=True, dtype=torch.bfloat16), 16)
    return replace(policy, stop_ids=torch.tensor([-1]))


def count_step(policy: Policy, fused: bool) -> Counter[str]:
    """The operators of a decoding step: those of a rollout of four tokens less those of three."""
    prompts = [encode(policy.processor, "Find it.", noise((90, 60), i)) for i in range(8)]
    batch, counts = collate(policy, prompts), []
    for num_tokens in (3, 4):
        decode: Callable = FusedDecoder(policy, 8, num_tokens) if fused else run_text
        with torch.library._scoped_library("aten", "IMPL") as library, OperatorCounter() as counter:
            library.impl("_fused_rms_norm", rms_norm_kernel, "CPU")
            rollout(policy, batch, 8, num_tokens, torch.Generator().manual_seed(0), decode)
        counts.append(counter.counts)
    return counts[1] - counts[0]


def launches(counts: Counter[str]) -> int:
    return sum(number for name, number in counts.items() if name not in VIEWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=36, help="text layers of the model")
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as temp:
        policy = build_policy(Path(temp) / "miniature", layers)
        plain, fused = count_step(policy, False), count_step(policy, True)
        for label, counts in (("plain", plain), ("fused", fused)):
            print(f"{label}: {launches(counts)} operators and {counts.total() - launches(counts)} views")
        print("fused, the most frequent:", ", ".join(f"{n} {name}" for name, n in fused.most_common(16)))
        small = [count_step(build_policy(Path(temp) / f"small{n}", n), True) for n in (1, 2)]
        full = [count_step(build_policy(Path(temp) / f"full{n}", n, False), True) for n in (1, 2)]
    same = small[1] - small[0] == full[1] - full[0] and small[0] == full[0]
    print(f"a layer of full width calls {'the same operators' if same else full[1] - full[0]}")
    assert same and fused.total() <= LIMIT


if __name__ == "__main__":
    main()
