"""Trainers of `trl` on models with adapters, compared with the same trainers on models of PEFT."""

import copy
import gc
import random
import sys
from functools import partial
from types import FunctionType, MappingProxyType, ModuleType, SimpleNamespace

import datasets
import peft
import pytest
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.generation import vllm_generation

import disha
from disha.integrations.transformers import AdapterCheckpoints
from disha.integrations.trl import DPOTrainer, GRPOTrainer, RLOOTrainer
from disha.layers.blocks import AdapterBlock
from tests.conftest import logged_by
from tests.integrations.models import FILES, assert_same
from tests.reference import METHODS

WORDS = [f"w{number}" for number in range(61)]
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
SETTINGS = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def tokenizer():
    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    words = Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def llama(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options}))


def adapted(**options):
    return disha.inject_adapters(llama(), "|".join(TARGETS), r=4, **options)


def rows(*columns):
    random.seed(0)
    words = [" ".join(random.choices(WORDS, k=5)) for _ in range(16 * len(columns))]
    return datasets.Dataset.from_dict(
        {name: words[number :: len(columns)] for number, name in enumerate(columns)}
    )


def made(kind, model, settings, data, named=None, keep=False):
    arguments = {"callbacks": [AdapterCheckpoints(model)] if keep else []}
    return kind(
        model,
        args=settings,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer(),
        **(arguments | (named or {})),
    )


# --- SFTTrainer ----------------------------------------------------------------------------------


def tuned(model, folder, steps, resume=None, **options):
    settings = trl.SFTConfig(folder, max_steps=steps, save_steps=2, **{**SETTINGS, **options})
    trainer = made(trl.SFTTrainer, model, settings, rows("text"), keep=True)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_sft_keeps_the_adapter_only_and_resumes_bit_for_bit(tmp_path):
    whole, part, rest = (adapted(also_train="norm") for _ in range(3))
    tuned(whole, tmp_path / "whole", 4)
    tuned(part, tmp_path / "part", 2)
    disha.inject_adapters(rest, "q_proj", r=2, adapter="other")  # a checkpoint does not have it
    disha.set_active_adapters(rest, "default")
    for block in disha.adapter_parameters(rest, "other"):
        block.requires_grad_(False)
    with logged_by("transformers") as messages:
        tuned(rest, tmp_path / "part", 4, resume=True)
    assert not any("missing keys" in message for message in messages)
    disha.remove_adapters(rest, "other")
    assert_same(rest, whole)
    assert all(bool(block.any()) for block in disha.adapter_parameters(whole))
    names = {file.name for file in (tmp_path / "whole" / "checkpoint-4").iterdir()}
    assert names >= FILES
    assert not {name for name in names - FILES if "model" in name}


def test_a_peft_config_beside_checkpoints_of_our_adapter_is_refused(tmp_path):
    model = adapted()
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings = trl.SFTConfig(tmp_path, report_to=[], use_cpu=True)
    given = {"peft_config": config, "callbacks": [AdapterCheckpoints(model)]}
    with pytest.raises(disha.ArgumentError, match="a peft_config has added an adapter of PEFT"):
        made(trl.SFTTrainer, model, settings, rows("text"), given)


def test_a_peft_config_that_freezes_the_adapter_is_told(tmp_path):
    settings = trl.SFTConfig(tmp_path, max_steps=1, **SETTINGS)
    config = peft.LoraConfig(target_modules=["q_proj"])
    trainer = made(trl.SFTTrainer, adapted(), settings, rows("text"), {"peft_config": config})
    with pytest.warns(UserWarning, match="adapter 'default' is frozen, .* leave that out"):
        trainer.train()


def quantized(folder):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    return disha.inject_adapters(model, "|".join(TARGETS), r=4, dtype=torch.float32)


