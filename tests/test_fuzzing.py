"""What a stranger may have written loads, or raises a `DishaError` that names the file."""

import pytest

import disha
from disha.checks import compile_regex
from tests import fuzzing

SECONDS = 0.5
"""For how long each reader gets inputs that are made by chance, after those of the corpus."""


@pytest.mark.parametrize("reader", fuzzing.readers())
def test_a_reader(reader):
    count, wrong = fuzzing.replay(reader, SECONDS)
    assert not wrong
    assert count > 20


def changed(change):
    """Return the header and the tensors of a sound file, of which something is changed."""
    header, shapes = fuzzing.Header().seeds()[0]
    change(header)
    return [header, shapes]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda header: header["layers"][0].update(base=5), "base must be a fingerprint, got 5"),
        (lambda header: header["layers"][0].update(base=[1]), r"base must be .* got \[1\]"),
        (
            lambda header: header["layers"][0].update(tied=[1]),
            "tied must be a list of names",
        ),
        (lambda header: header["layers"][0].update(tied=[[0, 4]]), "tied must be a list of names"),
        (lambda header: header["layers"][0].update(tied="ab"), "tied must be a list of names"),
        (lambda header: header["layers"][0].update(name=[1]), "name must be a text"),
        (lambda header: header["layers"][0].update(groups="x"), "groups must be an int"),
        (lambda header: header["layers"][0].update(groups=[{}]), "groups must be an int"),
        (lambda header: header["layers"][0].update(groups=0), "groups must be at least 1"),
        (lambda header: header["layers"][0].update(padding_idx=[]), "padding_idx must be"),
        (lambda header: header.update(also_train=[[0]]), "also_train must be a list of names"),
        (lambda header: header.update(also_train=[{}]), "also_train must be a list of names"),
        (lambda header: header.update(also_train="x"), "also_train must be a list of names"),
        (lambda header: header.update(metadata={"a": 1}), "metadata must be texts"),
        (lambda header: header.update(metadata=["ab"]), "metadata must be texts"),
    ],
)
def test_a_field_that_is_wrong_is_named_with_its_file(change, says):
    reader = fuzzing.Header()
    with pytest.raises(disha.AdapterFileError, match=says) as caught:
        reader.read(changed(change))
    assert str(reader.path) in str(caught.value)


@pytest.mark.parametrize("pattern", ["(a+)+", "(.*)*x", ".*.*.*.*x", "a" * 2000])
def test_a_pattern_of_a_file_that_could_take_hours_is_refused(pattern):
    reader = fuzzing.Peft()
    fields, shapes = reader.seeds()[0]
    with pytest.raises(disha.AdapterFileError, match="could take hours"):
        reader.read([{**fields, "alpha_pattern": {pattern: 4}}, shapes])


@pytest.mark.parametrize("pattern", ["0", ".*", r"layers\.\d+\..*_proj", "(q|k|v)_proj"])
def test_a_pattern_of_a_file_that_people_write_is_used(pattern):
    reader = fuzzing.Peft()
    fields, shapes = reader.seeds()[0]
    assert reader.read([{**fields, "alpha_pattern": {pattern: 4}}, shapes]).layers


@pytest.mark.parametrize("regex", ["(a+)+$", "(?:x*)*", r"(\w+)*", r"([a-z]+)+", "(.*){9}"])
def test_a_flag_that_could_take_hours_is_refused(regex):
    with pytest.raises(disha.ArgumentError, match="repeats a repetition"):
        compile_regex("target_regex", regex)


@pytest.mark.parametrize("regex", [r"(\w+\.)*q_proj", "(q|k)_proj", r"layers\.\d+", "(a+)?"])
def test_a_flag_that_people_write_compiles(regex):
    assert compile_regex("target_regex", regex)


@pytest.mark.parametrize("shard", ["../x", "/etc/passwd", 5, ["a"], None])
def test_a_shard_is_a_file_of_its_folder(shard):
    reader = fuzzing.Checkpoint()
    index, config = reader.seeds()[0]
    with pytest.raises(disha.AdapterFileError, match="where the name of a file should be"):
        reader.read([{**index, "weight_map": {"linear.weight": shard}}, config])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("tokenizer.json", "[]", "has notes that can't be read"),
        ("tokenizer.json", "{", "has notes that can't be read"),
        ("tokenizer.json", '{"added_tokens": [1]}', "has notes that can't be read"),
        ("chat_template.jinja", "\xff", "has notes that can't be read"),
        ("adapter_model.bin", "", "is no file of tensors by their names"),
        ("adapter_model.bin", "hello", "is no file of tensors by their names"),
        ("adapter_config.json", "[1", "is no JSON object"),
    ],
)
def test_a_file_of_a_folder_that_is_wrong_is_named(name, text, says):
    reader = fuzzing.Folder()
    with pytest.raises(disha.AdapterFileError, match=says) as caught:
        reader.read({**reader.seeds()[0], name: text})
    assert str(reader.path) in str(caught.value)


@pytest.mark.parametrize("base", ["a" * 300, "a/" * 3000, 5, ["x"]])
def test_a_folder_may_name_any_base(base):
    reader = fuzzing.Folder()
    fields = {**reader.seeds()[0]["adapter_config.json"], "base_model_name_or_path": base}
    assert "0" in reader.read({**reader.seeds()[0], "adapter_config.json": fields})
