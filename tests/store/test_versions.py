"""Versions are those of what runs here."""

import importlib.metadata
import sys

import torch
import transformers

import flatq_cli
from flatq_cli.store.versions import package_versions


def test_versions_are_those_of_the_imported_packages():
    versions = package_versions()
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == transformers.__version__
    assert versions["flatq"] == flatq_cli.__version__
    assert versions["python"] == ".".join(str(part) for part in sys.version_info[:3])


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert set(package_versions()) == {"flatq", "python"}
