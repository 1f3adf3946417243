"""What files from strangers can't do; `python -m tests.fuzzing` tries far more of them."""

import copy
import os
import pickle
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import disha
from disha import AdapterFileError, AdapterIOError, AdapterStateError, ArgumentError
from disha.files import tensors as tensors_module
from disha.text import printable
from tests.conftest import Layered, assert_unchanged, perturb, snapshot
from tests.fuzzing import limits
from tests.fuzzing.carrier import Draft, Raw, Tensor
from tests.fuzzing.crafting import RECIPES, Case, craft
from tests.fuzzing.limits import Usage, limited
from tests.fuzzing.subject import ADAPTERS, adapted, bits, plain, seed_files, state_of
from tests.fuzzing.trial import Bench
from tests.fuzzing.workers import try_files
from tests.processes import FORKED
from tests.test_format import sparse


class TestManyFiles:
    def test_each_loads_or_is_refused_and_nothing_else_happens(self):
        outcomes = list(try_files(range(250), large=2_000))
        failures = [f"{o.number} ({o.recipe}): {o.failure}" for o in outcomes if o.failure]
        assert not failures, "\n".join(failures)
        assert {outcome.recipe for outcome in outcomes} == set(RECIPES)
        accepted = sum(outcome.accepted for outcome in outcomes)
        assert 0.1 < accepted / len(outcomes) < 0.5  # both ways are tried

    def test_the_same_number_is_the_same_file(self):
        assert [craft(n, large=100).data for n in (3, 70)] == [
            craft(n, large=100).data for n in (3, 70)
        ]
        assert craft(70, seed=0).data != craft(70, seed=1).data

    def test_every_file_they_are_made_from_loads(self, tmp_path):
        for which, data in enumerate(seed_files()):
            path = tmp_path / f"{which}.safetensors"
            path.write_bytes(data)
            told, again = Draft.of(data), Draft.of(Draft.of(data).file())
            assert (again.tensors, again.header) == (told.tensors, told.header)
            assert disha.load_adapter(plain(), path).complete
            assert disha.load_adapter(adapted(which), path, replace=True).complete
        assert len(seed_files()) == len(ADAPTERS)


def untouched():
    return Case(0, "untouched", 0, seed_files()[0])


class TestWhatTheTrialsSee:
    """They are worth what they find."""

    @pytest.fixture
    def bench(self, tmp_path):
        return Bench(tmp_path)

    def test_a_good_file_passes(self, bench):
        results = bench.try_all(untouched())
        del results["state dict"]  # made odd on purpose
        assert all(results.values())

    def test_another_exception(self, bench, monkeypatch):
        def load(*_, **__):
            raise KeyError("head.bone_block")

        monkeypatch.setattr(disha, "load_adapter", load)
        with pytest.raises(KeyError):
            bench.try_all(untouched())

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.norm.weight.data.neg_(),
            lambda model: model.steps.add_(1),
            lambda model: model.head.weight.requires_grad_(False),
            lambda model: setattr(model, "head", nn.Linear(8, 12, bias=False)),
            lambda model: disha.inject_adapters(model, "head", 1),
            lambda model: model.embed.weight.data.view(torch.int32).bitwise_xor_(1),
        ],
    )
    def test_a_refusal_that_changes_something(self, bench, monkeypatch, change):
        def load(model, *_, **__):
            change(model)
            raise AdapterFileError("refused")

        monkeypatch.setattr(disha, "load_adapter", load)
        with pytest.raises(AssertionError, match="a refusal has changed"):
            bench.try_all(untouched())

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.norm.bias.data.add_(1e-7),
            lambda model: model.head.disha["default"].block.data.mul_(2),
            lambda model: model.head.disha["default"].set_scale(2.0),
            lambda model: model.steps.add_(1),
            lambda model: disha.inject_adapters(model, "conv", 1, adapter="more"),
        ],
    )
    def test_a_load_that_changes_more(self, bench, monkeypatch, change):
        right = disha.load_adapter

        def load(model, *arguments, **options):
            report = right(model, *arguments, **options)
            change(model)
            return report

        monkeypatch.setattr(disha, "load_adapter", load)
        with pytest.raises((AssertionError, KeyError)):
            bench.try_all(untouched())

    def test_a_message_that_moves_the_cursor(self, bench, monkeypatch):
        monkeypatch.setattr("disha.errors.printable", lambda text, **_: text)
        case = Case(0, "another models layers", 0, prefixed("\x1b[2J").file())
        with pytest.raises(AssertionError, match=r"prints '\\x1b' as it is"):
            bench.try_all(case)

    def test_memory_out_of_proportion(self):
        # In a process of its own: of a large one, the system may take back as much meanwhile.
        process = FORKED.Process(target=take_too_much)
        process.start()
        process.join()
        assert process.exitcode == 0

    @pytest.mark.parametrize(("act", "how"), [("turn", "SIGPROF"), ("sleep", "SIGALRM")])
    def test_a_hang(self, tmp_path, act, how):
        stacks = tmp_path / "stacks"
        process = FORKED.Process(target=hang, args=(act, str(stacks)))
        process.start()
        process.join()
        assert signal.Signals(-process.exitcode).name == how
        assert "in hang" in stacks.read_text()


