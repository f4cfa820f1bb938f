"""How long a run takes, predicted for a card by a formula; training/dry_run.py measures it on a GPU.

The formula counts work. A forward pass takes as long as the slower of two: Python, which starts its
operations one by one, and the GPU, which moves bytes and multiplies. What is marked as an assumption has not
been measured on a GPU; docs/gpu.md explains it and has the hours of published models.
"""

from math import ceil
from types import SimpleNamespace

import torch

from evaluation.reply_cache import default_batch_size
from training.learning import NUM_CUES, NUM_QUESTIONS
from training.settings import Config

TEXT_TOKENS = 128  # of a prompt, roughly; the rest are image tokens
MEAN_LENGTH = 0.5  # of --max-new-tokens that a completion has on average: an assumption
# Operations that PyTorch dispatches for a pass of a text layer with LoRA in 4 bit: by run_text, and by the
# fused layers that decode a rollout (tests/count_dispatches.py: 3,433 and 1,662 at 36 layers, on a CPU).
LAYER_CALLS, FUSED_CALLS = 3433 / 36, 1662 / 36
CALL_SECONDS = 15e-6  # Python's time for each: an assumption, 10 to 20 µs on most hosts
BANDWIDTH_SHARE, FLOPS_SHARE = 0.8, 0.5  # of the data sheet that real kernels reach: an assumption

# From data sheets: a part of the name that CUDA gives, GB, GB/s, and TFLOPs of dense 16-bit matrix products
# that add up in float32.
CARDS = {
    "RTX 4060": (8, 272, 30),
    "RTX 3060": (12, 360, 25),
    "T4": (16, 320, 65),
    "RTX 3090": (24, 936, 71),
    "RTX 4090": (24, 1008, 165),
    "H100": (80, 3350, 989),
}


def summary(training: float, evaluation: float) -> str:
    """Hours as text: their sum and its parts; less than an hour in minutes.

    >>> summary(training=2.25, evaluation=0.5)
    '2.8 h (training 2.2 h, evaluation 30 min), predicted'
    """
    hours = (training + evaluation, training, evaluation)
    total, *parts = (f"{h:.1f} h" if h >= 0.95 else f"{ceil(60 * h)} min" for h in hours)
    return f"{total} (training {parts[0]}, evaluation {parts[1]}), predicted"


def predict_hours(model: torch.nn.Module, cfg: Config, card: str) -> tuple[float, float]:
    """Hours of training and of both evaluations on a card of CARDS; the model may be an empty one.

    A forward pass of B rows with Q new tokens each, at L columns, through n layers:

    Python   n · calls of a layer · CALL_SECONDS
    bytes    the layers' weights: 2 each in 16 bits, ½ in 4 bits, 4½ where bitsandbytes first writes and
             reads them in 16 bits; lm_head, 2 each; and the keys and values of B · L columns
    FLOPs    2 per weight and token, and 4 · n · A · L per token for attention over A = all heads together
    seconds  max(Python, bytes / (BANDWIDTH_SHARE · bandwidth) + FLOPs / (FLOPS_SHARE · TFLOPs))

    A rollout reads the images and the prompts, then runs a pass per token until its longest completion ends:
    --max-new-tokens passes. A training pass is a packed row; a backward pass costs as much as a forward pass.
    Nothing here has been compared with a GPU.
    """
    text_layers, vision = model.model.language_model.layers, model.config.vision_config
    parts = (text_layers, model.model.visual, model.lm_head)
    in_layers, in_vision, in_head = (sum(w.numel() for w in part.parameters()) for part in parts)
    attention, layers = text_layers[0].self_attn, len(text_layers)
    A, kv_bytes = attention.q_proj.out_features, 4 * layers * attention.k_proj.out_features  # of a column
    _, bandwidth, tflops = CARDS[card]
    # A photo is at its upper limit of pixels; the crop of a small object is enlarged to the lower limit.
    patches = (cfg.image_pixels + cfg.crop_min_pixels) // vision.patch_size**2
    P, T = TEXT_TOKENS + patches // vision.spatial_merge_size**2, cfg.max_new_tokens

    def forward(B: int, Q: float, L: float, vision_flops: float = 0.0, calls: float = LAYER_CALLS) -> float:
        in_4bit = 0.5 if B * Q <= 64 else 4.5  # bitsandbytes' own limit depends on the card and the shape
        moved = in_layers * (2 if cfg.load_in_4bit is False else in_4bit) + 2 * in_head + B * L * kv_bytes
        flops = vision_flops + B * Q * (2 * (in_layers + in_head) + 4 * layers * A * L)
        on_gpu = moved / (BANDWIDTH_SHARE * bandwidth * 1e9) + flops / (FLOPS_SHARE * tflops * 1e12)
        return max(layers * calls * CALL_SECONDS, on_gpu)

    def generate(B: int, G: int) -> float:
        # Read images and prompts, then run a pass per token; half of the completions' columns on average.
        calls = FUSED_CALLS if G > 1 else LAYER_CALLS  # an evaluation decodes with run_text
        return forward(B, P, P, 2 * in_vision * B * patches) + T * forward(B, G, P + G * T / 2, calls=calls)

    batch = min(cfg.rollout_batch, cfg.prompts)
    sampling = ceil(cfg.prompts / batch) * generate(batch, cfg.num_generations)
    # The reference, the policy, its layers again (gradient checkpointing), and backward; π_old if it is used.
    passes = cfg.iterations * ((cfg.beta > 0) + 1 + cfg.gradient_checkpointing + 1)
    passes += cfg.updates * cfg.iterations > 1
    rows = min(cfg.micro_batch, cfg.prompts // cfg.updates)
    columns = P + cfg.num_generations * T * MEAN_LENGTH
    learning = cfg.updates * ceil(cfg.prompts / cfg.updates / rows) * passes * forward(rows, columns, columns)
    # Before and after; of scenes six replies a cue (heldout.evaluate), and two for the baselines.
    replies = cfg.eval_cues * (2 * 6 + 2 if cfg.data == "scenes" else 2)
    if cfg.eval_every:  # and while training
        replies += cfg.steps // cfg.eval_every * (NUM_CUES + NUM_QUESTIONS * (cfg.data == "scenes"))
    batch = default_batch_size(SimpleNamespace(device=torch.device("cuda")))
    evaluation = ceil(replies / batch) * generate(batch, 1)
    return cfg.steps * (sampling + learning) / 3600, evaluation / 3600


def time_table(model: torch.nn.Module, cfg: Config, gigabytes: float) -> str:
    """The predicted hours of a run on each card with as much memory, and the length that they assume."""
    title = f"Predicted time, if completions have {MEAN_LENGTH * cfg.max_new_tokens:.0f} tokens on average:"
    cards = [(card, memory) for card, (memory, *_) in CARDS.items() if memory >= gigabytes]
    rows = (f"{c:9}{gb:>3} GB  {summary(*predict_hours(model, cfg, c))}" for c, gb in cards)
    return "\n".join([title, *rows])
