"""The parts of the embedded model, untrained: tokenizer, a Qwen3-VL of 2 million parameters, image processor.

They are the ordinary classes of transformers, only small: nothing that loads tiny/ needs to know this file.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny.scenes import COLORS, SHAPES, SIDE

SPECIAL = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end")]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
SENTENCES = ["user\n", "assistant\n", "Find the thing.", "Find Image 2 in Image 1.", "What is Image 2?"]
SENTENCES += ["What shape is the thing?", "What color is the thing?", "Where is the thing?", "[1, 2, 3]"]
SENTENCES += [f" {word}" for word in (*COLORS, *SHAPES, "top", "bottom", "left", "right")]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE cut as Qwen's is: any text survives, digits stand alone, words keep their space."""
    tokenizer, to_bytes = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(False, use_regex=False)
    pieces = Regex(r", |[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    ways = dict(initial_alphabet=to_bytes.alphabet(), special_tokens=SPECIAL)
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=10_000, **ways))
    tags = ("<think>", "</think>", "<answer>", "</answer>")  # text, not special: decoding keeps them
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    ways = dict(pad_token="<|endoftext|>", eos_token="<|im_end|>", additional_special_tokens=SPECIAL[1:])
    ways |= dict(chat_template=CHAT_TEMPLATE, padding_side="left", clean_up_tokenization_spaces=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ways)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL, 128 wide: 3 vision layers, 4 text layers, tied embeddings, no deepstack."""
    both = dict(hidden_size=128, intermediate_size=512, initializer_range=0.05)
    rope = dict(rope_type="default", rope_theta=10_000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)
    text = dict(vocab_size=len(tokenizer), num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    text |= dict(head_dim=32, max_position_embeddings=2048, rope_parameters=rope, tie_word_embeddings=True)
    vision = dict(depth=3, num_heads=4, out_hidden_size=128, num_position_embeddings=(SIDE // 16) ** 2)
    parts = dict(text_config=both | text, vision_config=both | vision | dict(deepstack_visual_indexes=[]))
    pad, _, eos, start, end, image, video = tokenizer.convert_tokens_to_ids(SPECIAL)
    ids = dict(image_token_id=image, video_token_id=video, eos_token_id=eos, pad_token_id=pad)
    ids |= dict(vision_start_token_id=start, vision_end_token_id=end)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**parts, **ids, tie_word_embeddings=True))
    nn.init.normal_(model.model.visual.pos_embed.weight, std=0.3)  # at 0.05, places are learned very late
    return model


def build_image_processor() -> Qwen2VLImageProcessorPil:
    ways = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=16, merge_size=2)
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 64 * 64, "longest_edge": SIDE * SIDE}, **ways)
