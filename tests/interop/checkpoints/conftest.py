import pytest

from tests.base_checkpoints import Setting
from tests.conftest import Layered


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path, Layered())
