"""The multimodal model as a policy: sample groups of completions, and score them.

What differs from a typical GRPO implementation:
- A group is G completions of one prompt, and the prompt (two images) is most of the tokens. So a prompt is
  one row, in the rollout and in every later pass: `[prompt | the tokens of all G completions]`. A mask lets
  each completion see the prompt and itself, and positions restart after the prompt for every completion.
- Sampling is our own loop. `generate()` reads hidden defaults (top_k, repetition_penalty) from the
  checkpoint, and such defaults make rollouts greedy without a message.
- The vision tower is frozen, so the features of an image are computed once.
- Logits are computed for completion tokens only, a chunk at a time.

Shapes: B prompts, G completions each, P prompt tokens, T completion tokens, H hidden size, V vocabulary;
in attention Q queries, L columns, A heads, K heads of keys, D head size.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer

from prompts import EncodedPrompt, Processor

LOGIT_CHUNK_SIZE = 2**24  # logits that exist at once while completions are scored: 67 MB in float32
MAX_PATCHES_PER_PASS = 2**15  # image patches in one pass of the vision tower
# MKL prepares its cosine in the first call of a process. If several threads make that call together, it is
# rounded otherwise now and then, and a run does not repeat to the bit. So one thread makes it, here.
torch.zeros(1).cos()


@dataclass
class Policy:
    """A model, wrapped by PEFT or not, with everything that sampling and scoring need."""

    model: Any
    processor: Processor
    device: torch.device
    logit_bias: Tensor  # [V]: −inf for image and video tokens, which have no features in a completion; else 0
    stop_ids: Tensor  # tokens that end a completion
    temperature: float = 1.0  # divides the logits of sampling and scoring alike, also those of the reference

    @property
    def base_model(self) -> nn.Module:
        """The transformers model with its lm_head. An adapter works in place, so it is active here too."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def reference(self) -> AbstractContextManager:
        """Inside this context the policy is the reference model: its adapter is switched off."""
        return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token over the temperature, from hidden states; [..., H] to [..., V]."""
        # In float32: a 16-bit softmax would round away most of the vocabulary.
        logits = self.base_model.lm_head(hidden).float() + self.logit_bias
        return logits if self.temperature == 1.0 else logits / self.temperature


@dataclass
class Batch:
    """B prompts, padded on the left to P columns."""

    prompts: list[EncodedPrompt]
    input_ids: Tensor  # [B, P]
    segment_ids: Tensor  # [B, P]: 0 for the prompt, −1 for padding
    position_ids: Tensor  # [3, B, P]: M-RoPE's time, height, width
    completion_start: Tensor  # [B]: position of the first completion token


@torch.no_grad()
def compute_image_features(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    """Fills in the features of the images that have none yet. The vision tower is frozen: once is enough."""
    images = {id(image): image for prompt in prompts for image in prompt.images if image.features is None}
    if not images:
        return
    # The tower's activations grow with the patches of a pass, so a large batch is split.
    if len(prompts) > 1 and sum(len(image.pixel_values) for image in images.values()) > MAX_PATCHES_PER_PASS:
        for prompt_half in (prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]):
            compute_image_features(policy, prompt_half)
        return
    pixel_values = torch.cat([image.pixel_values for image in images.values()])  # [patches, 3·2·patch·patch]
    grids = torch.stack([image.grid_thw for image in images.values()])  # [images, 3]
    vision = policy.base_model.model.get_image_features
    output = vision(pixel_values.to(policy.device), grids.to(policy.device))
    feature_layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    for i, image in enumerate(images.values()):
        # Kept on the CPU: those of a whole step would fill a GPU, and copying them back is cheap.
        image.features = [layer[i].cpu() for layer in feature_layers]  # (1 + deepstack) × [image tokens, H]
        image.pixel_values = torch.empty(0)


def collate(policy: Policy, prompts: list[EncodedPrompt]) -> Batch:
    """Prompts as a left-padded batch, with explicit M-RoPE positions (a model's cached ones may be stale)."""
    compute_image_features(policy, prompts)

    def pad(rows: list[Tensor], value: int = 0) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, True, value, "left")  # [B, P]

    # On the left, so that every prompt ends in the last column, where its completions start.
    input_ids = pad([prompt.input_ids for prompt in prompts], policy.processor.tokenizer.pad_token_id)
    token_types = pad([prompt.mm_token_type_ids for prompt in prompts])
    attention_mask = pad([torch.ones_like(prompt.input_ids) for prompt in prompts])
    grids = torch.stack([image.grid_thw for prompt in prompts for image in prompt.images])  # [images, 3]
    position_ids, _ = policy.base_model.model.get_rope_index(
        input_ids, mm_token_type_ids=token_types, image_grid_thw=grids, attention_mask=attention_mask
    )  # [3, B, P]
    # An image takes up fewer positions than tokens, so a completion starts after the largest one.
    completion_start = position_ids.masked_fill(attention_mask[None] == 0, -1).amax((0, 2)) + 1  # [B]
    # Segments: 1 − 1 = 0 for a prompt token, 0 − 1 = −1 for padding.
    tensors = (input_ids, attention_mask - 1, position_ids, completion_start)
    return Batch(prompts, *(tensor.to(policy.device) for tensor in tensors))


