"""Options of the test suite."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core import is_core


@pytest.fixture(autouse=True)
def _keep_deepspeed_quiet_in_examples(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tell DeepSpeed its device: it prints to stdout when it has to look for one."""
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--core`: only what runs with the three dependencies of the library."""
    parser.addoption(
        "--core",
        action="store_true",
        help="leave out tests of what needs an extra: the command line, fine-tuning, benchmarks, "
        "documentation pages, packaging, and comparisons with other libraries",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that are not core, if that is asked for."""
    if not config.getoption("--core"):
        return None
    return None if is_core(collection_path.relative_to(config.rootpath)) else True


@pytest.fixture(autouse=True)
def _registered_methods() -> Iterator[None]:
    """Take away the methods that a test, or an example in a docstring, has registered."""
    from disha.functional import METHODS

    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests that launch ranks, so that the last process does not wait for them."""
    launches = {"test_distributed.py", "test_transformers_parallel.py"}
    items.sort(key=lambda item: item.path.name not in launches)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from searching all modules again, as trainers ask it to do."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _freeze_what_a_file_leaves() -> Iterator[None]:
    """Do the same with what the tests of a file have imported, and what torch has compiled."""
    yield
    gc.collect()
    gc.freeze()
