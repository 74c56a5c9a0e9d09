"""The report of Newton-Schulz iterations: what is in one row, and what its reader sees."""

import torch
from torch import fx

from moonfx.report.newton_schulz import footer, rows_of, table
from moonfx.site import Declined, NewtonSchulzSite

MUON = (3.4445, -4.7750, 2.0315)
OTHER = (2.8769, -3.1427, 1.2046)


def node(name: str) -> fx.Node:
    return fx.Graph().placeholder(name)


def site(*shape: int, **fields: object) -> NewtonSchulzSite:
    made = NewtonSchulzSite(
        output=node("x"),
        shape=shape,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        coefficients=[MUON] * 5,
        layer="",
        line="muon.py:66",
        flops=5 * 2 * (2 * 64 * 64 * 96 + 64**3),
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def rewritten(*shape: int, call: int, **fields: object) -> NewtonSchulzSite:
    done = {"action": "rewritten", "form": "symmetric", "why": "half", "call": call}
    return site(*shape, **{**done, **fields})


def declined(reason: str, name: str) -> NewtonSchulzSite:
    return site(64, 96, reject=Declined(reason, node(name)), flops=0)


def cells(text: str) -> list[list[str]]:
    """Of a table's rows: what stands in each column, by the widths of the rule under the heads."""
    heads, rule, *rest = text.splitlines()
    ends = [i for i, c in enumerate(rule + " ") if c == " " and rule[i - 1] == "-"]
    starts = [0, *(rule.index("-", end) for end in ends[:-1])]
    spans = list(zip(starts, [*starts[1:], None], strict=True))
    return [[line[a:b].strip() for a, b in spans] for line in (heads, *rest)]


def test_iterations_on_one_size_are_one_row_and_their_calls_are_counted_once() -> None:
    sites = [rewritten(64, 96, call=1 + i // 16) for i in range(40)]
    (row,) = rows_of(sites)
    assert (row.count, row.calls, row.shared) == (40, 3, 0)
    assert row.flops_before == 40 * sites[0].flops
    assert "40 rewritten to 3 calls" in footer([row], 1, 1)


def test_a_call_that_two_rows_share_is_counted_once() -> None:
    """A tall matrix and a wide one, or a batch and a matrix."""
    rows = rows_of(
        [rewritten(64, 96, call=1), rewritten(96, 64, call=1), rewritten(96, 64, call=2)]
    )
    assert [(r.calls, r.shared) for r in rows] == [(1, 0), (2, 1)]
    assert "3 rewritten to 2 calls" in footer(rows, 1, 1)
    assert [line[6] for line in cells(table(rows))] == ["calls", "1", "2 (1 shared)"]


def test_declines_of_different_reasons_are_rows_apart_and_name_the_first_node() -> None:
    sites = [declined("gradients", "mm_4"), declined("gradients", "mm_9"), declined("dropout", "d")]
    rows = rows_of(sites)
    assert [(r.count, r.reason, r.node) for r in rows] == [
        (2, "gradients", "mm_4"),
        (1, "dropout", "d"),
    ]
    lines = cells(table(rows))
    assert [line[7] for line in lines] == [
        "form, and why",
        "gradients (node mm_4, the first of 2)",
        "dropout (node d)",
    ]
    assert [line[6] for line in lines[1:]] == ["-", "-"]
    assert [line[8:] for line in lines[1:]] == [["-", "-"], ["-", "-"]]


def test_a_batch_costs_what_its_matrices_do() -> None:
    (row,) = rows_of([rewritten(3, 64, 96, call=1, flops=3 * site(64, 96).flops)])
    (one,) = rows_of([rewritten(64, 96, call=1)])
    assert (row.flops_before, row.flops_after) == (3 * one.flops_before, 3 * one.flops_after)
    assert cells(table([row]))[1][1] == "3x64x96"


def test_coefficients_and_layers_are_shown_where_they_tell_rows_apart() -> None:
    alike = [rewritten(64, 96, call=1), rewritten(64, 64, call=2)]
    assert not {"a, b, c", "layer"} & set(cells(table(rows_of(alike)))[0])
    rows = rows_of([*alike, rewritten(64, 96, call=3, coefficients=[OTHER, MUON], layer="outer")])
    heads, *lines = cells(table(rows))
    assert [line[heads.index("layer")] for line in lines] == ["", "", "outer"]
    shown = [line[heads.index("a, b, c")] for line in lines]
    assert shown == ["3.4445, -4.775, 2.0315"] * 2 + ["2.8769, -3.1427, 1.2046 .."]


def test_a_table_is_no_wider_than_a_terminal_for_logs() -> None:
    why = "0.55 of the FLOPs: 2 + 1 + 2 steps between visits of X"
    rows = rows_of([rewritten(576, 1536, call=1), rewritten(4096, 14336, call=2, why=why)])
    assert max(map(len, table(rows).splitlines())) <= 160
