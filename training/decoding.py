"""A decoding step in a third of the calls: what training hands to `rollout` in place of `run_text`.

A decoding step sends a few tokens through many layers. It takes as long as its calls, not its arithmetic: a
GPU waits for the next launch. The layers here compute what those of transformers and PEFT do, except that
- LoRA is two products in the model's own dtype for all linear layers that read the same input (q, k and v;
  gate and up). PEFT makes seven calls for each of them. Into float32 weights it is merged, in a copy.
- Heads that share keys are queries of one head, so no keys are copied. SDPA's `enable_gqa` copies none
  either, but with a mask it takes the slowest kernel of a GPU.
- One additive mask serves all layers and all steps: each step opens its own columns in it.
- Prompts are read a few at a time, which takes less memory, and decoded together.

Shapes: those of policy.py; N = B·G tokens of a step, R the ranks of several adapters together.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from policy import Policy, run_text
from training.memory import phase

LAYERS = ("Qwen2_5_VLDecoderLayer", "Qwen3VLTextDecoderLayer")  # those that FusedLayer computes
PROMPTS_PER_PASS = 4  # prompts that are read at a time


def decoder(policy: Policy, num_generations: int, max_new_tokens: int) -> Callable:
    """`decode` for one rollout: `run_text` itself where layers are of an unknown kind or have no adapter."""
    layer = policy.base_model.model.language_model.layers[0]
    is_known = type(layer).__name__ in LAYERS and hasattr(layer.self_attn.q_proj, "lora_A")
    return FusedDecoder(policy, num_generations, max_new_tokens) if is_known else run_text


class JointLinear:
    """Linear layers that read the same input: [N, in] to their outputs side by side, with their adapters."""

    def __init__(self, dtype: torch.dtype, *layers: nn.Module):
        self.bases = [layer.base_layer for layer in layers]
        # Side by side, the A of all layers are one product, [R, in]; on a diagonal, so are their B, [out, R].
        A = torch.cat([layer.lora_A["default"].weight for layer in layers])
        B = torch.block_diag(*(layer.lora_B["default"].weight * layer.scaling["default"] for layer in layers))
        self.A, self.B = A.T.to(dtype).contiguous(), B.T.to(dtype).contiguous()
        # Merged into a copy of float32 weights. In 16 bit the sum would be rounded, and the copy fill a GPU.
        is_plain = all(type(base) is nn.Linear and base.bias is None for base in self.bases)
        if is_plain and dtype == torch.float32:
            weight = torch.cat([base.weight for base in self.bases]) + B @ A  # [out, in]
            self.bases, self.A = [lambda x: F.linear(x, weight)], None

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [base(x) for base in self.bases]
        y = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]  # [N, out]
        return y if self.A is None else torch.addmm(y, x @ self.A, self.B)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Rounds before the weight too, as transformers does: closer to the training pass in 16 bit."""
    return norm.weight * F.rms_norm(x, x.shape[-1:], eps=norm.variance_epsilon)


