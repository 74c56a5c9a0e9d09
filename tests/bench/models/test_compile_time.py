"""`moonfx bench compile`: its arguments, and which turns it compares."""

import json

import pytest

from moonfx.bench.models import compile_time
from moonfx.cli import command as cli


def test_compile_time_asks_for_a_length_that_is_sparse(capsys):
    with pytest.raises(SystemExit, match="2"):
        compile_time.main(["--length", "1024"])
    assert "--length must be more than 1024" in capsys.readouterr().err


def test_compile_time_compares_the_best_turns_of_both(monkeypatch, capsys):
    turns = {"torch.compile": iter([30.0, 20.0]), "moonfx.sparsify": iter([22.0, 40.0])}
    order = []

    def in_new_process(way, options):
        order.append(way)
        return {"compile": next(turns[way]), "run": 1.0}

    monkeypatch.setattr(compile_time, "in_new_process", in_new_process)
    assert cli.main(["bench", "compile", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == pytest.approx(22 / 20)
    assert order == list(compile_time.WAYS) * 2