def test_over_a_quantized_base_blocks_train_and_keep_their_dtype(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = quantized(tmp_path / "base")
    tuned(model, tmp_path / "run", 2)
    preferring(model, tmp_path / "run", keep=True, max_steps=4, save_steps=4).train()
    rewarded(model, tmp_path / "run", keep=True, max_steps=6, save_steps=6).train()
    assert model.is_quantized
    assert model.is_loaded_in_4bit
    blocks = list(disha.adapter_parameters(model))
    assert {block.dtype for block in blocks} == {torch.float32}
    assert all(bool(block.any()) for block in blocks)
    disha.remove_adapters(model, "default_reference")
    again = quantized(tmp_path / "base")
    disha.load_adapter(again, tmp_path / "run" / "checkpoint-6", replace=True)
    assert_same(again, model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("target", "tied"), [("lm_head", False), ("embed_tokens", True)])
def test_an_adapter_on_the_head_trains(tmp_path, method, target, tied):
    """The losses of trl read the head's weight. The same steps with a dense one are the oracle."""
    model = llama(tie_word_embeddings=tied)
    disha.inject_adapters(model, target, r=4, method=method, init="kaiming")
    (block,), expected = disha.adapter_parameters(model), copy.deepcopy(model)
    start = block.detach().clone()
    trainer = tuned(model, tmp_path, 1, optim="sgd", max_grad_norm=0)
    batch = next(iter(trainer.get_train_dataloader()))
    expected(**batch).loss.backward()
    (gradient,) = (one.grad for one in disha.adapter_parameters(expected))
    torch.testing.assert_close(block.detach(), start - 1e-2 * gradient)
    preferring(model, tmp_path, max_steps=1).train()
    assert not torch.equal(block, start - 1e-2 * gradient)


# --- DPOTrainer ----------------------------------------------------------------------------------


def preferring(model, folder, kind=DPOTrainer, named=None, keep=False, **options):
    settings = trl.DPOConfig(folder, **{**SETTINGS, "beta": 0.5, "max_steps": 2, **options})
    return made(kind, model, settings, rows("prompt", "chosen", "rejected"), named, keep)


def with_peft():
    return {"peft_config": peft.MissConfig(r=4, target_modules=list(TARGETS))}


def blocks_of(model, mark=".disha"):
    """Name of a layer -> its block, in a model of disha or of PEFT."""
    found = {name.removeprefix("base_model.model."): one for name, one in model.named_parameters()}
    return {name.split(mark)[0]: one for name, one in found.items() if mark in name}


def assert_agree(ours, theirs):
    """Everything that was logged and the final blocks are those of a trainer on a PEFT model."""
    assert len(ours.state.log_history) == len(theirs.state.log_history) > 3
    for found, expected in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert found.keys() == expected.keys()
        for name in found:
            if not any(word in name for word in ("time", "second", "flos")):
                assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    found = blocks_of(ours.model)
    expected = blocks_of(theirs.model, ".miss_block.default")
    assert found.keys() == expected.keys()
    for name, block in found.items():
        torch.testing.assert_close(block, expected[name], atol=1e-5, rtol=1e-4)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}], ids=str
)
def test_dpo_equals_peft(tmp_path, options):
    ours = preferring(adapted(dropout=0.1), tmp_path, **EVALUATED, **options)
    ours.train()
    theirs = preferring(llama(), tmp_path, trl.DPOTrainer, with_peft(), **EVALUATED, **options)
    theirs.train()
    assert_agree(ours, theirs)
    assert ours.state.log_history[0]["rewards/margins"] == 0
    assert ours.state.log_history[-2]["eval_rewards/margins"] != 0


def test_blocks_keep_their_dropout_if_trl_is_asked_to_keep_dropout(tmp_path, monkeypatch):
    model = adapted(dropout=0.5)
    preferring(model, tmp_path, disable_dropout=False)
    assert {block.dropout for block in blocks_in(model)} == {0.5}
    monkeypatch.chdir(tmp_path)  # without settings, trl makes its folder here, and wants a GPU
    on_cpu = partial(trl.DPOConfig, use_cpu=True, bf16=False)
    monkeypatch.setattr("trl.trainer.dpo_trainer.DPOConfig", on_cpu)
    made(DPOTrainer, model, None, rows("prompt", "chosen", "rejected"))
    assert {block.dropout for block in blocks_in(model)} == {0.0}


