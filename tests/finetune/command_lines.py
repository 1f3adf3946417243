"""Command lines and files of other projects, as their READMEs and scripts have them.

| name | where it stands |
|---|---|
| `TRL` | the head of trl's `trl/scripts/sft.py` |
| `PEFT` | `examples/miss_finetuning/README.md` of PEFT |
| `PEFT_BONE` | `examples/bone_finetuning/README.md` of PEFT |
| `AUTHOR` | `scripts/` of the repository of MiSS, and `examples/bone_finetuning/scripts` of PEFT |
| `AXOLOTL` | axolotl's `examples/llama-3/lora-1b.yml`, from `base_model` on |
| `LLAMA_FACTORY` | LLaMA-Factory's `examples/train_lora/qwen3_lora_sft.yaml` |

Only paths are replaced: BASE, DATA and OUT. Launchers and their own flags are left out.
"""

TRL = {
    "lora": """--model_name_or_path BASE --dataset_name DATA --learning_rate 2.0e-4
        --num_train_epochs 1 --packing --per_device_train_batch_size 2
        --gradient_accumulation_steps 8 --gradient_checkpointing --eos_token <|im_end|>
        --eval_strategy steps --eval_steps 100 --use_peft --lora_r 32 --lora_alpha 16
        --output_dir OUT --push_to_hub""",
    "quantised": """--model_name_or_path BASE --model_revision main --dtype bfloat16
        --dataset_name DATA --dataset_train_split train --use_peft --lora_r 16 --lora_alpha 32
        --lora_dropout 0.1 --use_rslora --lora_target_modules q_proj v_proj
        --lora_modules_to_save norm --load_in_4bit --bnb_4bit_quant_type nf4
        --use_bnb_nested_quant --output_dir OUT""",
}
_PEFT = """--base_model_name_or_path BASE --output_dir OUT {} --bits bf16 --data_path DATA
    --dataset_split train[:100000] --dataset_field query response --bf16 True --num_train_epochs 1
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --save_strategy steps
    --save_steps 1000 --save_total_limit 1 --logging_steps 1 --learning_rate 2e-5 --weight_decay 0.
    {} 0.03 --tf32 True --report_to none"""
PEFT = {
    init: _PEFT.format(f"--miss_r 64 --miss_dropout 0.01 --init_weights {init}", "--warmup_steps")
    for init in ("True", "bat", "mini")
}
PEFT_BONE = {"bone": _PEFT.format("--bone_r 64 --init_weights True", "--warmup_ratio")}

_AUTHOR = """--model_name_or_path BASE {}
    --target_modules q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj {} --data_path DATA
    --dataset_field query response --dataset_split train --output_dir OUT --num_train_epochs 1
    --model_max_length 512 --per_device_train_batch_size 2 --gradient_accumulation_steps 8
    --save_strategy steps --save_steps 1000 --save_total_limit 2 --learning_rate 2e-5
    --weight_decay 0. --warmup_ratio 0. --logging_steps 1 --lr_scheduler_type cosine --merge True
    {}"""
AUTHOR = {
    "bone": _AUTHOR.format("--use_bone True", "--bone_r 64", "--report_to wandb --run_name bone"),
    "miss": _AUTHOR.format(
        "--use_miss True",
        "--miss_r 64 --miss_mini_r 64 --init_miss_weight mini",
        "--report_to none --run_name miss",
    ),
    "lora": _AUTHOR.format(
        "--use_lora True --init_lora_weights True",
        "--lora_rank 36 --lora_alpha 72 --lora_dropout 0",
        "--report_to wandb --run_name lora",
    ),
    "lora of 16 bits": _AUTHOR.format(
        "--use_lora True --bits 16 --double_quant --quant_type nf4", "--lora_rank 32", ""
    ),
}

COMMAND_LINES = {
    f"{family} {name}": words
    for family, lines in (
        ("trl", TRL), ("PEFT", PEFT), ("PEFT", PEFT_BONE), ("author", AUTHOR),
    )
    for name, words in lines.items()
}  # fmt: skip

AXOLOTL = """
base_model: BASE

load_in_8bit: false
load_in_4bit: false
strict: false

datasets:
  - path: DATA
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: OUT

adapter: lora
lora_model_dir:

sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true

lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_fan_in_fan_out:
lora_target_modules:
  - gate_proj
  - down_proj
  - up_proj
  - q_proj
  - v_proj
  - k_proj
  - o_proj

wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:

gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002

train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false

gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true

loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3

warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
  pad_token: "<|im_end|>"
"""

LLAMA_FACTORY = """
### model
model_name_or_path: BASE
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: DATA
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: OUT
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
FILES = {"axolotl": AXOLOTL, "LLaMA-Factory": LLAMA_FACTORY}


def fill(text: str, base: object, data: object, out: object) -> str:
    """Return a command line or a file with its paths replaced."""
    for name, path in (("BASE", base), ("DATA", data), ("OUT", out)):
        text = text.replace(name, str(path))
    return text
