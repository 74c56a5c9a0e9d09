"""What is run beside PyTorch, at which sizes, and when a difference is one."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnxruntime")

from moonfx.onnx import check
from moonfx.onnx.report import Check, OnnxMismatch

SIZES = [(2, 6), (1, 2), (3, 9)]
Run = Callable[[Tensor], Any]


class Inputs:
    """As much of sizes.Inputs as a check asks for: one tensor [batch, length]."""

    batch, length, names = 2, 6, ("x",)

    def sizes(self) -> list[tuple[int, int]]:
        return list(SIZES)

    def at(self, batch: int, length: int) -> list[Tensor]:
        return [torch.arange(batch * length, dtype=torch.float32).view(batch, length)]

    def unflatten(self, leaves: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(leaves), {}


class Named:
    name = "x"


def checked(
    monkeypatch: pytest.MonkeyPatch, file: Run, program: Run, model: Run | None = None
) -> list[Check]:
    """The checks of a file that gives what a function gives."""

    class Session:
        def get_inputs(self) -> list[Named]:
            return [Named()]

        def run(self, outputs: None, feed: dict[str, Any]) -> list[Any]:
            return [x.numpy() for x in check.tensors(file(torch.from_numpy(feed["x"])))]

    monkeypatch.setattr(check, "_session", lambda staged: Session())
    given: Any = Inputs()
    return check.run_checks(None, given, program, model, 1e-3)  # type: ignore[arg-type]


def test_the_model_is_run_at_the_traced_and_the_largest_size_and_the_program_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[tuple[str, int]] = []
    program = lambda x: (runs.append(("program", x.shape[1])), x * 2)[1]  # noqa: E731
    model = lambda x: (runs.append(("model", x.shape[1])), x * 2)[1]  # noqa: E731
    found = checked(monkeypatch, lambda x: x * 2, program, model)
    assert [(c.batch, c.length, c.against) for c in found] == [
        (2, 6, "model"),
        (1, 2, "program"),
        (3, 9, "model"),
    ]
    assert runs == [("model", 9), ("model", 6), ("program", 2)]  # the largest first
    assert {c.max_error for c in found} == {0.0}


def test_without_a_model_it_is_the_program_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked(monkeypatch, lambda x: x, lambda x: x)
    assert {c.against for c in found} == {"program"}


def test_a_difference_beyond_the_tolerance_is_an_error_that_names_the_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        OnnxMismatch, match=r"more than 0.001 at batch 3 length 9; nothing"
    ) as caught:
        checked(monkeypatch, lambda x: x + (x.shape[1] == 9), lambda x: x)
    assert "near-tie" not in str(caught.value)  # every position is off
    with pytest.raises(OnnxMismatch, match="near-tie"):
        checked(monkeypatch, lambda x: many(x).index_fill(0, torch.tensor([7]), 1e3), many)
    assert checked(monkeypatch, lambda x: x + 5e-4, lambda x: x)[0].max_error < 1e-3


def many(x: Tensor) -> Tensor:
    return x.flatten().repeat(40)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_equal_infinities_and_nan_in_the_same_places_are_equal(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = lambda x: torch.where(x == 1, value, x)  # noqa: E731
    assert {c.max_error for c in checked(monkeypatch, same, same)} == {0.0}
    with pytest.raises(OnnxMismatch):
        checked(monkeypatch, same, lambda x: x)


def test_another_shape_is_a_difference_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OnnxMismatch, match="outputs of shapes"):
        checked(monkeypatch, lambda x: x[:, :1], lambda x: x)


def test_a_size_that_pytorch_does_not_run_no_file_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more_than_six(x: Tensor) -> Tensor:
        if x.shape[1] > 6:
            raise IndexError("past the end of the table")
        return x

    found = checked(monkeypatch, lambda x: x, no_more_than_six)
    assert [bool(c.against) for c in found] == [True, True, False]
    assert "PyTorch does not run at this size: IndexError: past the end" in found[2].note

    def never(x: Tensor) -> Tensor:
        raise IndexError("broken")

    with pytest.raises(IndexError, match="broken"):  # at the traced size it must
        checked(monkeypatch, lambda x: x, never)


def test_what_onnxruntime_cannot_run_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this node\nand more")

    with pytest.raises(OnnxMismatch, match="onnxruntime failed: no kernel for this node"):
        checked(monkeypatch, fails, lambda x: x)


def test_a_file_that_cannot_be_loaded_is_a_mismatch(tmp_path: Any) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("no model")
    given: Any = Inputs()
    with pytest.raises(OnnxMismatch, match="onnxruntime cannot load the model"):
        check.run_checks(path, given, many, None, 1e-3)


def test_tensors_of_a_result_are_found_in_dicts_and_lists() -> None:
    x = torch.zeros(2)
    assert check.tensors({"a": [x, None], "b": 3}) == [x]
    assert math.isclose(check.TOLERANCE, 2e-3)