def trained_before(model):
    """Give the blocks the values that training would have given them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name in sorted(blocks_of(model)) or sorted(blocks_of(model, ".miss_block.default")):
            block = {**blocks_of(model), **blocks_of(model, ".miss_block.default")}[name]
            block.copy_(torch.randn(block.shape) / 20)
    return model


def peft_trained_before():
    config = with_peft()["peft_config"]
    return trained_before(peft.get_peft_model(llama(), config))


def test_after_sft_the_reference_is_the_model_as_it_was(tmp_path):
    """As with PEFT, for which trl makes a copy of the adapter."""
    model = trained_before(adapted())
    ours = preferring(model, tmp_path, **EVALUATED)
    theirs = preferring(peft_trained_before(), tmp_path, trl.DPOTrainer, **EVALUATED)
    with torch.no_grad():  # trl copies parameters by names that MiSS has not
        for name, block in blocks_of(theirs.model, ".miss_block.ref").items():
            block.copy_(blocks_of(theirs.model, ".miss_block.default")[name])
    for trainer in (ours, theirs):
        trainer.train()
    kept = {name: block for name, block in model.named_parameters() if "default_reference" in name}
    assert not any(block.requires_grad for block in kept.values())
    assert ours.state.log_history[0]["rewards/margins"] == 0
    disha.remove_adapters(model, "default_reference")
    assert_agree(ours, theirs)


def test_the_reference_after_sft_can_be_the_base_or_any_adapter(tmp_path):
    model = trained_before(adapted())
    theirs = preferring(peft_trained_before(), tmp_path, trl.DPOTrainer, **EVALUATED)
    theirs.model.delete_adapter("ref")  # then trl switches the adapter off
    theirs.train()
    disha.save_adapter(model, tmp_path / "sft.safetensors")
    ours = preferring(model, tmp_path, named={"reference": []}, **EVALUATED)
    ours.train()
    assert_agree(ours, theirs)

    model = trained_before(adapted())
    first = preferring(model, tmp_path, **EVALUATED)
    first.train()
    again = trained_before(adapted())
    disha.load_adapter(again, tmp_path / "sft.safetensors", "sft", activate=False)
    named = preferring(again, tmp_path, named={"reference": "sft"}, **EVALUATED)
    named.train()
    first_losses = [one.get("loss") for one in first.state.log_history]
    assert [one.get("loss") for one in named.state.log_history] == first_losses
    with pytest.raises(disha.ArgumentError, match="'default' is active and trains"):
        preferring(again, tmp_path, named={"reference": "default"})


def test_precomputed_results_depend_on_the_reference(tmp_path):
    """trl stores them under a hash of the reference."""
    model = trained_before(adapted())
    found = {}
    for names in ([], None):
        trainer = preferring(
            model, tmp_path, named={"reference": names}, precompute_ref_log_probs=True
        )
        found[names is None] = trainer.train_dataset["ref_chosen_logps"]
        fresh = trainer.compute_ref_log_probs(
            trainer.ref_model, next(iter(trainer.get_train_dataloader()))
        )
        assert torch.isfinite(torch.cat(fresh)).all()
    assert found[True] != found[False]


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_of_a_new_adapter_is_the_base(tmp_path, method):
    """No copy is made of an adapter without effect, also of a LoRA, whose A is not zero."""
    trainer = preferring(adapted(method=method), tmp_path)
    assert {layer.adapter for layer in disha.summary(trainer.model).layers} == {"default"}


# --- GRPOTrainer ---------------------------------------------------------------------------------


def reward(completions, **unused):
    return [len(set(one.split())) + one.count("1") / 10 for one in completions]


def rewarded(
    model, folder, kind=GRPOTrainer, named=None, keep=False, config=trl.GRPOConfig, **options
):
    own = {"num_generations": 2, "max_completion_length": 5, "max_steps": 2}
    settings = config(folder, **{**SETTINGS, **own, **options})
    named = {"reward_funcs": reward, **(named or {})}
    return made(kind, model, settings, rows("prompt"), named, keep)


def test_grpo_equals_peft(tmp_path):
    """Also the completions: they are generated with the adapter."""
    options = {"beta": 0.5, "num_iterations": 2, **EVALUATED}
    ours = rewarded(adapted(), tmp_path, **options)
    ours.train()
    theirs = rewarded(llama(), tmp_path, trl.GRPOTrainer, with_peft(), **options)
    theirs.train()
    assert_agree(ours, theirs)
    assert ours.args.beta == ours.beta == 0.5
    assert ours.state.log_history[1]["kl"] > 0


def test_grpo_needs_no_reference_without_beta(tmp_path):
    trainer = rewarded(trained_before(adapted()), tmp_path)
    assert trainer.ref_model is None
    assert {layer.adapter for layer in disha.summary(trainer.model).layers} == {"default"}


def test_rloo_equals_peft(tmp_path):
    options = {"config": trl.RLOOConfig, "beta": 0.5, **EVALUATED}
    ours = rewarded(adapted(), tmp_path, RLOOTrainer, **options)
    ours.train()
    theirs = rewarded(llama(), tmp_path, trl.RLOOTrainer, with_peft(), **options)
    theirs.train()
    assert_agree(ours, theirs)


class Served:
    """Stands for vLLM's `LLM`: a plain model, which loads weights by their names, and samples."""

    made = None

    def __init__(self, quantization, **unused):
        assert quantization is None
        Served.made = self
        self.syncs = []
        self.model = llama(tie_word_embeddings=unused["model"] == "tied").requires_grad_(False)
        runner = SimpleNamespace(model=self)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        config = SimpleNamespace(max_model_len=64)
        self.llm_engine = SimpleNamespace(model_executor=executor, model_config=config)
        self.names = []

    def load_weights(self, pairs):
        for name, weight in pairs:
            self.names.append(name)
            self.model.get_parameter(name).copy_(weight)

    def reset_prefix_cache(self):
        self.syncs.append((self.names, copy.deepcopy(self.model)))
        self.names = []

    def generate(self, prompts, sampling_params, use_tqdm):
        return [self.answer(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def answer(self, prompt, asked):
        tokens, found = list(prompt), []
        for _ in range(asked["max_tokens"]):
            log_probs = self.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(log_probs.exp().multinomial(1)))
            log_prob = float(log_probs[tokens[-1]])
            found.append({tokens[-1]: SimpleNamespace(rank=1, logprob=log_prob)})
        answer = SimpleNamespace(token_ids=tokens[len(prompt) :], logprobs=found)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[answer])


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Served, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # trl sets them, and they are to go again
        monkeypatch.delenv(name)


