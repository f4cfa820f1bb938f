"""One run of eval.py: the model with and without its adapter, its reply cache, and its folder."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.reply_cache import ReplyCache, cached_generate, default_batch_size
from files.disk import file_stats, fingerprint
from files.errors import model_folder
from policy import Policy
from prompts import PROMPTS, EncodedPrompt, Processor

LONGEST = 8192  # tokens of an answer to a benchmark, the paper's


@dataclass
class Session:
    """What every task needs."""

    policy: Policy
    args: argparse.Namespace
    cache: ReplyCache
    folder: Path

    @property
    def model_names(self) -> list[str]:
        """For people: the titles of the models in the order of `each_model`."""
        return ["base model", "with adapter"][: 1 + (self.args.adapter is not None)]

    def each_model(self) -> Iterator[str]:
        """Yields "before", with the adapter switched off, then "after" with it, if there is one."""
        with self.policy.reference():
            yield "before"
        if self.args.adapter is not None:
            yield "after"

    @property
    def processor(self) -> Processor:
        """For pictures as large as the model's own settings allow, not as training limits them."""
        processor, size = self.policy.processor, self.policy.processor.image_processor.size
        pixels = (size["shortest_edge"], size["longest_edge"])
        return replace(processor, family=replace(processor.family, image_pixels=pixels))

    def generation_limits(self, benchmark: bool = False) -> tuple[int, int]:
        """The longest answer in tokens, and how many prompts at a time."""
        family = self.policy.processor.family
        usual = LONGEST if benchmark and PROMPTS[family.template]["think"] else family.max_new_tokens
        return self.args.max_new_tokens or usual, self.args.batch or default_batch_size(self.policy)

    def generate(
        self, name: str, items: Sequence[EncodedPrompt], keys: list | None = None, benchmark: bool = False
    ) -> list:
        return cached_generate(self.policy, self.cache, name, items, self.generation_limits(benchmark), keys)


def open_session(policy: Policy, args: argparse.Namespace) -> Session:
    """A run with its reply cache, in a folder beside the adapter; other settings have another folder."""
    settings = {name: str(value) for name, value in vars(args).items() if value is not None}
    settings = {name: value for name, value in settings.items() if name != "out"}
    inputs = (model_folder(args.model), args.adapter, args.data, args.annotations, args.images, args.image)
    for path in inputs:
        if path is not None and Path(path).exists():
            settings[f"{path} as of"] = fingerprint(file_stats(Path(path)))
    name = f"{args.task}-{fingerprint([json.dumps(settings, sort_keys=True).encode()])}"
    folder = args.out or (args.adapter.parent if args.adapter else Path("runs") / "eval") / name
    return Session(policy, args, ReplyCache(folder / "answers.jsonl", settings), folder)
