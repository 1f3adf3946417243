"""Tiny tokenizers of each family, trained in a moment and written as model folders are.

Each has its family's parts (normaliser, way of cutting, post-processor, special tokens, classes
named in its files) and a chat template of its family's shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from tests.finetune.text import chat_templates

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and it's 12345 times quicker than 678 others.",
    "What is the answer? We'll say: the answer is that there isn't one; they've asked, I'd wait.",
    "Once upon a time there was a question:\n\n    def answer(question):\n        return 42\n",
    "user asks what assistant answers; system tells the assistant what the user wants to be told",
    "Zürich, Málaga, Київ, 東京 and Ελλάδα are places; naïve café déjà-vu. <<<>>> [INST] [/INST]",
)

LLAMA3_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_CUTS = LLAMA3_CUTS.replace(r"\p{N}{1,3}", r"\p{N}")

SENTENCEPIECE_SPECIAL = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Family:
    """A tokenizer and the files around it."""

    backend: BackendTokenizer
    config: Mapping[str, Any]
    files: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, **config: Any) -> Path:
        """Write the folder; `config` changes tokenizer_config.json, None leaves a key out."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        merged = {**self.config, **config}
        kept = {key: value for key, value in merged.items() if value is not None}
        for name, content in {"tokenizer_config.json": kept, **self.files}.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return folder


def smollm2() -> Family:
    """Its files name GPT-2's class, whose way of cutting transformers would take instead."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend = _byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        ),
        special,
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return Family(
        backend,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "chat_template": chat_templates.SMOLLM2,
        },
        {"config.json": {"model_type": "llama", "eos_token_id": 2}},
    )


def qwen2() -> Family:
    return _qwen(chat_templates.QWEN2, "qwen2")


def qwen3() -> Family:
    return _qwen(chat_templates.QWEN3, "qwen3")


def llama3() -> Family:
    special = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    backend = _byte_level(_cut(LLAMA3_CUTS), special, ignore_merges=True)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
            ),
        ]
    )
    return Family(
        backend,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "chat_template": chat_templates.LLAMA3,
        },
        {
            "config.json": {"model_type": "llama", "eos_token_id": [1, 4]},
            "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1, 4]},
        },
    )


def llama2() -> Family:
    backend = _sentencepiece()
    return Family(
        backend,
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False},
            "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False},
            "unk_token": "<unk>",
            "chat_template": chat_templates.LLAMA2,
        },
        {
            "config.json": {"model_type": "llama", "eos_token_id": 2},
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        },
    )


def mistral() -> Family:
    backend = _sentencepiece()
    return Family(
        backend,
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": chat_templates.MISTRAL,
        },
        {"config.json": {"model_type": "mistral", "eos_token_id": 2}},
    )


FAMILIES = {
    "smollm2": smollm2,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "llama3": llama3,
    "llama2": llama2,
    "mistral": mistral,
}


def _qwen(template: str, model_type: str) -> Family:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend = _byte_level(_cut(QWEN_CUTS), special)
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    backend.add_tokens([AddedToken("</think>", normalized=False)])
    return Family(
        backend,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": template,
        },
        {
            "config.json": {"model_type": model_type, "eos_token_id": 2},
            "generation_config.json": {"bos_token_id": 0, "eos_token_id": [2, 0]},
        },
    )


def _cut(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level(
    cut: pre_tokenizers.PreTokenizer, special: tuple[str, ...], *, ignore_merges: bool = False
) -> BackendTokenizer:
    backend = BackendTokenizer(BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=len(special) + 256 + 250,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def _sentencepiece() -> BackendTokenizer:
    """As the tokenizer.json of Llama 2 is: bytes for unknown characters, a space put before."""
    special = [AddedToken(token, normalized=False, special=True) for token in SENTENCEPIECE_SPECIAL]
    learning = BackendTokenizer(BPE())
    learning.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learning.train_from_iterator(
        SENTENCES, BpeTrainer(vocab_size=300, initial_alphabet=["▁"], show_progress=False)
    )
    learned = json.loads(learning.to_str())["model"]
    letters = sorted(token for token in learned["vocab"] if len(token) == 1 and token != "\n")
    merges = [tuple(pair) for pair in learned["merges"] if "\n" not in "".join(pair)]
    tokens = [
        *SENTENCEPIECE_SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *("".join(pair) for pair in merges),
        *letters,
    ]
    backend = BackendTokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend
