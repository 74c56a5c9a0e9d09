"""Random programs of writes, views and iterations compute the same after the rewrite."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.newton_schulz_cases import Rewritten, always, matrix
from tests.passes.newton_schulz_forms import (
    doubled_between,
    gram_free,
    horner_on_x,
    in_place,
    transposed_a,
)

FORMS = (gram_free, horner_on_x, in_place, transposed_a, doubled_between)


def program(seed: int) -> Callable[..., list[Tensor]]:
    """A function of some tensors, which it also writes to, directly and through views."""

    def body(*given: Tensor) -> list[Tensor]:
        choose, pool = random.Random(seed), list(given)
        for _ in range(choose.randint(4, 12)):
            x, y = choose.choice(pool), choose.choice(pool)
            match choose.randrange(10):
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
                case _:
                    pool.append(choose.choice(FORMS)(x) * 1.5)
        return [p * 1 for p in pool]

    return body


def test_random_programs_keep_their_results_and_what_they_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch)
    calls = iterations = 0
    for seed in range(12):
        given = [matrix(4, 4 if seed % 2 else 6, seed=i) for i in range(4)]
        eager, ours = ([g.clone() for g in given] for _ in range(2))
        rewritten = Rewritten(program(seed), *given)
        expected, found = program(seed)(*eager) + eager, rewritten(*ours) + ours
        for a, b in zip(expected, found, strict=True):
            # Several iterations one after another: each makes of a rounding up to 4^3 of it.
            torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3, msg=f"seed {seed}")
        calls += len(rewritten.calls)
        iterations += sum(row.count for row in rewritten.rows)
    assert iterations > calls > 12  # some share a call
