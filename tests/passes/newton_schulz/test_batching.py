"""Which iterations share a call of the operator, and what keeps them apart."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moonfx.passes.newton_schulz import batching
from tests.support.newton_schulz.cases import Rewritten, always, matrix
from tests.support.newton_schulz.forms import CHANGING, QUINTIC, gram_free, jordan, normalized, wide
from tests.support.newton_schulz.programs import (
    Program,
    assert_computes_the_same,
    iterate,
    most_bytes_alive,
)

Shape = tuple[int, ...]

aten = torch.ops.aten


pytestmark = pytest.mark.usefixtures("operator_always")


def update(parameters: list[Tensor], gradients: list[Tensor]) -> None:
    """One parameter after another, as an optimizer's loop has it."""
    for p, g in zip(parameters, gradients, strict=True):
        p.mul_(0.9).sub_(iterate(normalized(g)))


def run(parameters: list[Tensor], gradients: list[Tensor]) -> Callable[..., None]:
    def body(*given: Tensor) -> None:
        update(list(given[: len(parameters)]), list(given[len(parameters) :]))

    return body


def two(*shape: int) -> list[Tensor]:
    return [matrix(*shape, seed=1), matrix(*shape, seed=2)]


def test_a_loop_over_parameters_becomes_one_call_for_each_size() -> None:
    parameters = [*two(4, 6), *two(6, 4), matrix(4, 6, seed=3)]
    gradients = [matrix(*p.shape, seed=9 + i) for i, p in enumerate(parameters)]
    rewritten = Rewritten(run(parameters, gradients), *parameters, *gradients)
    assert [(r.shape, r.count, r.calls) for r in rewritten.rows] == [((4, 6), 3, 1), ((6, 4), 2, 1)]
    sizes = [n.args[0].meta["val"].shape for n in rewritten.calls]  # type: ignore[union-attr]
    assert sorted(sizes) == [(2, 6, 4), (3, 4, 6)]
    eager, ours = ([p.clone() for p in parameters] for _ in range(2))
    update(eager, gradients)
    rewritten(*ours, *gradients)
    for a, b in zip(eager, ours, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)  # see test_newton_schulz
        assert not torch.equal(a, parameters[0])