VLLM = {"use_vllm": True, "vllm_mode": "colocate", "save_strategy": "no", "max_steps": 3}
ROWS = {"embed_tokens": [4, 62]}


@pytest.mark.parametrize(
    ("kind", "base", "options"),
    [
        (GRPOTrainer, "plain", {}),
        (GRPOTrainer, "plain", {"method": "bat"}),
        (RLOOTrainer, "plain", {}),
        (GRPOTrainer, "tied", {"target_regex": "proj|embed|head", "also_train_rows": ROWS}),
        (GRPOTrainer, "four bits", {"target_regex": "[qv]_proj", "dtype": torch.float32}),
    ],
    ids=str,
)
def test_vllm_gets_the_weights_that_the_model_computes_with(served, tmp_path, kind, base, options):
    """Without vLLM: a plain model stands for its `LLM`, and keeps what each step sends it."""
    model = llama(tie_word_embeddings=base == "tied")
    names = [name for name, _ in model.named_parameters()]
    if base == "four bits":
        model.save_pretrained(tmp_path)
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config=settings, device_map="cpu"
        )
    disha.inject_adapters(model, **{"target_regex": "|".join(TARGETS), "r": 4, **options})
    model.name_or_path = base
    before = {name: value.clone() for name, value in model.named_parameters()}
    tokens = torch.arange(3, 51).view(4, 12)
    expected = []

    def reward_and_keep(completions, **unused):
        with torch.no_grad():
            expected.append(model(tokens).logits)
        return reward(completions)

    config = trl.RLOOConfig if kind is RLOOTrainer else trl.GRPOConfig
    named = {"reward_funcs": reward_and_keep}
    trainer = rewarded(model, tmp_path, kind, named, keep=True, config=config, **VLLM)
    trainer.train()
    assert len(Served.made.syncs) == len(expected) == 3
    for (sent, received), logits in zip(Served.made.syncs, expected, strict=True):
        assert sent == names
        torch.testing.assert_close(received(tokens).logits, logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[0], expected[-1], atol=1e-2)
    for name, value in model.named_parameters():
        assert ".disha." in name or torch.equal(value, before[name])


def test_a_tie_that_is_half_adapted_is_told_before_training(served, tmp_path):
    model = disha.inject_adapters(
        llama(tie_word_embeddings=True), "embed_tokens", r=4, exclude="lm_head"
    )
    with pytest.raises(disha.ModeError, match=r"lm_head.weight is tied to model.embed_tokens"):
        rewarded(model, tmp_path, **VLLM).train()


class ServedWithLora(Served):
    """Keeps which adapter it is told to load, and to answer with."""

    def __init__(self, enable_lora, max_lora_rank, **settings):
        super().__init__(**settings)
        assert (enable_lora, max_lora_rank) == (True, 8)  # the smallest that vLLM has
        self.asked = []
        self.llm_engine.add_lora = self.asked.append

    def generate(self, *given, lora_request, **named):
        self.asked.append(lora_request)
        return super().generate(*given, **named)