def group_mask(segment_ids: Tensor, num_queries: int | None = None) -> Tensor:
    """Which columns of a row `[prompt | completions]` each query may see: the prompt and its own past.

    segment_ids: [B, L]: 0 for the prompt, g ≥ 1 for completion g, −1 for padding; the columns of different
    completions may alternate. num_queries: how many of the last columns are queries (default: all).
    Returns a bool mask [B, 1, Q, L].

    >>> group_mask(torch.tensor([[0, 1, 2, 1]]))[0, 0].int()  # a prompt token, then completions 1, 2, 1
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 0, 1, 0],
            [1, 1, 0, 1]], dtype=torch.int32)
    """
    query_ids = segment_ids if num_queries is None else segment_ids[:, -num_queries:]  # [B, Q]
    key_ids = segment_ids[:, None]  # [B, 1, L]
    key_index = torch.arange(segment_ids.shape[1], device=segment_ids.device)  # [L]
    query_index = key_index[-query_ids.shape[1] :, None]  # [Q, 1]
    # Every completion sees the prompt, and the columns of its own segment; padding belongs to none.
    same_segment = (key_ids == query_ids[..., None]) & (key_ids > 0)  # [B, Q, L]
    is_visible = (key_ids == 0) | same_segment  # [B, Q, L]
    # Never a later column: when the query runs, it is not written yet.
    is_visible = is_visible & (key_index <= query_index)  # [B, Q, L]
    # Each token sees itself, padding included: a softmax over nothing would be NaN.
    return (is_visible | (key_index == query_index))[:, None]


def run_text(
    policy: Policy, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor,
    prompts: list[EncodedPrompt] | None = None, cache: hf.Cache | None = None,
) -> Tensor:  # fmt: skip
    """Last hidden states [B, Q, H] of the tokens input_ids [B, Q], the last Q columns of segment_ids [B, L].

    position_ids: [3, B, Q]. prompts: those whose images are in `input_ids`. cache: keys and values of the
    earlier columns, which this call extends.
    """
    encoded = {}
    if prompts is not None:
        # transformers takes features in place of pixels, so the vision tower does not run again.
        features = [[f.to(input_ids.device) for f in image.features] for p in prompts for image in p.images]
        layers = list(zip(*features, strict=True))  # (1 + deepstack) × images × [image tokens, H]
        encoded["image"] = SimpleNamespace(pooler_output=layers[0], deepstack_features=layers[1:])
    mask = group_mask(segment_ids, input_ids.shape[1])  # [B, 1, Q, L]
    kwargs = dict(past_key_values=cache, use_cache=cache is not None, mm_encoder_outputs=encoded)
    model, device = policy.base_model.model, policy.device.type
    # On a GPU the adapter's products run in 16 bit, as the model's do; its weights stay float32.
    with torch.autocast(device, policy.base_model.dtype, enabled=device == "cuda"):
        return model(input_ids, attention_mask=mask, position_ids=position_ids, **kwargs).last_hidden_state


# ---------------------------------------------------------------- rollout


@dataclass
class Rollout:
    """G completions of each of B prompts, T tokens at most; the stop token belongs to its completion."""

    tokens: Tensor  # [B, G, T]
    mask: Tensor  # [B, G, T]: True up to and including the stop token
    logps: Tensor  # [B, G, T]: log-probabilities at sampling time, 0 outside the mask
    finished: Tensor  # [B, G]: False for a completion that was cut at the limit
    finite: Tensor  # [B]: False for a group with a NaN, mostly an overflow of float16; its mask is all False

    def select(self, rows: slice | Tensor) -> "Rollout":
        return Rollout(*(tensor[rows] for tensor in vars(self).values()))

    @staticmethod
    def join(parts: list["Rollout"]) -> "Rollout":
        """The rollouts of several batches as one, padded to the longest completion."""
        longest = max(part.tokens.shape[2] for part in parts)

        def pad(tensor: Tensor) -> Tensor:
            return F.pad(tensor, (0, longest - tensor.shape[2])) if tensor.dim() == 3 else tensor

        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Rollout(*(torch.cat([pad(tensor) for tensor in column]) for column in columns))


