"""What every benchmark refuses before it measures."""

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from moonfx.bench.harness import arguments


def test_a_device_that_torch_cannot_use_is_refused_with_its_reason() -> None:
    assert arguments.device("cpu") == "cpu"
    with pytest.raises(ArgumentTypeError, match="must be cpu, or a GPU .* got 'toaster' \\(.+\\)"):
        arguments.device("toaster")


def test_a_file_in_no_folder_is_refused(tmp_path: Path) -> None:
    assert arguments.new_file(str(tmp_path / "new.json")) == str(tmp_path / "new.json")
    assert arguments.new_file("new.json") == "new.json"
    with pytest.raises(ArgumentTypeError, match="a folder that exists"):
        arguments.new_file(str(tmp_path / "none" / "new.json"))


def test_a_missing_matplotlib_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in (arguments.why_no_plot() or "")
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)
    assert arguments.why_no_plot() is None
