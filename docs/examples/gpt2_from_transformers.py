"""Adapt a GPT-2 of transformers, without PEFT.

GPT-2 keeps its weights as (in, out), in its own layer class `Conv1D`, which is adapted like a
linear layer. The model here is small and random, so nothing is downloaded; replace it by
`GPT2LMHeadModel.from_pretrained("gpt2")`. It learns the bytes of this file.

    python docs/examples/gpt2_from_transformers.py

Needs transformers. Finally the adapter is written as a LoRA too, which PEFT can load.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import disha


def base_model(layers):
    """Return a small GPT-2 that reads bytes, with the same random weights each time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": 128, "n_embd": 128, "n_layer": layers, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def main(argv=None):
    """Adapt, train, save, load elsewhere, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args(argv)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    rows = text[: len(text) // 128 * 128].view(-1, 128)

    model = base_model(options.layers)
    disha.inject_adapters(model, r"\.(c_attn|c_proj|c_fc)$", r=16, also_train=r"ln_f\.|wpe\.")
    found = disha.summary(model)
    print(f"trainable {found.trainable:,} of {found.total:,} parameters ({found.percent:.1f}%)")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
    for step in range(options.steps):
        batch = rows[torch.arange(4 * step, 4 * step + 4) % len(rows)]
        logits = model(input_ids=batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.4f} before, {losses[-1]:.4f} after")

    elsewhere = base_model(options.layers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gpt2.safetensors")
        disha.save_adapter(model, path)
        disha.load_adapter(elsewhere, path)
        print(f"adapter file: {path.stat().st_size:,} bytes")
        report = disha.interop.lora.export(model, Path(folder, "as-lora"))
        print(f"for PEFT: {len(report.layers)} layers, relative error {report.error:g}")
    with torch.no_grad():
        output, again = (one.eval()(input_ids=rows).logits for one in (model, elsewhere))
    print(f"reloaded: outputs differ by at most {(output - again).abs().max():g}")


if __name__ == "__main__":
    main()
