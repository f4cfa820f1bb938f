"""One run of eval.py: the model with and without its adapter, its reply cache, and its folder."""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.reply_cache import ReplyCache, at_a_time, recall
from files.disk import file_stats, fingerprint
from files.errors import model_folder
from policy import Policy
from prompts import PROMPTS, Encoded, Tools

LONGEST = 8192  # tokens of an answer to a benchmark, the paper's


@dataclass
class Run:
    """What every task needs."""

    policy: Policy
    args: argparse.Namespace
    known: ReplyCache
    folder: Path

    @property
    def sides(self) -> list[tuple[str, Callable]]:
        """Each model as (name, context in which `policy` is that model): the base, then the adapted one."""
        both = [("before", self.policy.reference), ("after", nullcontext)]
        return both if self.args.adapter is not None else both[:1]

    @property
    def tools(self) -> Tools:
        """For pictures as large as the model's own settings allow, not as training limits them."""
        tools, size = self.policy.tools, self.policy.tools.image_processor.size
        pixels = (size["shortest_edge"], size["longest_edge"])
        return replace(tools, family=replace(tools.family, image_pixels=pixels))

    def ways(self, benchmark: bool = False) -> tuple[int, int]:
        """The longest answer in tokens, and how many prompts at a time."""
        family = self.policy.tools.family
        usual = LONGEST if benchmark and PROMPTS[family.template]["think"] else family.max_new_tokens
        return self.args.max_new_tokens or usual, self.args.batch or at_a_time(self.policy)

    def ask(
        self, name: str, items: Sequence[Encoded], keys: list | None = None, benchmark: bool = False
    ) -> list:
        return recall(self.policy, self.known, name, items, self.ways(benchmark), keys)


def open_run(policy: Policy, args: argparse.Namespace) -> Run:
    """A run with its reply cache, in a folder beside the adapter; other settings have another folder."""
    settings = {name: str(value) for name, value in vars(args).items() if value is not None}
    settings = {name: value for name, value in settings.items() if name != "out"}
    inputs = (model_folder(args.model), args.adapter, args.data, args.annotations, args.images, args.image)
    for path in inputs:
        if path is not None and Path(path).exists():
            settings[f"{path} as of"] = fingerprint(file_stats(Path(path)))
    name = f"{args.task}-{fingerprint([json.dumps(settings, sort_keys=True).encode()])}"
    folder = args.out or (args.adapter.parent if args.adapter else Path("runs") / "eval") / name
    return Run(policy, args, ReplyCache(folder / "answers.jsonl", settings), folder)
