"""Random programs of writes, views and iterations compute the same after the rewrite.

And random spellings of steps are read, unless one of their nodes is changed.
"""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tests.passes.newton_schulz.test_foreach import LISTS
from tests.support.newton_schulz.cases import Rewritten, always, matrix
from tests.support.newton_schulz.forms import (
    CHANGING,
    doubled_between,
    gram_free,
    horner_on_x,
    in_place,
    normalized,
    transposed_a,
)
from tests.support.newton_schulz.spellings import MATRIX, SPELLINGS, Spelling

aten = torch.ops.aten
FORMS = (gram_free, horner_on_x, in_place, transposed_a, doubled_between)
OF_ONE: list[Spelling] = [step for _, step, shape in SPELLINGS if shape == MATRIX]
OF_LISTS = [body for _, body in LISTS]


def program(seed: int) -> Callable[..., list[Tensor]]:
    """A function of some tensors, which it also writes to, directly and through views."""

    def body(*given: Tensor) -> list[Tensor]:
        choose, pool = random.Random(seed), list(given)
        for _ in range(choose.randint(4, 12)):
            x, y = choose.choice(pool), choose.choice(pool)
            match choose.randrange(16):
                case 0:
                    x.add_(y, alpha=0.3)
                case 1:
                    x.lerp_(y, 0.2)
                case 2:
                    pool.append(x.view(x.shape))
                case 3:
                    x[choose.randrange(len(x))].add_(0.1)
                case 4:
                    pool.append(x + 0.5 * y)
                case 5 | 6:
                    y.mul_(0.9).add_(choose.choice(FORMS)(x))
                case 7:
                    pool.append(y.copy_(x[:] * 0.7))
                case 8 if x is not y:
                    torch._foreach_lerp_([x, y], [y, x], 0.3)
                case 9:
                    pool += torch._foreach_add(choose.choice(OF_LISTS)(x, y), [y, x], alpha=0.5)
                case 10:
                    X = normalized(x)
                    for numbers in CHANGING[: choose.randint(1, 3)]:
                        X = choose.choice(OF_ONE)(X, *numbers)
                    pool += [X, X.mT.contiguous().mT]
                case _:
                    pool.append(choose.choice(FORMS)(x) * 1.5)
        return [p * 1 for p in pool]

    return body


def test_random_programs_keep_their_results_and_what_they_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch)
    calls = iterations = 0
    for seed in range(16):
        given = [matrix(4, 4 if seed % 2 else 6, seed=i) for i in range(4)]
        eager, ours = ([g.clone() for g in given] for _ in range(2))
        rewritten = Rewritten(program(seed), *given)
        expected, found = program(seed)(*eager) + eager, rewritten(*ours) + ours
        for a, b in zip(expected, found, strict=True):
            # Several iterations one after another: each makes of a rounding up to 4^3 of it.
            torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3, msg=f"seed {seed}")
        calls += len(rewritten.calls)
        iterations += sum(row.count for row in rewritten.rows)
    assert iterations > calls > 16  # some share a call


@pytest.mark.parametrize("seed", range(8))
def test_steps_in_any_spellings_one_after_another_are_one_iteration(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    choose = random.Random(seed)
    steps = [choose.choice(OF_ONE) for _ in CHANGING]

    def body(G: Tensor) -> Tensor:
        X = normalized(G)
        for step, numbers in zip(steps, CHANGING, strict=True):
            X = step(X, *numbers)
        return X * 2

    G = matrix(4, 6, seed=seed)
    rewritten = Rewritten(body, G)
    assert [(r.count, r.calls, r.steps) for r in rewritten.rows] == [(1, 1, 3)], steps
    torch.testing.assert_close(rewritten(G), body(G.clone()), atol=2e-5, rtol=0)


def halved_in_part(node: Tensor) -> Tensor:
    return node * torch.tensor([[0.5], [1.0], [1.0], [1.0]])


# One operator more, after one node: none makes a polynomial of one, of the identity neither.
CHANGES: list[Callable[[Tensor], Tensor]] = [
    lambda A: A + 1e-3,
    lambda A: A.clamp(-0.5, 0.5),
    lambda A: A * A,
    lambda A: A * A.sum(),
    lambda A: A.round(decimals=2),
    lambda A: A.tril(),
    lambda A: A.roll(1, 0),
    lambda A: A[:1].expand(4, 4),
    lambda A: A.reshape(2, 8).mT.reshape(4, 4),
    lambda A: A.index_fill(0, torch.tensor([1]), 0.0),
    lambda A: A.exp(),
    halved_in_part,
]


@pytest.mark.parametrize("seed", range(len(OF_ONE)))
def test_a_step_of_which_one_node_is_changed_stays_as_it_was_written(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of [m, m], which X and the step's result are not."""
    always(monkeypatch)
    choose, step = random.Random(seed), OF_ONE[seed]
    G = matrix(*MATRIX, seed=seed)
    for change in choose.sample(CHANGES, 1):
        with torch.no_grad():
            gm = make_fx(lambda G: step(normalized(G), *CHANGING[0]), pre_dispatch=True)(G)
        gm.graph.eliminate_dead_code()
        square = [n for n in gm.graph.nodes if _is_square(n) and "empty" not in str(n.target)]
        if not square:
            continue  # einsum of X alone
        node = choose.choice(square)
        with gm.graph.inserting_after(node):
            changed = gm.graph.call_function(change, (node,))
        node.replace_all_uses_with(
            changed, delete_user_cb=lambda user, new=changed: user is not new
        )
        gm.recompile()
        rewritten = Rewritten(gm, G)
        assert (rewritten.count, rewritten.calls) == (0, []), node
        assert rewritten.targets == rewritten.before
        assert torch.equal(rewritten(G.clone()), gm(G.clone()))


def _is_square(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.shape[-2:] == (4, 4) and bool(node.users)
