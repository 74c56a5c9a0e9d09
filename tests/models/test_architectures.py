"""Every causal language model of transformers: all attention accounted for, and equal to dense."""

import logging
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from tests.support.architectures import (
    DOCS,
    FORMS,
    NAMES,
    document,
    line,
    quiet,
    survey,
    totals,
    written,
)

CASES = [(name, form) for name in NAMES for form in FORMS]
# Every second architecture in its eager form, every 24th in the other one too. `make sweep` has the
# rest: all of them together take a third of the time that `make test` may.
LONG = ("zamba", "qwen4_exp_text")  # take as long as ten others
PARAMETERS = [
    pytest.param(
        *(name, form),
        id=f"{name}-{form}",
        marks=[pytest.mark.sweep]
        if name in LONG or NAMES.index(name) % {"eager": 2, "sdpa": 24}[form]
        else [],
    )
    for name, form in CASES
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, so that sums round alike wherever the test runs, and no logs."""
    threads, logger = torch.get_num_threads(), logging.getLogger("torch._dynamo")
    level = logger.level
    quiet()
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "form"), PARAMETERS)
def test_all_attention_is_accounted_for_and_equals_dense(name: str, form: str) -> None:
    row = survey(name, form)
    assert row.wrong == ""
    if row.report is not None:
        assert row.unaccounted() == []
        assert all(r.reason for r in row.report.rows if r.action != "sparse")
        assert row.report.failures == []
    version, lines = written()
    if version == transformers.__version__:  # another version has other architectures
        again = f"python -m tests.support.architectures {name} --write"
        assert line(row) == lines.get((name, form)), f"docs/architectures.md is old: {again}"


# Architectures with causal attention that stays dense; docs/architectures.md has each reason.
DENSE = {
    *("inkling2_text", "inkling_text", "prophetnet"),  # a bias of query and key together
    "jetmoe",  # a graph break hands the probabilities on
}


def test_of_causal_attention_all_but_some_named_ones_is_rewritten_and_nothing_else_is() -> None:
    version, lines = written()
    if version != transformers.__version__:
        pytest.skip(f"the docs are about transformers {version}, not {transformers.__version__}")
    assert sorted(lines) == sorted(CASES)
    assert document([lines[key] for key in sorted(lines)]) == DOCS.read_text()
    sums = totals(list(lines.values()))
    assert set(sums["rewritten"]) == {"causal"}
    assert sums["rewritten"]["causal"] >= 0.98 * sums["attention"]["causal"]
    short = {key[0] for key, text in lines.items() if totals([text])["attention"]["causal"]
             > totals([text])["rewritten"]["causal"]}  # fmt: skip
    assert short == DENSE
