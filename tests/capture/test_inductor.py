"""The compilers that run a rewritten graph, and what is said where one is missing."""

import shutil
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import fx
from torch._inductor import compile_fx

import moonfx
from moonfx import fallback
from moonfx.capture import inductor
from moonfx.capture.cache_key import Stamp
from moonfx.kernels.cpu import moba as cpu
from tests.support.reading import traced
from tests.support.tiny import TinyLM, tokens

HOOK = "post_grad_custom_post_pass"
X = torch.ones(3)


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


def doubled() -> fx.GraphModule:
    return traced(lambda x: x * 2, X)


def test_eager_is_the_graph_as_it_is() -> None:
    gm = doubled()
    assert inductor.compile_graph(gm, [X], "eager", "stamp") == gm.forward


@pytest.mark.parametrize("theirs", [None, "one", "several"])
def test_the_stamp_stands_beside_a_pass_of_the_users(
    theirs: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it an artifact of other sources or another policy would answer."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        compile_fx, "compile_fx", lambda gm, x, config_patches: seen.append(config_patches)
    )
    own, other = Stamp("own"), Stamp("other")
    given = {None: {}, "one": {HOOK: own}, "several": {HOOK: [own, other]}}[theirs]
    inductor.compile_graph(doubled(), [X], "inductor", "16/2/1", {**given, "max_autotune": True})
    ours = Stamp("16/2/1").uuid()
    (patches,) = seen
    passes = patches[HOOK] if isinstance(patches[HOOK], list) else [patches[HOOK]]
    expected = {None: [], "one": [own], "several": [own, other]}[theirs]
    assert (passes[:-1], passes[-1].uuid()) == (expected, ours)
    assert patches["max_autotune"] is True


def test_the_compiler_is_the_first_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"clang++", "mine"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    with torch._inductor.config.patch({"cpp.cxx": (None, "mine")}):
        assert inductor.cpp_compiler() == "mine"
    with torch._inductor.config.patch({"cpp.cxx": "nothing"}):
        assert inductor.cpp_compiler() == "clang++"
        there.clear()
        assert inductor.cpp_compiler() is None


def test_a_mode_is_what_inductor_says_of_it() -> None:
    assert inductor.mode_options(None) == inductor.mode_options("default") == {}
    assert inductor.mode_options("max-autotune-no-cudagraphs")["max_autotune"] is True
