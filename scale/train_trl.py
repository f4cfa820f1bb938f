"""TRL's GRPOTrainer on an export of the loop's cues, with the loop's reward and the paper's values.

All flags of TRL's GRPOConfig work too; their defaults are the paper's (Table 8, and docs/paper_ledger.md).
    python -m scale.export cues --format trl --model Qwen/Qwen2.5-VL-7B-Instruct --data coco …
    accelerate launch --config_file scale/one_machine.yaml --module scale.train_trl cues --model Qwen/…
"""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Image, List, load_dataset
from peft import LoraConfig
from transformers import AutoProcessor, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from files.errors import FlagParser, UserError, exit_on_error, model_folder
from prompts import Family
from scale.export import find_target, read_settings
from scale.rewards import box_reward

# dapo is the mean over the tokens of an optimizer step, the loop's token_mean; delta bounds the ratio at
# negative advantages, which is the dual clip; constant_with_warmup takes a share of the steps below 1.
PAPER = dict(loss_type="dapo", beta=0.01, use_bias_correction_kl=False, epsilon=0.2, epsilon_high=0.3)
PAPER |= dict(delta=3.0, num_generations=8, temperature=1.0, top_p=1.0, weight_decay=0.01, max_grad_norm=1.0)
PAPER |= dict(lr_scheduler_type="constant_with_warmup", warmup_steps=0.05, max_steps=1600)  # 400 rollouts
OURS = dict(shuffle_dataset=False, max_completion_length=256, logging_steps=1, save_steps=50)


def read_flags() -> tuple[Any, GRPOConfig]:
    """Our own flags, and TRL's with our defaults."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder of python -m scale.export --format trl")
    parser.add_argument("--model", default="tiny", help="tiny, a model folder or a hub id")
    parser.add_argument("--lora-rank", type=int, default=0, help="rank of an adapter; 0: all weights")
    parser.add_argument("--prompts", type=int, default=128, help="per optimizer step; paper")
    parser.add_argument("--updates", type=int, default=4, help="optimizer steps per rollout; paper")
    parser.add_argument("--micro-batch", type=int, default=8, help="completions in one pass; memory only")
    flags, trl_flags = parser.parse_known_args()
    at_once = flags.micro_batch * int(os.environ.get("WORLD_SIZE", 1))
    passes, remainder = divmod(flags.prompts * PAPER["num_generations"], at_once)
    if remainder:
        parser.error(f"--prompts {flags.prompts}: the number of completions must be a multiple of {at_once}.")
    batch = dict(per_device_train_batch_size=flags.micro_batch, gradient_accumulation_steps=passes)
    batch |= dict(steps_per_generation=passes * flags.updates, bf16=torch.cuda.is_available())
    trl_parser = HfArgumentParser(GRPOConfig)
    trl_parser.set_defaults(**PAPER, **OURS, **batch, learning_rate=1e-5 if flags.lora_rank else 1e-6)
    return flags, trl_parser.parse_args_into_dataclasses(trl_flags)[0]


def build_trainer(model: Any, rank: int, args: GRPOConfig, data: Any, processor: Any) -> GRPOTrainer:
    """TRL's trainer with the loop's reward, for an adapter of this rank or, if it is 0, for all weights."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=Family.lora_targets) if rank else None
    return GRPOTrainer(model, box_reward, args, data, processing_class=processor, peft_config=lora)


def main() -> None:
    with exit_on_error():
        flags, args = read_flags()
        settings = read_settings(flags.export / "train.settings.json")
        target = find_target("trl", flags.model, settings.get("box_frame"), settings.get("pixels"))
        made_for = [settings.get(name) for name in ("engine", "cell", "template", "opening")]
        if made_for != ["trl", target.cell, target.family.template, target.family.opening]:
            raise UserError(f"{flags.export} is for {made_for}, not for TRL and {flags.model}: export again.")
    # The boxes are for these limits. Given as `size`, Qwen2.5-VL's own would win without a warning.
    model, (low, high) = model_folder(flags.model), target.pixels
    processor = AutoProcessor.from_pretrained(model, min_pixels=low, max_pixels=high, padding_side="left")
    with args.main_process_first(desc="reading the export"):
        data = load_dataset("json", data_files=str(flags.export / "train.jsonl"), split="train")
        data = data.map(lambda row: {"images": [str(flags.export.absolute() / p) for p in row["images"]]})
    data = data.cast_column("images", List(Image()))
    trainer = build_trainer(model, flags.lora_rank, args, data, processor)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()


if __name__ == "__main__":
    main()
