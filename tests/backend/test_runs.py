"""Which graphs ran in a call of this thread, and what runs instead of one that is overruled."""

import threading

import pytest
import torch

from moonfx.backend.records import Record
from moonfx.backend.runs import graphs_that_ran, recorded


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_the_graphs_that_ran_are_those_of_the_innermost_call_of_a_thread() -> None:
    first, second = Record([], None, []), Record([], None, [])
    one, other = recorded(double, first, double), recorded(double, second, double)
    x = torch.ones(1)
    one(x)
    with graphs_that_ran() as outer:
        one(x)
        with graphs_that_ran() as inner:
            other(x)
            other(x)
        thread = threading.Thread(target=one, args=(x,))
        thread.start()
        thread.join()
        one(x)
    assert outer == [first, first]
    assert inner == [second, second]


def test_an_overruled_graph_runs_as_it_was_written_and_says_so_at_each_call() -> None:
    record = Record([], None, [])
    run = recorded(double, record, lambda x: x + 5)
    x = torch.ones(1)
    assert run(x) == 2
    record.overruled = "a step was taken to be sparse"
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="moonfx: a step was taken to be sparse"):
            assert run(x) == 6


def test_a_graph_that_fails_leaves_the_count_of_its_call_whole() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    record = Record([], None, [])
    with graphs_that_ran() as ran:
        with pytest.raises(ValueError, match="no"):
            recorded(fails, record, fails)(torch.ones(1))
        recorded(double, record, double)(torch.ones(1))
    assert ran == [record, record]
