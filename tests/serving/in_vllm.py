"""Run by vLLM's Python: answer prompts with a model and its adapters, and write what it found.

The file that the command line names has a model, its adapters, and questions; the answers go beside
it. This needs no disha.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    file = Path(sys.argv[1])
    asked = json.loads(file.read_text(encoding="utf-8"))
    model = LLM(
        asked["model"],
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",  # in this process
        enable_lora=True,
        max_loras=asked["places"],
        max_lora_rank=asked["max_lora_rank"],
        max_model_len=64,
        skip_tokenizer_init=True,
    )
    requests = {
        name: LoRARequest(name, number, folder)
        for number, (name, folder) in enumerate(asked["adapters"].items(), start=1)
    }
    sampling = SamplingParams(
        temperature=0.0, max_tokens=asked["tokens"], logprobs=1, ignore_eos=True, detokenize=False
    )
    outputs = model.generate(
        [{"prompt_token_ids": question["ids"]} for question in asked["questions"]],
        sampling,
        lora_request=[requests.get(question["adapter"]) for question in asked["questions"]],
    )
    found = []
    for output in outputs:
        (answer,) = output.outputs
        tokens = list(answer.token_ids)
        chosen = zip(tokens, answer.logprobs, strict=True)
        found.append({"ids": tokens, "log_probs": [each[token].logprob for token, each in chosen]})
    file.with_name("answers.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":  # vLLM starts processes, which import this file
    main()
