"""The multimodal model as a policy: roll out groups of answers, score them.

A group is G answers to one prompt, and the prompt (two images) is most of the tokens. So a prompt is one
row, in the rollout and in every later pass: `[prompt | the tokens of all G answers]`, where a mask lets each
answer see the prompt and itself, and positions start again after the prompt for every answer.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from files.errors import UserError
from prompts import Encoded, Tools

LOGITS = 2**24  # numbers held at a time where answers are scored: 67 MB in float32
FEW = 64  # tokens of a row that ask at a time, in a rollout
PATCHES = 2**15  # of pictures that are seen at a time


@dataclass
class Policy:
    """A model with what surrounds it."""

    model: Any  # the transformers model, or that model wrapped by peft
    tools: Tools
    device: torch.device
    forbidden: Tensor  # [V], added to logits: −inf for image and video tokens, which nothing could stand for
    stop_ids: Tensor

    @property
    def whole(self) -> nn.Module:
        """The transformers model with its lm_head; an adapter works in place, so it acts here too."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def reference(self):
        """Context in which the policy is its own reference: the adapter is off."""
        return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **ways: Any
) -> tuple[Tensor, None]:
    """SDPA for transformers, in which the heads that share keys ask as one, if their questions are few.

    query: [B, A, Q, D]; key, value: [B, K, L, D]; mask: [B, 1, Q, L]. The usual way gives each of the A heads
    a copy of its keys, which in a rollout is to write and read several times the cache for every token.
    """
    (B, A, Q, D), share = query.shape, query.shape[1] // key.shape[1]
    if attention_mask is None or Q > FEW or share == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **ways)
    asked = query.reshape(B, A // share, share * Q, D)  # [B, K, share·Q, D]
    mask = attention_mask.repeat(1, 1, share, 1)  # [B, 1, share·Q, L]
    out = F.scaled_dot_product_attention(asked, key, value, mask, scale=ways.get("scaling"))
    return out.reshape(B, A, Q, D).transpose(1, 2).contiguous(), None  # [B, Q, A, D]


hf.AttentionInterface.register("sdpa", attend)


# ---------------------------------------------------------------- prompts in a batch


@dataclass
class Batch:
    """B prompts, padded on the left to P columns."""

    items: list[Encoded]
    ids: Tensor  # [B, P]
    segments: Tensor  # [B, P]: 0 prompt, −1 padding
    positions: Tensor  # [3, B, P]: M-RoPE's t, h, w
    start: Tensor  # [B]: position of the first answer token


@torch.no_grad()
def see(policy: Policy, items: list[Encoded]) -> None:
    """Features of the pictures that have none yet. The vision tower is frozen: once is enough."""
    new = list({id(p): p for item in items for p in item.pictures if p.features is None}.values())
    if not new:
        return
    if len(items) > 1 and sum(len(picture.pixels) for picture in new) > PATCHES:
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            see(policy, half)
        return
    pixels = torch.cat([picture.pixels for picture in new]).to(policy.device)  # [patches, C·2·p·p]
    grids = torch.stack([picture.grid for picture in new]).to(policy.device)  # [images, 3]
    seen = policy.whole.model.get_image_features(pixels, grids)
    layers = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]
    for i, picture in enumerate(new):
        # On the CPU: a step of many prompts would fill a GPU with them, and sending is cheap.
        picture.features = [layer[i].cpu() for layer in layers]  # (1 + deepstack) × [cells, H]
        picture.pixels = torch.empty(0)


def collate(policy: Policy, items: list[Encoded]) -> Batch:
    """Prompts as a left-padded batch, with explicit M-RoPE positions (those in a model may be stale)."""
    see(policy, items)
    length = max(len(item.ids) for item in items)

    def stack(rows: list[Tensor], value: int = 0) -> Tensor:
        return torch.stack([F.pad(row, (length - len(row), 0), value=value) for row in rows])  # [B, P]

    ids = stack([item.ids for item in items], policy.tools.tokenizer.pad_token_id)
    kinds, there = stack([item.kinds for item in items]), stack([torch.ones_like(item.ids) for item in items])
    grids = torch.stack([picture.grid for item in items for picture in item.pictures])  # [images, 3]
    rope = policy.whole.model.get_rope_index
    positions, _ = rope(ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=there)  # [3, B, P]
    start = positions.masked_fill(there[None] == 0, -1).amax((0, 2)) + 1  # [B]
    return Batch(items, *(t.to(policy.device) for t in (ids, there - 1, positions, start)))


