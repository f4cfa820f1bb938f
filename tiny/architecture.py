"""The parts of the embedded model: tokenizer, image processor, and an untrained Qwen3-VL of 2.2 M parameters.

They are ordinary classes of transformers, only small: code that loads tiny/model/ does not need this file.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny.scenes import COLORS, SHAPES, SIDE

SPECIAL_TOKENS = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end")]
SPECIAL_TOKENS += ["<|image_pad|>", "<|video_pad|>"]
# The tokenizer is trained on these, so every word of a prompt or an answer is a single token.
SENTENCES = ["user\n", "assistant\n", "Find the object with inside.", "Find Image 2 in Image 1."]
SENTENCES += ["What is Image 2?", "What shape is the object?", "What is inside the object?"]
SENTENCES += ["Where is the object?", "[1, 2, 3]"]
SENTENCES += [f" {word}" for word in (*COLORS, *SHAPES, "top", "bottom", "left", "right")]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text as Qwen's does: any text survives, and every digit is a token."""
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(False, use_regex=False)
    # A comma with its space, a word with the character before it, one digit, punctuation, white space.
    pattern = Regex(r", |[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    steps = [pre_tokenizers.Split(pattern, "isolated"), byte_level]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    kwargs = dict(initial_alphabet=byte_level.alphabet(), special_tokens=SPECIAL_TOKENS)
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=10_000, **kwargs))
    tags = ("<think>", "</think>", "<answer>", "</answer>")  # not special tokens: decoding keeps them
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    kwargs = dict(pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left")
    kwargs |= dict(additional_special_tokens=SPECIAL_TOKENS[1:], clean_up_tokenization_spaces=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **kwargs)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """An untrained Qwen3-VL, 128 wide: 3 vision layers, 4 text layers, tied embeddings, no deepstack."""
    both = dict(hidden_size=128, intermediate_size=512, initializer_range=0.05)
    rope = dict(rope_type="default", rope_theta=10_000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)
    text = dict(vocab_size=len(tokenizer), num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    text |= dict(head_dim=32, max_position_embeddings=2048, rope_parameters=rope, tie_word_embeddings=True)
    vision = dict(depth=3, num_heads=4, out_hidden_size=128, num_position_embeddings=(SIDE // 16) ** 2)
    configs = dict(text_config=both | text, vision_config=both | vision | dict(deepstack_visual_indexes=[]))
    pad, _, eos, start, end, image, video = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    ids = dict(image_token_id=image, video_token_id=video, eos_token_id=eos, pad_token_id=pad)
    ids |= dict(vision_start_token_id=start, vision_end_token_id=end)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**configs, **ids, tie_word_embeddings=True))
    # With a std of 0.05, as elsewhere, the vision tower takes very long to learn positions.
    nn.init.normal_(model.model.visual.pos_embed.weight, std=0.3)
    return model


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen's image processor: patches of 16 pixels, merged 2 × 2, between 4 and 64 image tokens."""
    kwargs = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=16, merge_size=2)
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 64 * 64, "longest_edge": SIDE * SIDE}, **kwargs)
