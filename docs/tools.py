"""Write the tools of docs/compatibility.md: a feature is ticked where its tests ran and passed.

    python -m docs.tools

It also runs `python -m tests.runtimes` and `python -m tests.llamacpp`, which first download and
compile for some minutes.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
MARK, END = "<!-- written by python -m docs.tools -->", "<!-- end of the tools -->"

INTRODUCTION = """\
## Other tools

`python -m docs.tools` writes these tables from the tests; do not edit them. An empty cell means
that no test here shows the feature.

| mark | what was seen |
| --- | --- |
| ✓ | every test of the feature ran with the real library on a CPU, and passed |
| ✓ simulated | the same in two processes, where `accelerate` was told that CPUs are GPUs |
| ✓ read | the tool's own code reads the file; none of its kernels and no server ran for this |

vLLM's build for CPUs [was run](guides/vllm.md#what-was-tried), too.
"""

TICK = "✓"
SIMULATED = (
    "whole.test_transformers_parallel::test_on_two_ranks[trainers-check_trainer_",
    "whole.test_transformers_parallel::test_on_two_ranks[trainers-check_accelerate_",
    "whole.test_transformers_parallel::test_on_two_ranks[finetune-",
)
"""The beginnings of tests that tell accelerate that processors are GPUs, except with DDP."""

Features = Mapping[str, tuple[str, ...]]
"""Feature -> its tests, as `module::function` or `module::function[parameters]`."""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        text: what stands above the table.
        columns: the features.
        rows: tool -> its features.
    """

    text: str
    columns: tuple[str, ...]
    rows: Mapping[str, Features]

    def tests(self) -> Iterator[str]:
        """Yield the names of all tests."""
        for features in self.rows.values():
            for tests in features.values():
                yield from tests

    def render(self, passed: Mapping[str, bool]) -> str:
        """Return the text and the table as markdown.

        Args:
            passed: `module::function[parameters]` of each test -> whether it passed.
        """
        lines = [_line(["tool", *self.columns]), _line(["---", *[":-:"] * len(self.columns)])]
        for tool, features in self.rows.items():
            cells = [_cell(features.get(column, ()), passed) for column in self.columns]
            lines.append(_line([tool, *cells]))
        return "\n".join([self.text, *lines]) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(tests: tuple[str, ...], passed: Mapping[str, bool]) -> str:
    if not tests or not all(_passed(test, passed) for test in tests):
        return ""
    if any(test.startswith("runtimes.") for test in tests):
        return f"{TICK} read"
    if any(test.startswith(SIMULATED) and "ddp]" not in test for test in tests):
        return f"{TICK} simulated"
    return TICK


def _passed(test: str, passed: Mapping[str, bool]) -> bool:
    """Return whether a test ran and passed, in each of its forms."""
    found = [one for name, one in passed.items() if name == test or name.startswith(f"{test}[")]
    return bool(found) and all(found)


TRAINER = "integrations.test_transformers"
ACCELERATE = "integrations.test_accelerate"
LIGHTNING = "integrations.test_lightning"
TRL = "integrations.test_trl"
FSDP = "whole.test_distributed::test_on_two_ranks[fsdp-check_{}]"
DDP = "whole.test_distributed::test_on_two_ranks[ddp-check_{}]"
TENSOR = "whole.test_distributed::test_on_two_ranks[tensor_parallel-check_{}]"
OF_TRANSFORMERS = (
    "whole.test_transformers_parallel::test_on_two_ranks[transformers_parallel-check_{}]"
)
PROCESSES = "whole.test_transformers_parallel::test_on_two_ranks[{}-check_{}]"
QUANTIZED_RANKS = "whole.test_transformers_parallel::test_on_two_ranks[quantized-check_{}]"
ZERO = "whole.test_transformers_parallel::test_on_two_ranks[deepspeed_zero-check_{}]"
PEFT = "interop.test_peft"
LORA = "interop.test_lora"
EXPERTS = "interop.test_experts"
IMAGES = "interop.test_image_lora"
SERVERS = "runtimes.test_runtimes"
LLAMA_CPP = "llamacpp.test_llamacpp"
LEAVING = "whole.test_leaving_pytorch"

STATES = f"{ACCELERATE}::test_states_of_accelerate_hold_the_adapter_and_resume_bit_for_bit"
OF_LIGHTNING = f"{LIGHTNING}::test_checkpoints_of_lightning_hold_the_adapter_and_resume_bit_for_bit"
CHECKPOINTS = f"{TRAINER}::test_checkpoints_hold_the_adapter_and_resume_bit_for_bit"
QUANTIZED = f"{TRL}::test_over_a_quantized_base_blocks_train_and_keep_their_dtype"
RESUMES = f"{TRL}::test_after_sft_it_keeps_the_adapter_only_and_resumes_bit_for_bit"
DPO, GRPO = f"{RESUMES}[preferring]", f"{RESUMES}[rewarded]"
BEST = f"{TRL}::test_the_best_is_loaded_at_the_end[{{}}]"
SFT = f"{TRL}::test_sft_keeps_the_adapter_only_and_resumes_bit_for_bit"