class GrowingCacheLayer(DynamicLayer):
    """Keys and values of one layer, with room for tokens to come: the library's is copied for every token."""

    length = 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends those of new columns, [B, K, Q, D] each, and returns all, [B, K, L, D]."""
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = keys, values, True
        start, self.length = self.length, self.length + keys.shape[2]
        if self.length > self.keys.shape[2]:
            room = (0, 0, 0, 32 * keys.shape[2])  # for 32 steps: most replies end far below their limit
            self.keys, self.values = F.pad(self.keys, room), F.pad(self.values, room)
        self.keys[:, :, start : self.length], self.values[:, :, start : self.length] = keys, values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


@torch.no_grad()
def rollout(
    policy: Policy, batch: Batch, num_generations: int, max_new_tokens: int, generator=None, decode=run_text
) -> Rollout:
    """G completions of each prompt at the policy's temperature and top-p 1; without a generator, greedy ones.

    The prompts are read once. Then every step feeds the newest tokens of all G completions together, so the
    cache holds P + G·T columns per prompt: column P + t·G + g is token t of completion g (from 0).
    decode: `run_text`, or what computes the same in fewer calls (training/decoding.py).
    """
    G, segment_ids = num_generations, batch.segment_ids
    if generator is None:  # greedy decoding has no temperature
        policy = replace(policy, temperature=1.0)
    # Read the prompts once, and keep their keys and values.
    cache = hf.Cache(layer_class_to_replicate=GrowingCacheLayer)
    hidden = decode(policy, batch.input_ids, segment_ids, batch.position_ids, batch.prompts, cache)
    # All G completions start from the state of the last prompt token.
    hidden = hidden[:, -1:].expand(-1, G, -1)  # [B, G, H]
    unfinished = torch.ones(hidden.shape[:2], dtype=torch.bool, device=policy.device)  # [B, G]
    completion_numbers = torch.arange(1, G + 1, device=policy.device)  # [G]
    steps = []
    for t in range(max_new_tokens):
        logps = policy.logits(hidden).log_softmax(-1)  # [B, G, V]
        if generator is None:
            next_tokens = logps.argmax(-1)  # [B, G]
        else:
            probs = logps.exp().nan_to_num_(1.0).flatten(0, 1)  # [B·G, V]; a NaN would crash multinomial
            next_tokens = torch.multinomial(probs, 1, generator=generator).view_as(unfinished)  # [B, G]
        sampled_logps = logps.gather(-1, next_tokens[..., None])[..., 0]  # [B, G]
        steps.append((next_tokens, unfinished, sampled_logps.where(unfinished, 0.0)))
        # Only now: the stop token itself is still part of its completion.
        unfinished = unfinished & ~torch.isin(next_tokens, policy.stop_ids)
        if t + 1 == max_new_tokens or not unfinished.any():
            break
        # A finished completion still fills its column, as padding that nothing sees.
        segment_ids = torch.cat([segment_ids, torch.where(unfinished, completion_numbers, -1)], 1)
        position_ids = (batch.completion_start + t)[None, :, None].expand(3, -1, G)  # [3, B, G]
        hidden = decode(policy, next_tokens, segment_ids, position_ids, None, cache)  # [B, G, H]
    tokens, mask, logps = (torch.stack(column, -1) for column in zip(*steps, strict=True))  # [B, G, T]
    # A NaN anywhere in a hidden state or in its logits is one in the token's log-probability too.
    finite = logps.isfinite().all(-1).all(-1)  # [B]: a group shares its prompt, so it is finite as a whole
    mask = mask & finite[:, None, None]
    return Rollout(tokens, mask, logps.where(mask, 0.0), ~unfinished, finite)


def decode_completions(policy: Policy, rollouts: Rollout) -> list[list[str]]:
    """The completions' texts, B × G, as the reward reads them: after the template's opening."""
    prefix, decode = policy.processor.family.opening, policy.processor.tokenizer.decode
    rows = zip(rollouts.tokens.cpu(), rollouts.mask.cpu(), strict=True)
    return [[prefix + decode(t[m], skip_special_tokens=True) for t, m in zip(*row)] for row in rows]


# ---------------------------------------------------------------- scoring a group in one pass


def token_logps(
    policy: Policy, batch: Batch, tokens: Tensor, mask: Tensor, entropies: list[Tensor] | None = None
) -> Tensor:
    """log π(token | the tokens before it) of G completions per prompt, [B, G, T], 0 outside the mask.

    One packed pass: a row is the prompt, then the completions' tokens in sampling order (token t of every
    completion before token t + 1), without the columns of finished ones: P + Σ T_g columns, not G · (P + T).
    entropies: a list to which the entropies of the tokens' distributions are added, if there is one.

    >>> from data import CueConfig, encode_cue, scene_cues
    >>> from models import load_policy
    >>> policy, cue = load_policy("tiny"), scene_cues(CueConfig(), "train", 0)[0]
    >>> batch = collate(policy, [encode_cue(policy.processor, cue, "object")])
    >>> group = rollout(policy, batch, 2, 16, torch.Generator(policy.device).manual_seed(0))
    >>> packed = token_logps(policy, batch, group.tokens, group.mask)
    >>> alone = [token_logps(policy, batch, group.tokens[:, [g]], group.mask[:, [g]]) for g in range(2)]
    >>> torch.allclose(packed, torch.cat(alone, 1), atol=1e-4)
    True
    """
    (B, G, T), P, device = tokens.shape, batch.input_ids.shape[1], tokens.device
    # Sampling order: token 0 of all completions, then token 1 of all, as the rollout's cache has them.
    tokens, mask = tokens.transpose(1, 2).flatten(1), mask.transpose(1, 2).flatten(1)  # [B, T·G]
    completion_numbers = torch.arange(1, G + 1, device=device).repeat(T)  # [T·G]
    token_index = torch.arange(T, device=device).repeat_interleave(G)  # [T·G]
    # Packing drops the columns outside the mask, so token t of completion g moves to this column.
    packed_index = P + mask.cumsum(1) - 1  # [B, T·G]
    # A token is predicted one token earlier: at the prompt's last column for t = 0, else where t − 1 moved.
    predicted_at = torch.cat([torch.full((B, G), P - 1, device=device), packed_index[:, :-G]], 1)  # [B, T·G]
    # Rows have different numbers of valid tokens: those first, in their order, then padding up to K columns.
    order = torch.argsort(~mask, dim=1, stable=True)[:, : mask.sum(1).max()]  # [B, K]
    is_valid, target_ids = mask.gather(1, order), tokens.gather(1, order)  # [B, K]
    input_ids = target_ids.where(is_valid, batch.input_ids[:, -1:])  # [B, K]
    input_ids = torch.cat([batch.input_ids, input_ids], 1)  # [B, P + K]
    segment_ids = torch.where(is_valid, completion_numbers[order], -1)  # [B, K]
    segment_ids = torch.cat([batch.segment_ids, segment_ids], 1)  # [B, P + K]
    # Every completion starts at the same position, right after the prompt.
    position_ids = (batch.completion_start[:, None] + token_index[order]).expand(3, B, -1)  # [3, B, K]
    position_ids = torch.cat([batch.position_ids, position_ids], 2)  # [3, B, P + K]
    # One pass for the whole group, then only the states that predict a completion token.
    hidden = run_text(policy, input_ids, segment_ids, position_ids, batch.prompts)  # [B, P + K, H]
    source_index = predicted_at.gather(1, order)[..., None].expand(-1, -1, hidden.shape[-1])  # [B, K, H]
    hidden = hidden.gather(1, source_index)[is_valid]  # [N, H], N valid tokens
    logps = target_logps(policy, hidden, target_ids[is_valid], entropies)  # [N]
    # Back from the packed order to [B, G, T].
    return torch.zeros(B, T * G, device=device).masked_scatter(mask, logps).view(B, T, G).transpose(1, 2)


def target_logps(
    policy: Policy, hidden: Tensor, target_ids: Tensor, entropies: list[Tensor] | None = None
) -> Tensor:
    """float32 log softmax of the target tokens [N] from hidden states [N, H], a chunk of n at a time.

    entropies: a list to which −Σ p · log p over the vocabulary is added, in nats, [n] for each chunk.
    """

    def score_chunk(hidden_chunk: Tensor, target_chunk: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = policy.logits(hidden_chunk)  # [n, V]
        logps = logits.gather(-1, target_chunk[:, None])[:, 0] - logits.logsumexp(-1)  # [n]
        if entropies is None:
            return logps, None
        # entr(p) = −p · log p is 0 at p = 0, where the product would be NaN. For the log: no gradient.
        return logps, torch.special.entr(logits.detach().softmax(-1)).sum(-1)  # [n] each

    chunk_size = max(1, LOGIT_CHUNK_SIZE // len(policy.logit_bias))
    chunks = zip(hidden.split(chunk_size), target_ids.split(chunk_size), strict=True)
    # Checkpointed: autograd would keep the logits of every chunk for the backward pass.
    scored = [checkpoint(score_chunk, h, ids, use_reentrant=False) for h, ids in chunks]
    if entropies is not None:
        entropies += [entropy for _, entropy in scored]
    return torch.cat([logps for logps, _ in scored])