def test_vllm_in_the_process_answers_with_the_adapter(served, monkeypatch, tmp_path):
    request = SimpleNamespace(LoRARequest=lambda *given, **named: (*given, named))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    monkeypatch.setattr(vllm_generation, "LLM", ServedWithLora)
    folder = tmp_path / "lora"
    named = {"vllm_adapter_folder": folder}
    trainer = rewarded(adapted(), tmp_path, named=named, **VLLM)
    trainer.train()
    load = ("lora", 1, str(folder), {"load_inplace": True})
    answer = ("lora", 1, str(folder), {})
    assert Served.made.asked == [load, *[load, answer] * 3]
    assert (folder / "adapter_model.safetensors").exists()


class Client:
    """Stands for trl's client of a server of vLLM, which tells its settings and loads adapters."""

    taken = MappingProxyType({"max_lora_rank": 4, "max_loras": 2})
    answer = SimpleNamespace(ok=True)

    def __init__(self, base_url, **unused):
        self.base_url, self.session = base_url, self
        self.calls = []

    def init_communicator(self, device):
        raise RuntimeError("there is no GPU")

    def get_server_info(self):
        return {"lora_config": self.taken, "model_config": {"logprobs_mode": "processed_logprobs"}}

    def post(self, url, json):
        self.calls.append((url, json))
        return self.answer

    def reset_prefix_cache(self):
        self.calls.append("reset")


@pytest.fixture
def start(served, monkeypatch, tmp_path):
    """Make a trainer that sends its adapter to a server, and return what the server is asked."""
    monkeypatch.setattr(vllm_generation, "VLLMClient", Client)
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://vllm"}

    def make_trainer(**others):
        named = {"vllm_adapter_folder": tmp_path / "lora", **others}
        return rewarded(adapted(), tmp_path, named=named, **options).vllm_generation

    return make_trainer


def calls_of_a_sync(address, folder):
    """What a server is asked: to put the adapter of a folder in the place of the former one."""
    name = {"lora_name": folder.name}
    return [
        (f"{address}/v1/unload_lora_adapter", name),
        (f"{address}/v1/load_lora_adapter", {**name, "lora_path": str(folder)}),
        "reset",
    ]


def test_a_server_of_vllm_loads_the_adapter_from_its_folder(start, tmp_path):
    generation = start()
    folder = tmp_path / "lora"
    assert generation.vllm_client.calls == calls_of_a_sync("http://vllm", folder)
    assert generation.vllm_client.model == "lora"
    assert (folder / "adapter_model.safetensors").exists()


def test_each_server_of_vllm_behind_a_load_balancer_loads_the_adapter(start, tmp_path):
    addresses = ["http://one", "http://two"]
    generation = start(vllm_adapter_servers=addresses)
    loads = [calls_of_a_sync(address, tmp_path / "lora") for address in addresses]
    assert [server.calls for server in generation.servers] == loads
    assert generation.vllm_client.calls == []
    assert generation.vllm_client.model == "lora"
    generation.sync_weights()
    assert [server.calls for server in generation.servers] == [2 * load for load in loads]


@pytest.mark.parametrize("servers", [(), ("http://one",)])
@pytest.mark.parametrize(
    "taken", [None, {"max_lora_rank": 2, "max_loras": 2}, {"max_lora_rank": 4, "max_loras": 1}]
)
def test_a_server_of_vllm_must_have_room_for_the_adapter(start, monkeypatch, taken, servers):
    monkeypatch.setattr(Client, "taken", taken)
    said = r"rank 4; start vLLM at http://\w+ with --enable-lora --max-lora-rank 8 --max-loras 2$"
    with pytest.raises(disha.ArgumentError, match=said):
        start(vllm_adapter_servers=servers)


def test_a_server_of_vllm_that_does_not_load_the_adapter_is_told(start, monkeypatch):
    monkeypatch.setattr(Client, "answer", SimpleNamespace(ok=False, text="no such route"))
    with pytest.raises(disha.ArgumentError, match="did not load the adapter: no such route; it"):
        start()


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [preferring, rewarded])
def test_after_sft_it_keeps_the_adapter_only_and_resumes_bit_for_bit(tmp_path, make):
    whole, part, rest = (trained_before(adapted()) for _ in range(3))
    options = {"keep": True, "save_steps": 1}
    make(whole, tmp_path / "whole", **options).train()
    make(part, tmp_path / "part", **options, max_steps=1).train()
    make(rest, tmp_path / "part", **options).train(resume_from_checkpoint=True)
    assert_same(rest, whole)
    held = disha.inspect_adapter(tmp_path / "part" / "checkpoint-2" / "adapter.safetensors")
    assert len(held.tensors) == len(blocks_of(adapted()))


