"""Steps and chunks by a cache give the logits of the whole sparse pass, in any order of calls.

Over every causal language model of transformers; most rows are of `make sweep`.
"""

import warnings

import pytest

pytest.importorskip("transformers", reason="needs transformers, pinned in requirements.txt")

from tests.support.architectures import FORMS, NAMES
from tests.support.call_orders import ORDERS, Unfit, wrong

USUAL = {  # of each kind of cache one, in the order that it has gone wrong in
    ("bloom", "eager", "whole first"),
    ("llama", "sdpa", "cache first"),
}
# A step of these is declined after a sparse prompt: said at the call, by naming both.
SAID = {
    "gemma3n_text": "the query of layers that share keys comes from stacked streams",
    "jetmoe": "a graph break makes the query of a step an input of a graph of its own",
}
PARAMETERS = [
    pytest.param(*case, id="-".join(case), marks=[] if case in USUAL else [pytest.mark.sweep])
    for case in ((name, form, order) for name in NAMES for form in FORMS for order in ORDERS)
]


@pytest.mark.parametrize(("name", "form", "order"), PARAMETERS)
def test_a_token_is_told_the_same_whichever_way_it_comes_in(name, form, order) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            differing = wrong(name, form, order)
        except Unfit as reason:
            pytest.skip(f"{name} shows nothing: {reason}")
    said = [str(w.message) for w in found if "was sparse in" in str(w.message)]
    if name in SAID:
        assert said or not differing
    else:
        assert differing == {}
        assert said == []