def group_mask(segments: Tensor, queries: int | None = None) -> Tensor:
    """Who sees whom in rows `[prompt | answers]`: the prompt and oneself, never the future.

    segments: [B, L], 0 where the prompt stands, g ≥ 1 for answer g, −1 for padding; the columns of different
    answers may alternate. queries: how many of the last columns ask (default all). Result: bool [B, 1, Q, L].
    """
    asking = segments if queries is None else segments[:, -queries:]  # [B, Q]
    keys, column = segments[:, None], torch.arange(segments.shape[1], device=segments.device)
    row = column[-asking.shape[1] :, None]  # [Q, 1]
    own = (keys == 0) | ((keys == asking[..., None]) & (keys > 0))  # [B, Q, L]
    itself = column == row  # [Q, L]: also of padding, since a softmax over nothing is NaN
    return ((own & (column <= row)) | itself)[:, None]


def run_text(
    policy: Policy, ids: Tensor, segments: Tensor, positions: Tensor, items=None, cache=None
) -> Tensor:
    """Last hidden states [B, Q, H] of the tokens ids [B, Q], the last Q columns of segments [B, L].

    positions: [3, B, Q]. items: the prompts whose images stand in `ids`. cache: keys and values of the
    columns before, which this call extends.
    """
    seen = {}
    if items is not None:
        features = [[f.to(ids.device) for f in p.features] for item in items for p in item.pictures]
        layers = list(zip(*features, strict=True))  # (1 + deepstack) × images × [cells, H]
        seen["image"] = SimpleNamespace(pooler_output=layers[0], deepstack_features=layers[1:])
    mask = group_mask(segments, ids.shape[1])
    state = dict(past_key_values=cache, use_cache=cache is not None)
    run = policy.whole.model(
        ids, attention_mask=mask, position_ids=positions, mm_encoder_outputs=seen, **state
    )
    return run.last_hidden_state


# ---------------------------------------------------------------- rollout


@dataclass
class Rollout:
    """G answers to each of B prompts, T tokens at most; an answer ends with its stop token, if it has one."""

    tokens: Tensor  # [B, G, T]
    mask: Tensor  # [B, G, T]: True up to and with the stop token
    logps: Tensor  # [B, G, T]: log-probabilities when sampled, 0 outside the mask
    stopped: Tensor  # [B, G]: False for an answer that was cut at the limit

    def rows(self, some: slice) -> "Rollout":
        return Rollout(self.tokens[some], self.mask[some], self.logps[some], self.stopped[some])

    @staticmethod
    def join(parts: list["Rollout"]) -> "Rollout":
        """Rollouts of several batches as one, padded to the longest answer of all."""
        longest = max(part.tokens.shape[2] for part in parts)

        def pad(tensor: Tensor) -> Tensor:
            return F.pad(tensor, (0, longest - tensor.shape[2])) if tensor.dim() == 3 else tensor  # [B, G, T]

        columns = zip(*((part.tokens, part.mask, part.logps, part.stopped) for part in parts), strict=True)
        return Rollout(*(torch.cat([pad(tensor) for tensor in column]) for column in columns))


class Room(DynamicLayer):
    """Keys and values of one layer with room for more: to append them would copy all for every token."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns, self.used = columns, 0  # the most there will be, and how many there are

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes those of new columns, [B, K, Q, D] each, and returns all, [B, K, L, D]."""
        begin, end, self.is_initialized = self.used, self.used + keys.shape[2], True
        if begin == 0 or end > self.keys.shape[2]:
            (B, K, _, D), room = keys.shape, min(self.columns, 2 * end)
            old, (self.keys, self.values) = (self.keys, self.values), keys.new_empty(2, B, K, room, D)
            if begin > 0:
                self.keys[:, :, :begin], self.values[:, :, :begin] = (part[:, :, :begin] for part in old)
        self.keys[:, :, begin:end], self.values[:, :, begin:end], self.used = keys, values, end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.used


