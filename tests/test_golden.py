"""Files of format 1 that were written once, and that every version has to load."""

import json
import warnings

import pytest
import safetensors.torch
import torch

import disha
from tests import reference_reader
from tests.conftest import assert_unchanged, snapshot
from tests.golden import make
from tests.golden.cases import CASES, FOLDER, OUTPUTS, file_of

EXPECTED = json.loads(OUTPUTS.read_text())


def loaded(name):
    """Return the base of a case with its adapter loaded; the fingerprints must fit."""
    model = CASES[name].base()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert disha.load_adapter(model, file_of(name)).complete
    return model


def test_every_file_has_its_case_and_every_case_its_output():
    found = {path.name for path in FOLDER.glob("*.safetensors")}
    assert found == {file_of(name).name for name in CASES}
    assert EXPECTED.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_holds_what_was_trained(name):
    case, model = CASES[name], loaded(name)
    found, expected = case.values(model), case.values(case.trained())
    assert [value.dtype for value in found] == [value.dtype for value in expected]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", CASES)
def test_gives_the_same_outputs(name):
    case = CASES[name]
    output, expected = loaded(name)(case.inputs()), torch.tensor(EXPECTED[name])
    within = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[case.dtype]
    torch.testing.assert_close(output.float(), expected, rtol=within, atol=within)
    assert not torch.allclose(case.base()(case.inputs()).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", CASES)
def test_another_reader_merges_the_same(name):
    read = reference_reader.read(file_of(name).read_bytes())
    parameters = dict(CASES[name].base().named_parameters())
    expected = reference_reader.merged(
        read, {name: value.detach().double().numpy() for name, value in parameters.items()}
    )
    model = loaded(name)
    disha.merge_adapters(model)
    for key, value in expected.items():
        found, wanted = model.get_parameter(key), torch.from_numpy(value)
        torch.testing.assert_close(found, wanted.to(found.dtype), msg=key)


@pytest.mark.parametrize("name", CASES)
def test_saved_again_it_is_the_same(name, tmp_path):
    """Only how the safetensors library writes its container is for another version to change."""
    old, new = file_of(name), tmp_path / "new"
    disha.save_adapter(loaded(name), new, metadata=CASES[name].metadata)
    before, after = (reference_reader.read(path.read_bytes()) for path in (old, new))
    assert after.text == before.text
    assert after.dtypes == before.dtypes
    kept = safetensors.torch.load_file(old)
    assert new.read_bytes() == safetensors.torch.save(kept, {"disha": before.text})


@pytest.mark.parametrize("name", CASES)
def test_replaces_an_adapter_in_place(name):
    case = CASES[name]
    model = disha.inject_adapters(case.base(), **case.adapter)
    disha.load_adapter(model, file_of(name), replace=True)
    assert all(map(torch.equal, case.values(model), case.values(case.trained())))


def test_of_another_case_is_refused():
    model = CASES["bone"].base()
    before = snapshot(model)
    with pytest.raises(disha.AdapterFileError, match=r"attention.q_proj: the model has no"):
        disha.load_adapter(model, file_of("attention"))
    assert_unchanged(model, before)


def test_making_them_again_leaves_those_that_are_there(capsys):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in FOLDER.glob("format*")}
    outputs = OUTPUTS.read_text()
    make.main()
    assert capsys.readouterr().out == ""
    assert OUTPUTS.read_text() == outputs
    assert before == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in FOLDER.glob("format*")
    }
