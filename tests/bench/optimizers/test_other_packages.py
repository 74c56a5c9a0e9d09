"""Packages of others beside ours: fakes of them take part, and what fails is a reason."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moonfx.bench.harness.machine import Absent
from moonfx.bench.optimizers import other_packages as others
from moonfx.cli import command as cli
from tests.support.optimizer_bench import QUICK, SHAPES, printed


class FakeGram:
    """gram-newton-schulz's interface, without its work."""

    given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        print("Auto-tuning")  # noqa: T201
        type(self).given = given

    def __call__(self, X: torch.Tensor) -> torch.Tensor:
        return X.clone()


class FakeMuon(torch.optim.SGD):
    """A Muon with the keywords of both packages."""

    given: dict[str, Any]

    def __init__(self, parameters: Any, use_polar_express: bool = True, **given: Any) -> None:
        super().__init__(parameters, lr=given["lr"])
        type(self).given = {"use_polar_express": use_polar_express, **given}


def fakes(module: str, package: str) -> Any:
    return SimpleNamespace(
        GramNewtonSchulz=FakeGram,
        Muon=FakeMuon,
        zeropower_via_newtonschulz5=lambda X: X.clone(),
    )


def test_packages_of_others_take_part_where_they_are_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "imported", fakes)
    words = [*SHAPES, "--dtype", "float32", "--only", "auto", *others.NAMES]
    results = printed(capsys, "newton-schulz", *words)["results"]
    assert all(set(others.NAMES) <= set(r["seconds"]) and not r["absent"] for r in results)
    assert FakeGram.given["ns_coefficients"] == [[3.4445, -4.7750, 2.0315]] * 5
    assert FakeGram.given["ns_use_kernels"] is False
    assert cli.main(["bench", "newton-schulz", *words]) == 0
    assert "dion: its own coefficients" in capsys.readouterr().out


def test_their_optimizers_step_the_same_parameters_by_the_same_rule(
    tiny: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "imported", fakes)
    words = [*QUICK, "--steps", "5", "--only", *others.NAMES]
    (result,) = printed(capsys, "optimizer", *words)["results"]
    assert set(result["seconds"]) == set(others.NAMES)
    assert "float16" in result["notes"]["gram-newton-schulz"]
    assert FakeMuon.given["mu"] == 0.95
    assert FakeMuon.given["use_polar_express"] is False
    (result,) = printed(capsys, "optimizer", *words, "--iterate", "float32")["results"]
    assert result["absent"] == {
        "gram-newton-schulz": "its Muon iterates in float16, not in float32",
        "dion": "its Muon iterates in bfloat16, not in float32",
    }


def other_interface(*given: Any, **named: Any) -> Any:
    raise TypeError("unexpected keyword\nand more")


def crash(X: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image")


REASONS: list[tuple[str, dict[str, Any], list[str], str]] = [
    ("gram-newton-schulz", {}, [], "AttributeError: "),
    (
        "gram-newton-schulz",
        {"GramNewtonSchulz": other_interface},
        [],
        "TypeError: unexpected keyword",
    ),
    ("dion", {}, ["--steps", "4"], "it always takes 5 steps, not 4"),
    ("dion", {"zeropower_via_newtonschulz5": crash}, [], "RuntimeError: no kernel image"),
    (
        "dion",
        {"zeropower_via_newtonschulz5": lambda X: X.mT},
        [],
        "it gave torch.Size([1, 16, 8]) for torch.Size([1, 8, 16])",
    ),
    (
        "dion",
        {"zeropower_via_newtonschulz5": torch.clone},
        ["--patience", "1e-12"],
        "a call is predicted to take over --patience 1e-12 s (bfloat16 products run at ",
    ),
]


@pytest.mark.parametrize(("name", "package", "words", "reason"), REASONS)
def test_what_does_not_run_of_others_is_a_reason_and_no_crash(
    name: str,
    package: dict[str, Any],
    words: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(others, "imported", lambda *asked: SimpleNamespace(**package))
    shape = ["--shape", "8x16", "--count", "1", "--repeats", "1", "--dtype", "float32"]
    said = printed(capsys, "newton-schulz", *shape, "--only", name, *words)
    assert said["results"][0]["absent"][name].startswith(reason)
    assert name not in said["results"][0]["seconds"]


def test_a_package_that_is_not_installed_is_told_from_one_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    (tmp_path / "there.py").write_text("import not_there_either")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Absent, match=r"not installed \(pip install git"):
        others.imported("not_there.at_all", "dion")
    with pytest.raises(ModuleNotFoundError, match="not_there_either"):
        others.imported("there", "dion")
