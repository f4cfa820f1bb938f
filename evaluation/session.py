"""One run of eval.py: the model with and without its adapter, its reply cache, and its folder."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.reply_cache import ReplyCache, cached_generate, default_batch_size
from files.checkpoints import check_device
from files.disk import file_stats, fingerprint
from files.errors import model_folder
from models import device_and_dtype, load_adapter, load_policy
from policy import Policy
from prompts import PROMPTS, Family, Processor

OUTPUTS = ("out", "export_vlmevalkit")  # flags that change no reply
TITLES = {"before": "base model", "after": "with adapter"}  # of the models, by what `each_model` yields
MAX_TOKENS = 8192  # of a reply to a benchmark by a model that is told to think: the paper's limit


@dataclass
class Session:
    """What every task of eval.py needs."""

    policy: Policy
    processor: Processor  # images up to the checkpoint's own limits; the policy's has its family's
    args: argparse.Namespace
    cache: ReplyCache
    folder: Path  # of results.json

    def each_model(self) -> Iterator[str]:
        """Yields "before", with the adapter switched off, then "after" with it, if there is one."""
        with self.policy.reference():
            yield "before"
        if self.args.adapter is not None:
            yield "after"

    def generation_limits(self, benchmark: bool = False) -> tuple[int, int]:
        """The longest reply in tokens, and the number of prompts per batch."""
        family = self.policy.processor.family
        longest = MAX_TOKENS if benchmark and PROMPTS[family.template]["think"] else family.max_new_tokens
        return self.args.max_new_tokens or longest, self.args.batch or default_batch_size(self.policy)

    def generate(self, name: str, prompts: Sequence, keys: Sequence = (), benchmark: bool = False) -> list:
        """A Reply to each prompt, from the cache where it holds one; see `cached_generate`."""
        limits = self.generation_limits(benchmark)
        return cached_generate(self.policy, self.cache, name, prompts, limits, keys)


def open_session(args: argparse.Namespace, fit: Callable[[Family], Family]) -> Session:
    """A run with its model and reply cache, in a folder beside the adapter; other settings get another.

    fit: gives the model's family the areas of training, for prompts of cues and scenes.
    """
    check_device(args.model, *device_and_dtype(args.cpu), args.cpu)
    policy = load_policy(args.model, args.load_in_4bit, args.box_frame, cpu=args.cpu)
    policy = load_adapter(policy, args.adapter) if args.adapter else policy
    policy.processor.family = replace(fit(policy.processor.family), cue_text=args.cue_prompt or "")
    size = policy.processor.image_processor.size
    family = replace(policy.processor.family, image_pixels=(size["shortest_edge"], size["longest_edge"]))
    settings = {key: str(flag) for key, flag in vars(args).items() if flag is not None and key not in OUTPUTS}
    files = (model_folder(args.model), args.adapter, args.data, args.annotations, args.images, args.exclude)
    # Files that change under the same name make other replies, so their dates are settings too.
    existing = [path for path in (*files, args.image) if path is not None and Path(path).exists()]
    settings |= {f"{path} as of": fingerprint(file_stats(Path(path)).values()) for path in existing}
    name = f"{args.task}-{fingerprint([json.dumps(settings, sort_keys=True).encode()])}"
    folder = args.out or (args.adapter.parent if args.adapter else Path("runs") / "eval") / name
    cache = ReplyCache(folder / "answers.jsonl", settings)
    return Session(policy, replace(policy.processor, family=family), args, cache, folder)