def feeding(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    first = iterate(normalized(G))
    return first * 2, iterate(normalized(H + first)) * 2


def feeding_through_memory(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """The second reads what the first was written to, by a view made before."""
    total = H.clone()
    view = total.view(-1)
    first = iterate(normalized(G))
    total.add_(first)
    return first * 2, iterate(normalized(view.view(4, 6))) * 2


def a_number_drawn_between(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """The draw is before the second's input and after the first's result is used."""
    first = torch.dropout(iterate(normalized(G)), 0.5, True)
    return first, iterate(normalized(torch.dropout(H, 0.5, True))) * 2


def other_coefficients(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    return iterate(normalized(G)) * 2, iterate(normalized(H), (QUINTIC,) * 3) * 2


def other_steps(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    return iterate(normalized(G)) * 2, iterate(normalized(H), CHANGING[:2]) * 2


def other_dtype(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    return iterate(normalized(G)) * 2, iterate(normalized(H).double()) * 2


def returned(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Two results of a graph never lie in one memory."""
    return iterate(normalized(G)), iterate(normalized(H))


def crossed(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Small after large and large after small: neither pair may become one call."""
    large, small = normalized(G), normalized(H[:3, :3])
    large_first = iterate(large)
    small_second = iterate(normalized(small + large_first[:3, :3]))
    small_first = iterate(small)
    large_second = iterate(normalized(G + small_first.sum()))
    return small_second * 2, large_second * 2


APART = [
    ("one feeds the other", feeding, 2),
    ("through memory", feeding_through_memory, 2),
    ("a random number between", a_number_drawn_between, 2),
    ("other coefficients", other_coefficients, 2),
    ("fewer steps", other_steps, 2),
    ("another dtype", other_dtype, 2),
    ("both returned", returned, 2),
    ("crossed", crossed, 4),
]


@pytest.mark.parametrize(("name", "body", "calls"), APART, ids=[r[0] for r in APART])
def test_iterations_that_may_not_share_a_call_have_their_own(
    name: str, body: Callable[..., tuple[Tensor, ...]], calls: int
) -> None:
    G, H = two(4, 6)
    rewritten = Rewritten(body, G, H)
    assert len(rewritten.calls) == calls
    torch.manual_seed(0)
    expected = body(G.clone(), H.clone())
    torch.manual_seed(0)
    for a, b in zip(expected, rewritten(G, H), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


def test_a_call_is_given_no_more_than_its_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "CALL_BYTES", 2 * 4 * 6 * 4)
    parameters = [matrix(4, 6, seed=i) for i in range(5)]
    gradients = [matrix(4, 6, seed=9 + i) for i in range(5)]
    rewritten = Rewritten(run(parameters, gradients), *parameters, *gradients)
    assert [r.calls for r in rewritten.rows] == [3]
    sizes = [n.args[0].meta["val"].shape for n in rewritten.calls]  # type: ignore[union-attr]
    assert sizes == [(2, 4, 6), (2, 4, 6), (4, 6)]


# Of a decoder's layer: queries, keys, values, output, gate, up and down.
LAYER = ((16, 16), (4, 16), (4, 16), (16, 16), (56, 16), (56, 16), (16, 56))


def test_no_more_is_alive_than_what_one_call_reads_and_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each call's matrices are made right before it, and what it makes is used right after it."""

    def muon(*given: Tensor) -> None:
        for p, momentum, g in zip(given[::3], given[1::3], given[2::3], strict=True):
            momentum.lerp_(g, 0.05)
            update = jordan(g.lerp(momentum, 0.95), steps=1)
            p.mul_(0.9).add_(update.to(p.dtype), alpha=-0.1)

    limit = 3 * 2 * 16 * 56  # three of the largest
    monkeypatch.setattr(batching, "CALL_BYTES", limit)
    given = [torch.ones(shape) for shape in LAYER * 4 for _ in range(3)]
    rewritten = Rewritten(muon, *given)
    assert [(r.shape, r.count, r.calls) for r in rewritten.rows] == [
        ((16, 16), 8, 1),
        ((4, 16), 8, 1),
        ((16, 56), 12, 5),
    ]
    assert most_bytes_alive(rewritten.gm.graph) == 2 * limit  # what it reads, and what it makes


def kept_by_rows(*given: Tensor) -> list[Tensor]:
    """Tall matrices stay tall: whatever they are made of, X lies by rows."""
    return [gram_free(g) * 2 for g in given]


def turned_on_entry(*given: Tensor) -> list[Tensor]:
    """Keller Jordan's: of a tall matrix X is a view, and lies by columns."""
    return [jordan(g) * 2 for g in given]


def as_torch_does(*given: Tensor) -> list[Tensor]:
    """X_0 lies by columns where it is turned on entry, and X_k by rows."""
    out = []
    for g in given:
        X = normalized(g if wide(g) else g.mT)
        for a, b, c in CHANGING:
            A = X @ X.mT
            X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
        out.append(X * 2)
    return out


# name, program, shapes; of each call what it is given, where layouts share calls and where not
SIZES: list[tuple[str, Program, list[Shape], list[Shape], list[Shape]]] = [
    ("tall and wide", turned_on_entry, [(4, 6), (6, 4)], [(2, 4, 6)], [(4, 6), (6, 4)]),
    ("tall and tall", turned_on_entry, [(6, 4), (6, 4)], [(2, 6, 4)], [(2, 6, 4)]),
    ("square", turned_on_entry, [(4, 4), (4, 4)], [(2, 4, 4)], [(2, 4, 4)]),
    ("by rows", kept_by_rows, [(6, 4), (4, 6)], [(2, 4, 6)], [(6, 4), (4, 6)]),
    ("long sides differ", turned_on_entry, [(4, 6), (4, 8)], *[[(4, 6), (4, 8)]] * 2),
    ("batches", kept_by_rows, [(3, 6, 4), (3, 6, 4)], *[[(6, 6, 4)]] * 2),
    ("batches of two sizes", kept_by_rows, [(3, 6, 4), (2, 6, 4)], *[[(5, 6, 4)]] * 2),
    ("a batch and a matrix", kept_by_rows, [(3, 6, 4), (6, 4)], *[[(4, 6, 4)]] * 2),
    ("batches of batches", kept_by_rows, [(2, 3, 6, 4), (6, 4)], *[[(7, 6, 4)]] * 2),
    ("turned, and left so", as_torch_does, [(4, 6), (6, 4)], [(2, 4, 6)], [(4, 6), (6, 4)]),
    ("a tall batch", turned_on_entry, [(3, 6, 4), (4, 6)], [(4, 4, 6)], [(3, 6, 4), (4, 6)]),
]


@pytest.mark.parametrize("kind", ["small on a GPU", "large on a GPU", "on a CPU"])
@pytest.mark.parametrize(
    ("name", "program", "shapes", "one", "two"), SIZES, ids=[r[0] for r in SIZES]
)
def test_matrices_of_equal_sides_share_a_call(
    name: str,
    program: Program,
    shapes: list[Shape],
    one: list[Shape],
    two: list[Shape],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind != "on a CPU":
        monkeypatch.setattr(batching, "SEPARATE_LAYOUTS", set())
    if kind == "large on a GPU":
        monkeypatch.setattr(batching, "TRANSPOSED_BYTES", 0)
    given = [matrix(*shape, seed=i) for i, shape in enumerate(shapes)]
    rewritten = Rewritten(program, *given)
    sizes = [tuple(n.args[0].meta["val"].shape) for n in rewritten.calls]  # type: ignore[union-attr]
    assert sorted(sizes) == sorted(one if kind == "small on a GPU" else two)
    # Twice that of test_newton_schulz in bfloat16, as the results are.
    assert_computes_the_same(program, rewritten, given, tolerance=0.12)


def test_norms_taken_of_a_list_at_once_keep_iterations_together() -> None:
    """torch._foreach_*: each tensor of a list is memory of its own."""

    def body(G: Tensor, H: Tensor) -> list[Tensor]:
        scaled = torch._foreach_div([G, H], torch._foreach_norm([G, H]))
        torch._foreach_mul_(scaled, 0.5)
        return [iterate(X) * 2 for X in scaled]

    G, H = two(4, 6)
    rewritten = Rewritten(body, G, H)
    assert [(r.count, r.calls) for r in rewritten.rows] == [(2, 1)]
    for a, b in zip(body(G, H), rewritten(G, H), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_a_momentum_that_is_normalized_in_place_still_is() -> None:
    """As torch.optim.Muon does without nesterov to bfloat16 parameters, by mistake."""

    def body(momentum: Tensor, g: Tensor) -> Tensor:
        momentum.lerp_(g, 0.1)
        X = momentum.bfloat16()
        X.div_(X.norm())
        return iterate(X) * 2

    given = [m.bfloat16() for m in two(4, 6)]
    eager, ours = ([m.clone() for m in given] for _ in range(2))
    rewritten = Rewritten(body, *given)
    out = rewritten(*ours)
    torch.testing.assert_close(body(*eager), out, atol=0.06, rtol=0)
    assert len(rewritten.calls) == 1
    assert torch.equal(eager[0], ours[0])
    assert abs(ours[0].float().norm() - 1) < 0.01


def test_what_the_cost_model_leaves_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, "plain")
    rewritten = Rewritten(lambda G: jordan(G) * 2, matrix(4, 6))
    assert [(r.action, r.calls, r.form) for r in rewritten.rows] == [("left", 0, "")]
    assert rewritten.targets == rewritten.before


def test_what_is_the_operator_already_is_left_and_reported() -> None:
    """As moonfx.Muon's step is."""
    numbers = [x for step in CHANGING for x in step]
    X = normalized(matrix(4, 6))
    rewritten = Rewritten(lambda X: torch.ops.moonfx.newton_schulz(X, numbers) * 2, X)
    (row,) = rewritten.rows
    assert (row.action, row.steps, row.calls, len(rewritten.calls)) == ("left", 3, 0, 1)
    assert row.coefficients == CHANGING