class FusedLayer:
    """A text layer of Qwen2.5-VL or Qwen3-VL, for the tokens of one decoding step."""

    def __init__(self, layer: nn.Module):
        self.layer, attention, mlp = layer, layer.self_attn, layer.mlp
        dtype = layer.input_layernorm.weight.dtype
        self.qkv = JointLinear(dtype, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.down = JointLinear(dtype, attention.o_proj), JointLinear(dtype, mlp.down_proj)
        self.gate_up = JointLinear(dtype, mlp.gate_proj, mlp.up_proj)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, new: Tensor, past: tuple) -> Tensor:
        """Hidden states [N, H] before the layer to those after it.

        cos, sin: of the rotary embedding, the sine with its sign, [B, G, A + 2K, D] each.
        mask: additive, [B, 1, G·A/K, L]. past: the layer's keys and values in the cache, [B, K, L, D] each;
        new: the cache's columns of this step, keys and values side by side, [B, G, 2K, D]: written here.
        """
        (B, G, _, D), K, attention = new.shape, new.shape[2] // 2, self.layer.self_attn
        heads = self.qkv(rms_norm(x, self.layer.input_layernorm)).view(B, G, -1, D)  # [B, G, A + 2K, D]
        num_heads = heads.shape[2] - 2 * K  # A
        if hasattr(attention, "q_norm"):  # Qwen3-VL
            query, key, value = heads.split([num_heads, K, K], 2)
            heads = torch.cat([rms_norm(query, attention.q_norm), rms_norm(key, attention.k_norm), value], 2)
        # Rotary embedding: x · cos + (−x₂, x₁) · sin, where x₁ and x₂ are the halves of x. For values cos is
        # 1 and sin is 0: they go through unchanged, and keys and values into the cache in one copy.
        heads = torch.addcmul(heads * cos, heads.roll(D // 2, -1), sin)
        query, keys_and_values = heads.split([num_heads, 2 * K], 2)
        new.copy_(keys_and_values)
        # Queries of heads that share keys become rows of one head: its keys are read once for all of them.
        query = query.view(B, G, K, -1, D).transpose(1, 2).reshape(B, K, -1, D)  # [B, K, G·A/K, D]
        out = F.scaled_dot_product_attention(query, *past, mask, scale=attention.scaling)
        x = x + self.out(out.view(B, K, G, -1, D).transpose(1, 2).reshape(B * G, -1))
        gate, up = self.gate_up(rms_norm(x, self.layer.post_attention_layernorm)).chunk(2, 1)
        return x + self.down(self.layer.mlp.act_fn(gate) * up)


class FusedDecoder:
    """`run_text` for one rollout: reads the prompts with it, then decodes with fused layers and a cache.

    The adapter is taken as it is now.
    """

    @torch.no_grad()
    def __init__(self, policy: Policy, num_generations: int, max_new_tokens: int):
        self.text = policy.base_model.model.language_model
        self.layers = [FusedLayer(layer) for layer in self.text.layers]
        self.G, self.max_columns = num_generations, num_generations * max_new_tokens

    def __call__(self, policy: Policy, *args: Any) -> Tensor:
        """What `run_text` returns for these arguments; of prompts only the last hidden states, [B, 1, H].

        The cache that `rollout` hands over stays empty: this class has its own.
        """
        input_ids, segment_ids, position_ids, prompts, _ = args
        if prompts is None:
            return self.step(input_ids, segment_ids.shape[1], position_ids)
        (B, P), hidden, attention = input_ids.shape, [], self.text.layers[0].self_attn
        K, share = self.text.config.num_key_value_heads, attention.num_key_value_groups
        L = -(-(P + self.max_columns) // 8) * 8
        # log 1 = 0 shows a column, log 0 = −∞ hides it: at first, all but those of the prompt.
        is_visible = F.pad((segment_ids == 0).to(policy.base_model.dtype), (0, L - P))  # [B, L]
        self.mask = is_visible.log()[:, None, None].repeat(1, 1, self.G * share, 1)  # [B, 1, G·A/K, L]
        self.own_column = torch.eye(self.G).log().to(self.mask).repeat_interleave(share, 0)  # [G·A/K, G]
        # The sine of each head: −, + for the halves of queries and keys, 0 for values, which do not rotate.
        head = torch.tensor([-1.0, 1.0]).repeat_interleave(attention.head_dim // 2)  # [D]
        self.sine_sign = F.pad(head.expand(K * (share + 1), -1), (0, 0, 0, K)).to(self.mask)  # [A + 2K, D]
        self.is_value = self.sine_sign == 0  # [A + 2K, D]
        # Zeros, not empty: a hidden column counts 0 times its value, which must not be NaN.
        self.cache = self.mask.new_zeros(len(self.layers), B, L, 2 * K, attention.head_dim)
        for i in range(0, B, PROMPTS_PER_PASS):
            rows, part = slice(i, i + PROMPTS_PER_PASS), DynamicCache()
            tensors = input_ids[rows], segment_ids[rows], position_ids[:, rows]
            with phase("prefill"):
                hidden.append(run_text(policy, *tensors, prompts[rows], part)[:, -1:])
            for cache, layer in zip(self.cache, part.layers, strict=True):
                cache[rows, :P] = torch.cat([layer.keys, layer.values], 1).transpose(1, 2)  # [rows, P, 2K, D]
        return torch.cat(hidden)

    def step(self, input_ids: Tensor, length: int, position_ids: Tensor) -> Tensor:
        """The hidden states [B, G, H] of the newest tokens [B, G], the last of `length` columns."""
        columns = slice(length - self.G, length)
        # A finished completion still sees its own columns: nothing reads what it computes.
        self.mask[..., columns] = self.own_column
        # Kernels want a multiple of 8 columns. The mask hides those that are not written yet.
        L = -(-length // 8) * 8
        mask, cache = self.mask[..., :L], self.cache[:, :, :L]  # [B, 1, G·A/K, L], [layers, B, L, 2K, D]
        x = self.text.embed_tokens(input_ids.flatten())  # [N, H]
        cos, sin = (part[:, :, None] for part in self.text.rotary_emb(x, position_ids))  # [B, G, 1, D] each
        cos, sin = cos.masked_fill(self.is_value, 1), sin * self.sine_sign  # [B, G, A + 2K, D] each
        keys, values = cache.transpose(2, 3).chunk(2, 2)  # [layers, B, K, L, D] each
        # Views of all layers at once: a view launches nothing, but takes Python as long as a launch.
        views = zip(self.cache[:, :, columns], zip(keys, values, strict=True), strict=True)
        for layer, (new, layer_cache) in zip(self.layers, views, strict=True):
            x = layer(x, cos, sin, mask, new, layer_cache)
        return rms_norm(x, self.text.norm).view(*input_ids.shape, -1)
