"""A path holds the old file or the whole new one; weights beside it come and go with it."""

import os
from pathlib import Path
from typing import Any

import pytest

from moonfx.onnx import files

onnx = pytest.importorskip("onnx")
onnx_ir = pytest.importorskip("onnx_ir")


def model(number: float) -> Any:
    """A model that gives one weight of 256 numbers."""
    weight = onnx.helper.make_tensor("w", 1, [256], [number] * 256)
    out = onnx.helper.make_tensor_value_info("y", 1, [256])
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [out], [weight])
    return onnx_ir.serde.deserialize_model(onnx.helper.make_model(graph))


def written(path: Path, number: float) -> list[str]:
    with files.staging(path) as folder:
        files.write(model(number), folder / path.name)
        return files.publish(folder / path.name, path)


def number_in(path: Path) -> float:
    (weight,) = onnx.load(str(path)).graph.initializer
    return float(onnx.numpy_helper.to_array(weight, str(path.parent))[0])


def test_few_weights_lie_in_the_models_own_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert written(path, 1.0) == [str(path)]
    assert list(tmp_path.iterdir()) == [path]
    assert number_in(path) == 1.0


def test_many_weights_lie_beside_it_under_a_name_that_no_other_model_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EMBED_LIMIT", 100)
    path, other = tmp_path / "m.onnx", tmp_path / "n.onnx"
    first, second = written(path, 1.0), written(other, 2.0)
    assert (len(first), len(second), len(set(first + second))) == (2, 2, 4)
    again = written(path, 3.0)
    assert sorted(map(str, tmp_path.iterdir())) == sorted([*again, *second])
    assert (number_in(path), number_in(other)) == (3.0, 2.0)
    monkeypatch.setattr(files, "EMBED_LIMIT", 1 << 20)
    assert written(path, 4.0) == [str(path)]
    assert sorted(map(str, tmp_path.iterdir())) == sorted([str(path), *second])


def test_what_lies_beside_a_model_and_is_not_named_by_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EMBED_LIMIT", 100)
    path = tmp_path / "m.onnx"
    written(path, 1.0)
    bystander = tmp_path / "m.onnx.note.data"
    bystander.write_text("not ours")
    written(path, 2.0)
    assert bystander.read_text() == "not ours"


def test_a_file_that_is_no_model_is_replaced(tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.old.data"
    path.write_text("no model")
    data.write_text("who knows")
    written(path, 1.0)
    assert number_in(path) == 1.0
    assert data.exists()


@pytest.mark.parametrize("fails_at", [1, 2], ids=["the weights", "the model"])
def test_a_move_that_fails_leaves_the_old_model_whole(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EMBED_LIMIT", 100)
    path = tmp_path / "m.onnx"
    before = written(path, 1.0)
    moves, real = [0], os.replace

    def replace(source: Any, target: Any) -> None:
        moves[0] += 1
        if moves[0] == fails_at:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="No space"):
            written(path, 2.0)
    assert sorted(map(str, tmp_path.iterdir())) == sorted(before)
    assert number_in(path) == 1.0


def test_the_folder_is_gone_whatever_happens(tmp_path: Path) -> None:
    def stopped() -> None:
        with files.staging(tmp_path / "m.onnx") as folder:
            (folder / "half").write_text("written")
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        stopped()
    assert list(tmp_path.iterdir()) == []
