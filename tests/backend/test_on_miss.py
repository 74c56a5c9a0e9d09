"""What is said where nothing became sparse: as the owner asked, with the report."""

import warnings

import pytest

from moonfx.backend.on_miss import ON_MISS, NothingRewritten, check_choice, miss
from moonfx.report.report import Report
from tests.support.attention_sites import changed

DECLINED = changed(action="declined", block=None, reason="dropout p=0.1 is active")
REPORT = Report([DECLINED], graphs=1)


def test_it_warns_at_the_callers_line_with_the_report() -> None:
    def verb() -> None:
        miss("warn", REPORT, "TinyLM")

    with pytest.warns(UserWarning, match="no attention of TinyLM became sparse") as caught:
        verb()
    assert "dropout p=0.1 is active" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_it_raises_what_a_caller_can_catch() -> None:
    with pytest.raises(NothingRewritten, match="no attention of TinyLM became sparse"):
        miss("raise", REPORT, "TinyLM")
    assert issubclass(NothingRewritten, RuntimeError)


def test_it_says_nothing_where_it_is_ignored() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        miss("ignore", REPORT, "TinyLM", "a problem")


def test_a_problem_of_another_kind_is_said_in_its_own_words() -> None:
    with pytest.raises(NothingRewritten) as caught:
        miss("raise", REPORT, "TinyLM", "no attention fits layers[7]")
    assert str(caught.value).startswith("moonfx: no attention fits layers[7]\n")


def test_passes_that_were_disabled_are_named_first() -> None:
    report = Report([DECLINED], graphs=1, disabled=("classify_mask", "lay_out_heads"))
    with pytest.raises(NothingRewritten, match=r"\(passes disabled: classify_mask, lay_out_heads"):
        miss("raise", report, "TinyLM")


@pytest.mark.parametrize("given", ["Warn", "", None, True])
def test_a_choice_that_there_is_not_is_one_error(given: object) -> None:
    message = rf"on_miss must be one of warn, raise, ignore, got {given!r}"
    with pytest.raises(ValueError, match=message):
        check_choice("on_miss", given, ON_MISS)
    for known in ON_MISS:
        check_choice("on_miss", known, ON_MISS)
