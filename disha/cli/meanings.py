"""Short names of flags, the meanings of unknown words, and errors that name flags, not arguments.

Other tools have other names for the same settings. So an unknown word is first looked up in a
table: `--rank` means `--r`, not `--tf32`. If the table does not have it, its letters are compared.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

__all__ = ["COMMAND_WORDS", "FLAG_WORDS", "SHORT", "in_flags", "long_name", "nearest"]

SHORT: Mapping[str, str] = {
    "base": "base_model_name_or_path",
    "data": "data_path",
    "output": "output_dir",
    "r": "bone_r",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size per_device_eval_batch_size",
    "arch": "architecture",
}
"""A short name of a flag -> its full names, with spaces between them. A command has one of them."""

COMMAND_WORDS: Mapping[str, str] = {
    "finetune": "train training tune sft fit lora run",
    "generate": "chat ask talk answer infer inference predict sample complete prompt",
    "evaluate": "eval test score benchmark measure perplexity",
    "convert": "export import save",
    "merge": "fuse apply bake",
    "combine": "add sum mix average blend",
    "inspect": "info show print cat ls list describe",
    "diff": "compare cmp",
    "verify": "check validate",
}
"""A command -> words of other tools that mean it."""

FLAG_WORDS: Mapping[str, str] = {
    "base": "model_name_or_path model_name model_path model_id model_dir pretrained checkpoint_dir",
    "data": "dataset train_file train_data train_path dataset_name files eval_path",
    "output": "out out_dir save_dir save_path",
    "r": "rank lora_r lora_rank network_dim dim",
    "rank": "r lora_r",
    "method": "peft_type adapter_type algorithm",
    "lr": "step_size max_lr",
    "epochs": "passes num_epochs",
    "max_steps": "steps iters iterations",
    "batch_size": "batch bs micro_batch_size train_batch_size",
    "gradient_accumulation_steps": "accumulate grad_accum grad_accumulation",
    "max_seq_length": "max_length max_len cutoff_len block_size context_length seq_len",
    "adapter_dropout": "dropout lora_dropout",
    "dropout": "adapter_dropout lora_dropout",
    "bone_r_out": "r_out tile mini",
    "target": "target_modules lora_target layers lora_layers",
    "exclude": "exclude_modules ignore skip",
    "rank_pattern": "ranks r_pattern",
    "also_train": "modules_to_save unfreeze",
    "lr_scheduler_type": "scheduler lr_scheduler schedule lr_decay",
    "warmup_ratio": "warmup warmup_steps",
    "weight_decay": "wd decay",
    "max_grad_norm": "clip grad_clip gradient_clip_val",
    "optimizer": "optim optimiser",
    "bf16": "fp16 half amp precision mixed_precision",
    "bits": "quantize quantization",
    "bits 4": "load_in_4bit qlora",
    "bits 8": "load_in_8bit",
    "resume": "continue checkpoint resume_from resume_from_checkpoint",
    "overwrite_output_dir": "overwrite force",
    "overwrite": "force overwrite_output_dir",
    "eval_path": "val_data validation_file valid_file dev_file eval_dataset",
    "eval_fraction": "val_size val_split validation_split_percentage test_size",
    "eval_steps": "eval_every eval_interval",
    "logging_steps": "log_every log_interval",
    "save_steps": "save_every save_interval",
    "save_total_limit": "keep keep_checkpoints",
    "report_to": "logger wandb tensorboard log_with",
    "dataloader_num_workers": "workers num_workers",
    "dataset_field": "fields columns text_field dataset_text_field",
    "dataset_split": "split train_split eval_split",
    "template": "prompt_template chat_template",
    "gradient_checkpointing": "checkpointing recompute",
    "strategy": "fsdp ddp deepspeed",
    "dry_run": "preview plan",
    "max_new_tokens": "max_tokens n_predict length",
    "temperature": "temp",
    "prompt": "text question query message",
    "prompt_file": "prompts input",
    "adapter": "lora lora_path adapter_path adapter_name_or_path peft",
    "merge": "fuse",
}
"""A flag -> the names that other tools and commands have for it. A value follows the flag if the
names imply one."""


def long_name(word: str, known: Collection[str]) -> str:
    """Return the full name of a flag, which may be spelled with dashes or be a short name."""
    name = word.replace("-", "_")
    long = (one for one in SHORT.get(name, "").split() if one in known)
    return name if name in known else next(long, name)


def nearest(word: str, known: Collection[str], meanings: Mapping[str, str]) -> str | None:
    """Return what an unknown word means, by the table or by its letters; None if that is unclear.

    Args:
        word: the word.
        known: all words that are allowed.
        meanings: what is allowed somewhere -> the words that people may say for it.
    """
    names = {
        said: meaning
        for meaning, words in meanings.items()
        if long_name(meaning.split()[0], known) in known
        for said in words.split()
    }
    names |= {one: one for one in (*known, *SHORT) if long_name(one, known) in known}
    said = word.replace("-", "_").lower()
    if said in names:
        return names[said]
    near = difflib.get_close_matches(said, names, n=1, cutoff=0.75)
    return names[near[0]] if near else None


ARGUMENT = re.compile(
    r"^(?P<first>\w+)(?= must | matches | ['\"])|`(?P<quoted>\w+)`"
    r"|(?<![\w/.-])(?P<name>\w+)=(?P<switch>True\b|False\b)?"
)
"""How messages of the library write arguments: r must be, `r`, r=8, overwrite=True."""


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return a message of the library with flags in place of arguments.

    Args:
        message: the message.
        flags: an argument -> the flag that sets it.
    """

    def flag(found: re.Match[str]) -> str:
        name = found["first"] or found["quoted"] or found["name"]
        if name not in flags:
            return found[0]
        has_value = found["name"] and re.match(r"[\w'\"-]", message[found.end() :])
        return flags[name] + (" " if has_value else "")

    return ARGUMENT.sub(flag, message)