@pytest.mark.parametrize("make", [preferring, rewarded])
def test_the_best_is_loaded_at_the_end(tmp_path, make):
    model, again = (trained_before(adapted()) for _ in range(2))
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    # Fewer tokens are better here, so the first checkpoint is the best.
    best = {"metric_for_best_model": "num_tokens", "greater_is_better": False}
    options = {**every_step, **best, "load_best_model_at_end": True}
    make(model, tmp_path, keep=True, **options).train()
    disha.load_adapter(again, tmp_path / "checkpoint-1", replace=True)
    torch.testing.assert_close(
        *(list(disha.adapter_parameters(one, "default")) for one in (model, again)), rtol=0, atol=0
    )


def tables(start):
    """The memory of all tensors of the embedding's size that an object leads to."""
    found, seen, left = set(), set(), [start]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType)):
            continue
        seen.add(id(one))
        if issubclass(type(one), torch.Tensor) and one.shape == (64, 64):
            found.add(one.untyped_storage().data_ptr())
        function = type(one) is FunctionType
        left += one.__closure__ or () if function else gc.get_referents(one)
    return found


@pytest.mark.parametrize("make", [preferring, rewarded])
def test_the_base_is_in_memory_once(tmp_path, make):
    model = trained_before(adapted())
    trainer = make(model, tmp_path, beta=0.5, save_strategy="no", max_steps=1)
    trainer.train()
    assert trainer.ref_model is not None
    assert not list(trainer.ref_model.parameters())
    assert len(tables(model)) == 10
    assert tables(trainer) == tables(model)


@pytest.mark.parametrize("make", [preferring, rewarded])
def test_a_trainer_that_fails_leaves_the_model_as_it_was(tmp_path, make):
    model = trained_before(adapted(dropout=0.5))
    names = set(model.state_dict())
    for wrong, error, says in (
        ({"reference": 5}, disha.ArgumentTypeError, "must be an adapter's name or a list"),
        ({"callbacks": [object]}, AttributeError, "on_init_end"),
        ({"no_such_argument": 1}, TypeError, "no_such_argument"),
    ):
        with pytest.raises(error, match=says):
            make(model, tmp_path, named=wrong, beta=0.5)
        assert set(model.state_dict()) == names
        assert {block.dropout for block in blocks_in(model)} == {0.5}
    for _ in range(2):  # the second trainer replaces the copy of the first
        make(model, tmp_path, beta=0.5)
    disha.set_active_adapters(model, ["default", "default_reference"])
    with pytest.raises(disha.ArgumentError, match=r"'default_reference' is active and trains"):
        make(model, tmp_path, beta=0.5)


def blocks_in(model):
    return [one for one in model.modules() if isinstance(one, AdapterBlock)]


@pytest.mark.parametrize("make", [preferring, rewarded])
def test_what_does_not_fit_is_refused(tmp_path, make):
    with pytest.raises(disha.ArgumentError, match=r"it has none\).*call inject_adapters"):
        make(llama(), tmp_path)
    with pytest.raises(disha.ArgumentError, match="peft_config adds an adapter of PEFT"):
        make(adapted(), tmp_path, named={"peft_config": peft.LoraConfig()})
    with pytest.raises(disha.ArgumentError, match="ref_model is a second model"):
        make(adapted(), tmp_path, named={"ref_model": llama()})
    model = adapted()
    disha.set_active_adapters(model, [])
    with pytest.raises(disha.ArgumentError, match=r"no adapter .* is active \(it has default\)"):
        make(model, tmp_path)
    merged = adapted()
    disha.merge_adapters(merged)
    with pytest.raises(disha.MergeError, match="can't train while adapters are merged"):
        make(merged, tmp_path)
    with pytest.raises(disha.ArgumentError, match=r"norm.*inject without also_train"):
        make(adapted(also_train="norm"), tmp_path)
    with pytest.raises(disha.ArgumentError, match="sync_ref_model=True writes"):
        make(adapted(), tmp_path, sync_ref_model=True, beta=0.5)
    with pytest.raises(disha.ArgumentError, match="no adapter 'sft'"):
        make(adapted(), tmp_path, named={"reference": "sft"}, beta=0.5)
