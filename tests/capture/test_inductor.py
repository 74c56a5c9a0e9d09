"""The compilers that run a rewritten graph, and what is said where one is missing."""

import pytest
import torch

import moonfx
from moonfx import fallback
from moonfx.capture import inductor
from moonfx.kernels.cpu import moba as cpu
from tests.support.tiny import TinyLM, tokens


def test_without_a_cpp_compiler_it_runs_eager_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = TinyLM(), tokens()
    expected = moonfx.sparsify(model, 16, 2, compiler="eager")(x)
    monkeypatch.setattr(inductor, "cpp_compiler", lambda: None)
    monkeypatch.setattr(cpu, "available", lambda: "no C++ compiler found")
    fallback.forget()
    moonfx.sparsify(model, 16, 2, compiler="inductor")
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler found.*install one") as caught:
        found = [model(each) for each in (x, tokens(50, 1))]
    fallback.forget()
    # Another kernel, sums in another order.
    torch.testing.assert_close(found[0], expected, atol=2e-6, rtol=1e-5)
    assert sum("C++" in str(w.message) for w in caught) == 1
    assert len(moonfx.report(model).rewritten) == 2