@torch.no_grad()
def rollout(policy: Policy, batch: Batch, group: int, max_new_tokens: int, generator=None) -> Rollout:
    """Sample `group` answers a prompt at temperature 1 and top-p 1; without a generator, decode greedily.

    The prompts are read once; then every step feeds the G newest tokens of a row together, so the cache holds
    P + G·T columns a prompt: column P + t·G + g is token t of answer g, at position start + t.
    """
    segments, columns = batch.segments, batch.ids.shape[1] + group * max_new_tokens
    layers = policy.whole.config.get_text_config().num_hidden_layers
    cache = hf.Cache(layers=[Room(columns) for _ in range(layers)])
    hidden = run_text(policy, batch.ids, segments, batch.positions, batch.items, cache)  # [B, P, H]
    hidden = hidden[:, -1:].expand(-1, group, -1)  # [B, G, H]
    alive = torch.ones(hidden.shape[:2], dtype=torch.bool, device=policy.device)  # [B, G]
    number = torch.arange(1, group + 1, device=policy.device)  # [G]
    finite = torch.ones((), dtype=torch.bool, device=policy.device)
    steps = []
    for t in range(max_new_tokens):
        logps = (policy.whole.lm_head(hidden).float() + policy.forbidden).log_softmax(-1)  # [B, G, V]
        if generator is None:
            token = logps.argmax(-1)  # [B, G]
        else:
            finite = finite & hidden.isfinite().all()  # looked at in the end: a look waits for the GPU
            chances = logps.exp().nan_to_num_(1.0).flatten(0, 1)  # [B·G, V]; NaN would break a GPU
            token = torch.multinomial(chances, 1, generator=generator).view_as(alive)
        steps.append((token, alive, logps.gather(-1, token[..., None])[..., 0] * alive))
        alive = alive & ~torch.isin(token, policy.stop_ids)
        if t + 1 == max_new_tokens or not alive.any():
            break
        segments = torch.cat([segments, torch.where(alive, number, -1)], 1)  # [B, P + (t+1)·G]
        positions = (batch.start + t)[None, :, None].expand(3, -1, group)  # [3, B, G]
        hidden = run_text(policy, token, segments, positions, None, cache)  # [B, G, H]
    if not finite:
        why = "its weights are damaged, or need a card that has bfloat16"
        raise UserError(f"The model's states are not finite in {hidden.dtype}: {why}.")
    tokens, mask, logps = (torch.stack(column, -1) for column in zip(*steps, strict=True))  # [B, G, T]
    return Rollout(tokens, mask, logps, ~alive)


def texts(policy: Policy, roll: Rollout) -> list[list[str]]:
    """The answers, B × G, as the reward reads them: with the family's opening, without special tokens."""
    begun, decode = policy.tools.family.opening, policy.tools.tokenizer.decode
    rows = zip(roll.tokens.cpu(), roll.mask.cpu(), strict=True)
    return [[begun + decode(t[m], skip_special_tokens=True) for t, m in zip(*row)] for row in rows]


# ---------------------------------------------------------------- scoring a group in one pass


def token_logps(policy: Policy, batch: Batch, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π(token | before it) of G answers a prompt, [B, G, T], 0 outside the mask, in one packed pass.

    Row: the prompt, then the answers' tokens in the order in which they were sampled (token t of any answer
    before token t + 1), without the columns that no longer live: P + Σ T_g columns, not G · (P + T).
    """
    (B, G, T), P, device = tokens.shape, batch.ids.shape[1], tokens.device
    tokens, mask = tokens.transpose(1, 2).flatten(1), mask.transpose(1, 2).flatten(1)  # [B, T·G]
    number = torch.arange(1, G + 1, device=device).repeat(T)  # [T·G]
    time = torch.arange(T, device=device).repeat_interleave(G)  # [T·G]
    # A token is predicted from the one before: for t = 0 the prompt's last, then where token t − 1 landed.
    landed = P + mask.cumsum(1) - 1  # [B, T·G]
    before = torch.cat([torch.full((B, G), P - 1, device=device), landed[:, :-G]], 1)  # [B, T·G]
    keep = torch.argsort(~mask, dim=1, stable=True)[:, : mask.sum(1).max()]  # [B, K]: living columns first
    living, chosen = mask.gather(1, keep), tokens.gather(1, keep)  # [B, K]
    ids = torch.cat([batch.ids, chosen.where(living, batch.ids[:, -1:])], 1)  # [B, P + K]
    segments = torch.cat([batch.segments, torch.where(living, number[keep], -1)], 1)  # [B, P + K]
    positions = (batch.start[:, None] + time[keep]).expand(3, B, -1)  # [3, B, K]
    positions = torch.cat([batch.positions, positions], 2)  # [3, B, P + K]
    hidden = run_text(policy, ids, segments, positions, batch.items)  # [B, P + K, H]
    source = before.gather(1, keep)[..., None].expand(-1, -1, hidden.shape[-1])  # [B, K, H]
    logps = chosen_logps(policy, hidden.gather(1, source)[living], chosen[living])  # [N], N the living tokens
    return torch.zeros(B, T * G, device=device).masked_scatter(mask, logps).view(B, T, G).transpose(1, 2)


def chosen_logps(policy: Policy, hidden: Tensor, chosen: Tensor) -> Tensor:
    """log softmax of chosen tokens [N] from hidden states [N, H], float32; logits live a chunk at a time."""

    def score(h: Tensor, c: Tensor) -> Tensor:
        logits = policy.whole.lm_head(h).float() + policy.forbidden  # [n, V]
        return logits.gather(-1, c[:, None])[:, 0] - logits.logsumexp(-1)  # [n]

    rows = max(1, LOGITS // len(policy.forbidden))
    pairs = zip(hidden.split(rows), chosen.split(rows), strict=True)
    return torch.cat([checkpoint(score, h, c, use_reentrant=False) for h, c in pairs])
