"""`python -m docs.new_tokens`: SmolLM2-135M learns to answer with two new tokens.

In each row, a sum stands between `<think>` and `</think>`, and the answer after it. The script
counts in how many answers to questions that it has not seen both tokens are generated. Its base is
that of `docs.demo`, and flags are those of `disha finetune`.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from collections.abc import Sequence

from docs.demo import DATA, demo_words, disha_command, unpacked

HELD_OUT = 8
WORDS = """--new_tokens <think> </think> --r 16 --learning_rate 2e-3 --max_steps 30 --samples 0
--per_device_train_batch_size 2 --logging_steps 5 --eval_split train[:4] --overwrite_output_dir"""


def rows() -> list[dict[str, str]]:
    """Return questions, and answers that think first."""
    pairs = [(a, b) for a in range(10, 40) for b in range(10, 40)]
    return [
        {
            "query": f"What is {a} plus {b}?",
            "response": f"<think>{a} and {b} make {a + b}.</think>It is {a + b}.",
        }
        for a, b in random.Random(0).sample(pairs, len(pairs))
    ]


def main(argv: Sequence[str]) -> int:
    """Fine-tune, generate, and count."""
    DATA.mkdir(exist_ok=True)
    held_out, learned = rows()[:HELD_OUT], rows()[HELD_OUT:]
    base, data = unpacked(demo_words()[1], DATA / "model"), DATA / "thoughts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in learned), encoding="utf-8")
    folder = DATA / "new-tokens"
    words = ["--base", str(base), "--data", str(data), "--output_dir", str(folder)]
    code = disha_command(["finetune", *words, *WORDS.split(), *argv])
    if code:
        return code
    adapter = ["--adapter", str(folder / "adapter.safetensors"), "--max_new_tokens", "32"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        disha_command(["generate", *adapter, "--prompt", *(row["query"] for row in held_out)])
    answers = said.getvalue().splitlines()[1::2]  # each stands below its question
    print("\n".join(answers))
    both = [answer for answer in answers if "<think>" in answer and "</think>" in answer]
    print(f"both tokens are in {len(both)} of {len(answers)} answers")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