ENGINES = {"DDP": "ddp", "FSDP2": "fsdp2", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}


def _in_processes(script: str, check: str = "{}", *more: str) -> Features:
    return {
        column: (PROCESSES.format(script, check.format(engine)), *more)
        for column, engine in ENGINES.items()
    }


TABLES = (
    Table(
        """\
### Training

*Adapter only* means that a checkpoint holds the adapter and not the base. *As one process* means
that two processes train and save the same as one.
""",
        (
            *("trains", "quantised base", "adapter only", "resumes bit for bit", "best is loaded"),
            "as one process",
        ),
        {
            "Trainer of transformers": {
                "trains": (CHECKPOINTS,),
                "quantised base": (f"{TRAINER}::test_a_quantized_model_trains",),
                "adapter only": (CHECKPOINTS, f"{TRAINER}::test_a_checkpoint_is_no_model"),
                "resumes bit for bit": (CHECKPOINTS,),
                "best is loaded": (f"{TRAINER}::test_the_best_is_loaded_at_the_end",),
            },
            "SFTTrainer of trl": {
                "trains": (SFT,),
                "quantised base": (QUANTIZED,),
                "adapter only": (SFT,),
                "resumes bit for bit": (SFT,),
                "best is loaded": ("finetune.test_train.TestCourse::test_best_checkpoint",),
            },
            "DPOTrainer of trl, as with PEFT": {
                "trains": (
                    f"{TRL}::test_dpo_equals_peft",
                    f"{TRL}::test_the_base_is_in_memory_once",
                ),
                "quantised base": (QUANTIZED,),
                "adapter only": (DPO,),
                "resumes bit for bit": (DPO,),
                "best is loaded": (BEST.format("preferring"),),
            },
            "GRPOTrainer of trl, as with PEFT": {
                "trains": (
                    f"{TRL}::test_grpo_equals_peft",
                    f"{TRL}::test_the_base_is_in_memory_once",
                ),
                "quantised base": (QUANTIZED,),
                "adapter only": (GRPO,),
                "resumes bit for bit": (GRPO,),
                "best is loaded": (BEST.format("rewarded"),),
            },
            "Lightning": {
                "trains": (OF_LIGHTNING,),
                "quantised base": (OF_LIGHTNING,),
                "adapter only": (OF_LIGHTNING,),
                "resumes bit for bit": (OF_LIGHTNING,),
                "best is loaded": (OF_LIGHTNING,),
            },
            "Accelerate": {
                "trains": (STATES,),
                "quantised base": (STATES,),
                "adapter only": (STATES,),
                "resumes bit for bit": (STATES,),
            },
            "DDP": {
                "trains": (DDP.format("training"),),
                "quantised base": (QUANTIZED_RANKS.format("other_libraries"),),
                "adapter only": (DDP.format("saving"),),
                "as one process": (DDP.format("training"),),
            },
            "FSDP2": {
                "trains": (FSDP.format("training"),),
                "quantised base": (QUANTIZED_RANKS.format("four_bits_and_experts"),),
                "adapter only": (FSDP.format("saved_file_is_that_of_the_plain_model"),),
                "as one process": (
                    FSDP.format("training"),
                    FSDP.format("saved_file_is_that_of_the_plain_model"),
                ),
            },
            "tensor parallel": {
                "trains": (TENSOR.format("training_equals_one_process"),),
                "adapter only": (TENSOR.format("files_are_those_of_one_process"),),
                "as one process": (
                    TENSOR.format("training_equals_one_process"),
                    TENSOR.format("files_are_those_of_one_process"),
                ),
            },
            "tensor parallel plans of transformers": {
                "trains": (OF_TRANSFORMERS.format("tensor_parallel"),),
                "as one process": (OF_TRANSFORMERS.format("tensor_parallel"),),
            },
            "DeepSpeed ZeRO-2 and ZeRO-3": {
                "trains": (ZERO.format("training"), ZERO.format("common_configurations")),
                "quantised base": (ZERO.format("four_bits"),),
                "adapter only": (ZERO.format("saving_and_loading"),),
                "as one process": (ZERO.format("training"), ZERO.format("saving_and_loading")),
            },
        },
    ),
    Table(
        """\
### Training in several processes

✓ means all of this: two processes give the losses and the adapter of one, checkpoints leave out the
base, a run resumes bit for bit, and the best checkpoint is loaded. Lightning runs DeepSpeed on CUDA
only, and these tests run without it.
""",
        tuple(ENGINES),
        {
            "Trainer of transformers": _in_processes("trainers", "trainer_{}"),
            # `disha finetune` is this trainer, with the adapter as a script would give it.
            "SFTTrainer of trl": _in_processes("finetune", "{}"),
            "Accelerate": _in_processes("trainers", "accelerate_{}"),
            "Lightning": {
                column: tests
                for column, tests in _in_processes("trainers", "lightning_{}").items()
                if "ZeRO" not in column
            },
            "`disha finetune`": _in_processes(
                "finetune",
                "{}",
                "whole.test_transformers_parallel::test_two_processes_give_the_losses_of_one",
            ),
        },
    ),
    Table(
        """\
### Reading an adapter

*Read* means that the tool's own code reads the adapter that `disha` writes. *Same result* means
that the tool then computes the same as the adapted model. *Back* means that `disha` reads the file
back.
""",
        ("read", "same result", "experts", "back"),
        {
            "PEFT, as MiSS": {
                "read": (f"{PEFT}::test_peft_computes_what_we_export",),
                "same result": (f"{PEFT}::test_peft_computes_what_we_export",),
                "back": (f"{PEFT}::test_round_trips_by_way_of_peft_change_nothing",),
            },
            "PEFT, as LoRA": {
                "read": (f"{LORA}::test_llama_under_peft_computes_the_same",),
                "same result": (f"{LORA}::test_llama_under_peft_computes_the_same",),
                "experts": (f"{EXPERTS}::test_peft_computes_with_stacks_what_the_adapter_does",),
                "back": (f"{EXPERTS}::test_what_peft_trains_further_comes_back",),
            },
            "vLLM, the code that reads a LoRA": {
                "read": (f"{SERVERS}::test_a_llama_in_vllm",),
                "experts": (
                    f"{SERVERS}::test_separate_experts_in_vllm",
                    f"{SERVERS}::test_stacked_experts_of_gpt_oss_in_vllm",
                ),
            },
            "SGLang, the code that reads a LoRA": {
                "read": (f"{SERVERS}::test_a_llama_in_sglang",),
                "experts": (f"{SERVERS}::test_separate_experts_in_sglang",),
            },
            "llama.cpp": {
                "read": (f"{LLAMA_CPP}::test_adapters_act_as_ours",),
                "same result": (
                    f"{LLAMA_CPP}::test_adapters_act_as_ours",
                    f"{LLAMA_CPP}::test_the_next_token_moves_as_ours_does",
                ),
                "experts": (f"{LLAMA_CPP}::test_separate_experts_act_as_ours",),
            },
            "diffusers": {
                "read": (f"{IMAGES}::test_diffusers_loads_it_and_computes_the_same",),
                "same result": (f"{IMAGES}::test_diffusers_loads_it_and_computes_the_same",),
                "back": (f"{IMAGES}::test_the_file_of_a_pipeline_comes_back",),
            },
            "kohya, UNets by the converters of diffusers": {
                "read": (f"{IMAGES}::test_kohya_through_the_converters_of_diffusers_and_back",),
                "back": (f"{IMAGES}::test_kohya_through_the_converters_of_diffusers_and_back",),
            },
        },
    ),
    Table(
        """\
### ONNX and torch.export

*Any adapter* means that one program takes the blocks as inputs, so it serves every adapter of the
same shapes.
""",
        ("not merged", "merged", "any adapter"),
        {
            "`torch.export`": {
                "not merged": (f"{LEAVING}::test_an_unmerged_model_is_exported",),
                "merged": (f"{LEAVING}::test_a_merged_model_is_exported_as_a_plain_one",),
                "any adapter": (
                    f"{LEAVING}.TestBlocksAsInputs::test_one_program_serves_any_adapter",
                ),
            },
            "ONNX, run by onnxruntime": {
                "not merged": (f"{LEAVING}::test_an_unmerged_model_is_exported",),
                "merged": (f"{LEAVING}::test_a_merged_model_is_exported_as_a_plain_one",),
                "any adapter": (
                    f"{LEAVING}.TestBlocksAsInputs::test_one_onnx_file_serves_any_adapter",
                ),
            },
            "AOTInductor": {
                "any adapter": (
                    f"{LEAVING}.TestBlocksAsInputs::test_one_compiled_package_serves_any_adapter",
                ),
            },
        },
    ),
)


