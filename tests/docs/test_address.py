"""The address of the repository is one setting, in setup.py."""

import pytest
from mkdocs.config import load_config

from docs.hooks import address
from tests.pages import ROOT

WHERE = "https://example.org/somebody/disha"


@pytest.fixture
def config():
    return load_config(str(ROOT / "mkdocs.yml"))


def test_without_an_address_the_site_links_to_no_repository(config, monkeypatch):
    monkeypatch.setattr(address, "ADDRESS", "")
    monkeypatch.setattr(address, "SITE", "")
    found = address.on_config(config)
    assert not found.repo_url
    assert not found.site_url


def test_an_address_gives_links_to_the_repository_and_to_edit_a_page(config, monkeypatch):
    monkeypatch.setattr(address, "ADDRESS", WHERE)
    monkeypatch.setattr(address, "SITE", "https://example.org/disha/")
    found = address.on_config(config)
    assert (found.repo_url, found.edit_uri) == (WHERE, "edit/main/docs/")
    assert found.site_url == "https://example.org/disha/"
