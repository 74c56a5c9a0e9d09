"""Views and writes that schemas do not mark: no iteration is computed across such a write."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from moonfx.passes.graph import unmarked_aliases
from tests.support.newton_schulz.cases import Rewritten, always, matrix
from tests.support.newton_schulz.forms import QUINTIC, step

a, b, c = QUINTIC
aten = torch.ops.aten
Program = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def operator_always(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)


def unit(G: Tensor) -> Tensor:
    return G / (G.norm() + 1e-7)


def through(view: Callable[[Tensor], Tensor]) -> Program:
    """A program that writes to what `view` shows between its two iterations."""

    def run(G: Tensor, H: Tensor) -> tuple[Tensor, ...]:
        X = unit(G)
        x = step(view(X)) * 1.5
        X.mul_(0.5)
        return x, step(unit(H)) * 1.5

    return run


def parts_of_a_flat_tensor(G: Tensor, H: Tensor) -> tuple[Tensor, ...]:
    flat = _flatten_dense_tensors([unit(G), unit(H)])
    first, _ = _unflatten_dense_tensors(flat, [G, H])
    x = step(first) * 1.5
    flat.zero_()
    return x, step(unit(H)) * 1.5


def a_part_is_written_inside_the_step(G: Tensor, H: Tensor) -> tuple[Tensor, ...]:
    flat = _flatten_dense_tensors([G, G])
    X, _ = _unflatten_dense_tensors(flat, [G, G])
    A = X @ X.mT
    flat.mul_(0.5)
    return ((a * X + (b * A + c * A @ A) @ X) * 1.0,)


def a_running_mean(training: bool) -> Program:
    def run(G: Tensor, H: Tensor) -> tuple[Tensor, ...]:
        mean, var = H.sum(0), H.square().sum(0)
        x = step(unit(mean + G)) * 1.5
        out = torch.nn.functional.batch_norm(G, mean, var, training=training)
        return x, step(unit(H + mean)) * 1.5, out

    return run


def a_dead_view_is_written(G: Tensor, H: Tensor) -> tuple[Tensor, ...]:
    aten._unsafe_view(G, [G.numel()]).mul_(0.5)
    _flatten_dense_tensors([G]).mul_(0.5)
    return (step(unit(H)) * 1.0,)


def a_dead_statistic_is_written(G: Tensor, H: Tensor) -> tuple[Tensor, ...]:
    torch.nn.functional.batch_norm(H, G[0], G[1].abs(), training=True)
    return (step(unit(H)) * 1.0,)


# The iterations that are found, and the calls that they become.
PROGRAMS: list[tuple[str, Program, int, int]] = [
    ("unsafe_view", through(lambda X: aten._unsafe_view(X, [4, 6])), 2, 1),
    ("unsafe_chunk", through(lambda X: torch.unsafe_chunk(X, 1)[0]), 2, 1),
    ("unsafe_split", through(lambda X: torch.unsafe_split(X, 4)[0]), 2, 1),
    ("conj_physical", through(lambda X: aten.conj_physical(X)), 2, 1),
    ("lift", through(lambda X: aten.lift(X)), 2, 1),
    ("sum_to_size", through(lambda X: X.sum_to_size(4, 6)), 2, 1),
    ("einsum of one", through(lambda X: torch.einsum("mn->mn", X)), 2, 1),
    ("einsum of two", through(lambda X: torch.einsum("mk,kn->mn", X, torch.eye(6))), 2, 1),
    ("flat of one", through(lambda X: _flatten_dense_tensors([X]).view(4, 6)), 2, 1),
    ("product of one", through(lambda X: torch.cartesian_prod(X.flatten()).view(4, 6)), 2, 1),
    ("parts of a flat tensor", parts_of_a_flat_tensor, 2, 2),
    ("written inside the step", a_part_is_written_inside_the_step, 0, 0),
    ("batch_norm in training", a_running_mean(True), 2, 1),
    ("batch_norm in evaluation", a_running_mean(False), 2, 1),
    ("a dead view is written", a_dead_view_is_written, 1, 1),
    ("a dead statistic is written", a_dead_statistic_is_written, 1, 1),
]


@pytest.mark.parametrize(
    ("program", "count", "calls"), [p[1:] for p in PROGRAMS], ids=[p[0] for p in PROGRAMS]
)
def test_what_no_schema_marks_keeps_its_place(program: Program, count: int, calls: int) -> None:
    given = matrix(4, 6) * 0.2, matrix(4, 6, seed=1) * 0.2
    rewritten = Rewritten(program, *given)
    assert not rewritten.failures
    assert (rewritten.count, len(rewritten.calls)) == (count, calls)
    outcomes = []
    for run in (program, rewritten):
        copies = [x.clone() for x in given]
        outcomes.append([*run(*copies), *copies])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


CANDIDATES: dict[str, list[Any]] = {
    "Tensor": [torch.rand(3, 3, generator=torch.Generator().manual_seed(0))],
    "List[Tensor]": [[torch.ones(3, 3)], [torch.ones(3, 3), torch.eye(3)]],
    "int": [0, 1],
    "List[int]": [[3, 3], [0], [1, 1], []],
    "float": [0.0, 1.0],
    "number": [1],
    "bool": [False, True],
}


def _arguments(schema: Any) -> Iterator[tuple[Any, ...]]:
    """Arguments for those that have no default."""
    needed = [x for x in schema.arguments if not x.has_default_value() and not x.kwarg_only]
    kinds = [str(x.type) for x in needed]
    return itertools.product(*(CANDIDATES.get(kind, []) for kind in kinds))


def _storages(values: Any) -> set[int]:
    tensors = [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, Tensor)]
    return {x.untyped_storage().data_ptr() for x in tensors if x.numel()}


def test_operators_that_are_said_to_return_new_memory_do() -> None:
    tried = 0
    for name in sorted(unmarked_aliases.NEW):
        packet = getattr(aten, name)
        for overload in (getattr(packet, each) for each in packet.overloads()):
            if overload._schema.is_mutable:
                continue
            for given in itertools.islice(_arguments(overload._schema), 8):
                try:
                    made = overload(*given)
                except (RuntimeError, IndexError, TypeError, ValueError):
                    continue
                tried += 1
                assert not _storages(given) & _storages(made), overload
    assert tried > 100
