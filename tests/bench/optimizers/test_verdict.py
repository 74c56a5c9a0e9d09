"""The verdict of the optimizers' benchmarks: who asks for one, and what makes it fail."""

from collections.abc import Callable

import pytest

from moonfx.bench.optimizers import newton_schulz, optimizer, verdict
from moonfx.bench.optimizers.verdict import Judged, judge
from tests.support.optimizer_bench import printed, ticking


@pytest.mark.parametrize(
    ("name", "spent", "status", "again"),
    [
        ("as fast", lambda i: 1.0, 0, 0),
        ("slower always", lambda i: 1.0 + 0.1 * (i % 2), 1, 1),
        ("slower in the first turns alone", lambda i: 1.0 + 0.1 * (i % 2 and i < 4), 0, 1),
    ],
)
def test_the_verdict_measures_failures_again_and_fails_by_its_exit_status(
    name: str,
    spent: Callable[[int], float],
    status: int,
    again: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(newton_schulz, "newton_schulz_form", lambda *size: ("symmetric", "a test"))
    ticking(monkeypatch, spent)
    words = ["--shape", "8x16", "--repeats", "2", "--dtype", "float32", "--only", "auto"]
    said = printed(capsys, "newton-schulz", *words, "--at-most", "1.03", status=status)
    assert said["verdict"]["passed"] == (not status)
    assert said["verdict"]["measured_again"] == again
    turns = 2 + again * verdict.AGAIN * 2
    assert {k: len(v) for k, v in said["results"][0]["seconds"].items()} == {
        "loop": turns,
        "symmetric": turns,
    }


def test_the_verdict_names_the_worst_and_counts_what_was_left() -> None:
    measured = [
        Judged("64x64", 0.9, False, False),
        Judged("8x8", 1.0, False, True),
        Judged("64x128", 1.0301, True, False),
    ]
    assert judge(measured, 1.03).line("the loop", "1.00x by definition") == (
        "verdict: FAIL: at worst 1.030x the time of the loop, on 64x128 (allowed: 1.03x); 1 of 3 "
        "slower; 1 measured again; 1 left as written, 1.00x by definition"
    )
    assert judge(measured[:2], 1.03).passed
    assert judge(measured[:1], 1.03, left_out=2).line("the loop", "").endswith("; 2 left out")
    assert not judge(measured, 1.03).passed


def test_the_sweep_alone_asks_for_a_verdict_unasked() -> None:
    assert newton_schulz.parse(["--model", "sweep"]).at_most == 1.03
    assert newton_schulz.parse([]).at_most is None
    assert newton_schulz.parse(["--model", "sweep", "--at-most", "2"]).at_most == 2
    each = optimizer.parse(["--model", "sweep", "--each"])
    assert (each.at_most, each.only) == (1.03, ("inductor", "moonfx"))
    assert optimizer.parse([]).at_most is None
