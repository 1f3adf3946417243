"""vLLM gives the tokens and log-probabilities of the adapted model: `python -m tests.serving`."""

import pytest

from tests.serving.served import PROMPTS, Served, check_answers, check_that_all_differ

NO_TRITON = "AttributeError: module 'triton.language' has no attribute 'float32'"


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_several_adapters_at_once(tmp_path, family):
    served = Served(tmp_path, family)
    models = {"eight": served.adapt("eight", 8), "sixteen": served.adapt("sixteen", 16)}
    models[None] = served.load()
    questions = [(name, ids) for ids in PROMPTS for name in models]
    check_answers(served.answer(questions), models, questions)
    check_that_all_differ(models)


def test_a_rank_above_sixteen_needs_the_flag(tmp_path):
    served = Served(tmp_path, "Llama")
    models = {"large": served.adapt("large", 24)}
    questions = [("large", PROMPTS[0])]
    assert "rank 24 is greater than max_lora_rank 16" in served.answer(questions, max_rank=16)
    check_answers(served.answer(questions, served.max_rank("large")), models, questions)


def test_experts(tmp_path):
    served = Served(tmp_path, "Mixtral")
    models = {"experts": served.adapt("experts", 8)}
    questions = [("experts", PROMPTS[0])]
    found = served.answer(questions)
    if isinstance(found, str) and NO_TRITON in found:
        pytest.skip(f"its kernel for experts with LoRAs needs triton: {NO_TRITON}")
    check_answers(found, models, questions)


@pytest.mark.xfail(
    reason="vLLM 0.32 on a processor: a request without an adapter, beside one with an adapter, "
    "gets the adapter in the last place (lora_b_weights[-1] in vllm/lora/ops/torch_ops)",
    strict=True,
)
def test_without_an_empty_place_the_base_is_the_base(tmp_path):
    served = Served(tmp_path, "Llama")
    models = {"mine": served.adapt("mine", 8), None: served.load()}
    questions = [("mine", PROMPTS[0]), (None, PROMPTS[0])]
    found = served.answer(questions, places=1)
    if isinstance(found, str):
        pytest.exit(f"vLLM failed:\n{found[-4000:]}")
    check_answers(found, models, questions)