def render(passed: Mapping[str, bool]) -> str:
    """Return the page as it is, with the tables of these results."""
    start, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    tables = "\n".join([INTRODUCTION, *(table.render(passed) for table in TABLES)])
    return f"{start}{MARK}\n\n{tables}\n{END}{rest.partition(END)[2]}"


def results_of(report: Path) -> dict[str, bool]:
    """Return the tests of a report in the format of JUnit, and whether each ran and passed."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module = case.get("classname", "").removeprefix("tests.")
        found[f"{module}::{case.get('name')}"] = not list(case.iter("failure")) and not any(
            list(case.iter(what)) for what in ("error", "skipped")
        )
    return found


def main() -> int:
    """Run the tests and write the page; return the worst exit status."""
    tests = [test for table in TABLES for test in table.tests()]
    modules = {test.partition("::")[0].partition(".Test")[0] for test in tests}
    own = [one for one in modules if not one.startswith(("runtimes.", "llamacpp."))]
    files = sorted(f"tests/{module.replace('.', '/')}.py" for module in own)
    programs = [["pytest", "-q", "-n", "2", *files], ["tests.runtimes"], ["tests.llamacpp"]]
    passed: dict[str, bool] = {}
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, words in enumerate(programs):
            report = Path(folder, f"{number}.xml")
            environment = {**os.environ, "PYTEST_ADDOPTS": f"--junitxml={report}"}
            done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment)
            status = max(status, done.returncode)
            if report.exists():
                passed |= results_of(report)
    PAGE.write_text(render(passed), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