def take_too_much():
    with pytest.raises(AssertionError, match="bytes, and may take"), limited(10, Usage()):
        bytearray(b"x") * (80 << 20)


def hang(act, stacks):
    limits.SECONDS, limits.SECONDS_WAITING = 0.1, 0.1 if act == "sleep" else 60.0
    with open(stacks, "w") as file:
        limits.limit_process(file)
        with limited(0, Usage()):
            while act == "turn":
                pass
            time.sleep(60)


def prefixed(prefix):
    """Return a draft whose layers are all under a prefix."""
    draft = Draft.of(seed_files()[1])
    for layer in draft.header["layers"]:
        layer["name"] = prefix + layer["name"]
    draft.tensors = {prefix + key: tensor for key, tensor in draft.tensors.items()}
    return draft


class TestNamedFiles:
    """What trials have found, each by what went wrong."""

    @pytest.fixture
    def draft(self):
        return Draft.of(seed_files()[0])

    @pytest.fixture
    def refused(self, tmp_path):
        def check(draft, says, model=None, **options):
            path = tmp_path / "hostile.safetensors"
            path.write_bytes(draft.file())
            model = plain() if model is None else model
            before = state_of(model)
            with pytest.raises(AdapterFileError, match=f"(?s){says}") as caught:
                disha.load_adapter(model, path, **options)
            assert state_of(model) == before
            return str(caught.value)

        return check

    @pytest.fixture
    def loaded(self, tmp_path):
        def load(draft, **options):
            path = tmp_path / "odd.safetensors"
            path.write_bytes(draft.file())
            model = plain()
            disha.load_adapter(model, path, **options)
            return model

        return load

    @pytest.mark.parametrize("also_train", [True, False])
    def test_a_block_listed_beside_the_blocks(self, draft, refused, also_train):
        draft.header["also_train"].append("head.bone_block")
        says = "lists 'head.bone_block' 2 times"
        refused(draft, says, also_train=also_train)
        refused(draft, says, adapted(0), replace=True, also_train=also_train)

    @pytest.mark.parametrize(
        "shape", [[0, 2**63], [2**64 - 1, 0], [2**31, 0, 2**32], [0] + [1] * 64]
    )
    def test_an_empty_tensor_of_a_shape_that_no_tensor_can_have(self, draft, refused, shape):
        draft.tensors["head.bone_block"] = Tensor("F32", shape, b"")
        refused(draft, r"'head.bone_block' has shape .*64 dimensions and less than 2\*\*63")

    @pytest.mark.parametrize("replace", [False, True])
    def test_one_parameter_by_two_names(self, draft, refused, replace):
        draft.header["also_train"] += ["body.1.bias", "last.bias"]
        tensor = Tensor("F32", [8], bytes(32))
        draft.tensors |= {"body.1.bias": tensor, "last.bias": tensor}
        if replace:
            model = disha.inject_adapters(
                plain(), "body|head", 3, also_train=r"norm\.w|body.1.bias"
            )
            refused(draft, "body.1.bias and last.bias are one parameter", model, replace=True)
        else:
            refused(draft, "body.1.bias and last.bias are one parameter")

    @pytest.mark.parametrize("replace", [False, True])
    def test_one_layer_by_two_names(self, draft, refused, replace):
        layer = next(one for one in draft.header["layers"] if one["name"] == "body.1")
        draft.header["layers"].append({**layer, "name": "last"})
        draft.tensors["last.bone_block"] = draft.tensors["body.1.bone_block"]
        model = adapted(0) if replace else plain()
        says = "body.1.bone_block and last.bone_block are one parameter"
        refused(draft, says, model, replace=replace)

    def test_names_that_move_the_cursor_are_shown_escaped(self, draft, refused, loaded, tmp_path):
        message = refused(prefixed("\x1b[2J"), "no such layer")
        assert "\\x1b[2J" in message
        draft.header["metadata"] = {"\x1b]0;title\x07": "line\nadapter.safetensors: format 1\u202e"}
        loaded(draft)
        text = str(disha.inspect_adapter(tmp_path / "odd.safetensors"))
        assert "\\x1b]0;title\\x07: line\\nadapter.safetensors: format 1\\u202e" in text

    def test_names_without_end_are_cut(self, refused):
        message = refused(prefixed("a" * 1_000_000 + "."), "no such layer.*names nearest to 'aaa")
        assert len(message) < 2_000

    @pytest.mark.parametrize(
        "regex", ["(", "(?i)" + "[\\x00-\\uffff]" * 20, "(?P<a>.)(?P<a>.)", "x" * 100_000]
    )
    def test_regexes_of_a_file_are_never_run(self, draft, loaded, tmp_path, regex, monkeypatch):
        draft.header["config"] |= {
            "target": regex, "exclude": [regex], "also_train": [regex], "rank_pattern": {regex: 2},
        }  # fmt: skip
        compiled, right = [], re._compile
        monkeypatch.setattr(re, "_compile", lambda p, flags: compiled.append(p) or right(p, flags))
        model = loaded(draft)
        config = copy.deepcopy(model).head.disha["default"].config
        assert pickle.loads(pickle.dumps(config)) == config
        assert (config.target, config.exclude) == (regex, (regex,))
        again = tmp_path / "again.safetensors"
        disha.save_adapter(model, again)
        assert disha.inspect_adapter(again).config == config
        disha.combine_adapters(model, {"default": 0.5}, into="half_of_it", also_train=False)
        assert regex not in compiled

    @pytest.mark.parametrize("where", ["r", "method", "rank_pattern", "exclude", "dropout", "init"])
    def test_values_as_deep_as_json_reads_them(self, draft, refused, where):
        for depth in range(800, 1100, 20):
            draft.header["config"][where] = Raw("[" * depth + "]" * depth)
            refused(draft, "must be|unknown|not valid JSON")

    def test_headers_without_end(self, draft, refused, monkeypatch):
        monkeypatch.setattr(tensors_module, "LARGEST_INDEX", 100_000)
        draft.header["flood"] = Raw("[" + "[]," * 50_000 + "[]]")
        refused(draft, "has a header of 1..,... bytes; at most 100,000 are allowed")

    @pytest.mark.parametrize("field", ["shape", "dtype"])
    def test_an_index_that_is_mostly_brackets(self, draft, refused, field):
        setattr(draft.tensors["head.bone_block"], field, Raw("[" + "[]," * 5_000 + "[]]"))
        refused(draft, "not a complete safetensors file")

    def test_more_layers_than_are_allowed(self, draft, refused, monkeypatch):
        draft.header["layers"] *= 50_000
        refused(draft, "'layers' must be a list of 1 to 100,000 layers")

    @pytest.mark.parametrize("replace", [False, True])
    def test_tensors_that_nothing_is_there_for_are_not_read(self, tmp_path, replace):
        """The values are 8 GiB, of a file that has a hole in their place."""
        sparse(tmp_path / "huge", [(2**14, 2**17)])
        model = adapted(0) if replace else plain()
        usage = Usage()
        says = "unexpected: 0.bone_block" if replace else "no such layer"
        with pytest.raises(AdapterFileError, match=says), limited(0, usage):
            disha.load_adapter(model, tmp_path / "huge", replace=replace)
        assert usage.memory < 8 << 20

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for call in (disha.inspect_adapter, lambda path: disha.load_adapter(plain(), path)):
            with pytest.raises(AdapterIOError, match="not a regular file"):
                call(tmp_path / "pipe")

    def test_parameters_that_are_not_listed_stay(self, draft, refused, loaded):
        embed = Tensor("F32", [12, 8], bytes(4 * 96))
        draft.tensors["embed.weight"] = embed
        refused(draft, "not described 'embed.weight'")
        draft.header["also_train"].append("embed.weight")
        assert not loaded(draft).embed.weight.any()
        kept = loaded(draft, also_train=False)
        assert bits(kept.embed.weight) == bits(plain().embed.weight)

    def test_buffers_can_not_be_listed(self, draft, refused):
        draft.header["also_train"].append("steps")
        draft.tensors["steps"] = Tensor("F32", [3], bytes(12))
        refused(draft, "parameter steps: the model has no such parameter")

    def test_blocks_of_another_adapter_can_not_be_listed(self, draft, refused):
        model = disha.inject_adapters(plain(), "body.0", 2, adapter="mine", init="kaiming")
        key = "body.0.disha.mine.bone_block"
        draft.header["also_train"].append(key)
        draft.tensors[key] = Tensor("F32", [2, 8], bytes(64))
        refused(draft, "no such parameter", model)


