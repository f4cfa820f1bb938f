"""TRL's GRPOTrainer on an export of the loop's cues, with the loop's reward and the paper's values.

    python -m scale.export cues --format trl --model Qwen/Qwen2.5-VL-7B-Instruct --data coco …
    accelerate launch --config_file scale/one_machine.yaml --module scale.train_trl cues --model Qwen/…

Every flag of TRL's GRPOConfig can follow; without it the paper's value holds (Table 8, and PAPER §4).
"""

import argparse
import json
import os
from pathlib import Path

import torch
from datasets import Image, List, load_dataset
from peft import LoraConfig
from transformers import AutoProcessor, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from files.errors import UserError, model_folder
from prompts import Family
from scale.export import find_target
from scale.rewards import box_reward

# dapo is the mean over the tokens of an optimizer step, the loop's token_mean; delta bounds the ratio at
# negative advantages, which is the dual clip; constant_with_warmup takes a share of the steps below 1.
PAPER = dict(loss_type="dapo", beta=0.01, use_bias_correction_kl=False, epsilon=0.2, epsilon_high=0.3)
PAPER |= dict(delta=3.0, num_generations=8, temperature=1.0, top_p=1.0, weight_decay=0.01, max_grad_norm=1.0)
PAPER |= dict(lr_scheduler_type="constant_with_warmup", warmup_steps=0.05, max_steps=400)
OURS = dict(shuffle_dataset=False, max_completion_length=256, logging_steps=1, save_steps=50)


def read_flags() -> tuple[argparse.Namespace, dict, GRPOConfig]:
    """Our few flags, the export's settings, and TRL's flags with the paper's defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("export", type=Path, help="folder of python -m scale.export --format trl")
    parser.add_argument("--model", default="tiny", help="tiny, a model folder or a hub id")
    parser.add_argument("--lora-rank", type=int, default=0, help="rank of an adapter; 0: all weights")
    parser.add_argument("--prompts", type=int, default=128, help="an optimizer step; paper")
    parser.add_argument("--updates", type=int, default=4, help="optimizer steps a rollout; paper")
    parser.add_argument("--micro-batch", type=int, default=8, help="answers in one pass; memory only")
    ours, rest = parser.parse_known_args()
    path, answers = ours.export / "train.settings.json", ours.prompts * PAPER["num_generations"]
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        target = find_target("trl", ours.model, settings["box_frame"], settings["pixels"])
    except (OSError, ValueError, KeyError, UserError) as error:
        parser.error(f"{error}: export the cues first, with python -m scale.export --format trl.")
    made_for = [settings[name] for name in ("engine", "cell", "template", "opening")]
    if made_for != ["trl", target.cell, target.family.template, target.family.opening]:
        parser.error(f"{ours.export} is not for TRL and {ours.model}, but for {made_for}: export it anew.")
    each = ours.micro_batch * int(os.environ.get("WORLD_SIZE", 1))
    if answers % each:
        parser.error(f"--prompts {ours.prompts} are {answers} answers, no multiple of {each} in one pass.")
    batch = dict(per_device_train_batch_size=ours.micro_batch, gradient_accumulation_steps=answers // each)
    batch |= dict(steps_per_generation=answers // each * ours.updates, bf16=torch.cuda.is_available())
    trl = HfArgumentParser(GRPOConfig)
    trl.set_defaults(**PAPER, **OURS, **batch, learning_rate=1e-5 if ours.lora_rank else 1e-6)
    return ours, settings, trl.parse_args_into_dataclasses(rest)[0]


def main() -> None:
    ours, settings, args = read_flags()
    model, (low, high), rank = model_folder(ours.model), settings["pixels"], ours.lora_rank
    # The boxes are for these limits. Given as `size`, Qwen2.5-VL's own would win without a word.
    processor = AutoProcessor.from_pretrained(model, min_pixels=low, max_pixels=high, padding_side="left")
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=Family.lora_targets) if rank else None
    with args.main_process_first(desc="reading the export"):
        data = load_dataset("json", data_files=str(ours.export / "train.jsonl"), split="train")
        data = data.map(lambda row: {"images": [str(ours.export.absolute() / p) for p in row["images"]]})
    data = data.cast_column("images", List(Image()))
    trainer = GRPOTrainer(model, box_reward, args, data, processing_class=processor, peft_config=lora)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()


if __name__ == "__main__":
    main()