class TestStateDicts:
    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda like: like.to_sparse(), "is a sparse_coo tensor, must be dense"),
            (lambda like: like.to_sparse_csr(), "is a sparse_csr tensor, must be dense"),
            (lambda like: torch.nested.nested_tensor([like]), "is a nested tensor, must be dense"),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_tensors_that_are_not_dense(self, make, says):
        model = disha.inject_adapters(Layered(), "head", 2)
        perturb(model)
        state = disha.adapter_state_dict(model)
        before = snapshot(model)
        odd = {key: make(value.clone()) for key, value in state.items()}
        with pytest.raises(AdapterStateError, match=says):
            disha.load_adapter_state_dict(model, odd)
        assert_unchanged(model, before)


def test_every_test_that_the_page_on_security_names_exists():
    root = Path(__file__).parents[1]
    named = re.findall(r"`(tests/\w+\.py)::(\w+)::(\w+)`", (root / "docs/security.md").read_text())
    assert len(named) > 10
    for file, group, name in named:
        assert re.search(rf"class {group}\b.*?def {name}\(", (root / file).read_text(), re.DOTALL)


class TestText:
    @settings(max_examples=50)
    @given(st.text(max_size=60), st.integers(1, 80))
    def test_printable(self, text, limit):
        shown = printable(text, limit)
        assert shown.isprintable()
        if text.isprintable() and len(text) <= limit:
            assert shown == text

    def test_lines_are_kept_where_asked_for(self):
        assert printable("a\nb\tc", lines=True) == "a\nb\\tc"

    def test_errors_survive_pickling(self):
        error = ArgumentError("a\x1bb")
        assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a\\x1bb"
