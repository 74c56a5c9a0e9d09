"""The table of roles, and why a row is where it is."""

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.table import ROLES, RoleRow, Roles, row_of
from tests.support.optim.roles import THIRDS, rows, small


def test_the_table_shows_each_row_and_counts_those_on_muon() -> None:
    table = Roles(list(rows(small(), overrides={"qkv.weight": THIRDS}).values()))
    assert len(table) == len(table.rows) == len(table.to_dict()["rows"]) == 7
    assert "fused projection 1 x (4 + 4 + 4)" in str(table)
    assert str(table).endswith("2 of 7 parameters on Muon")
    assert table.to_dict()["rows"][1]["layout"]["sizes"] == (4, 4, 4)


def test_a_row_says_why_it_is_on_its_optimizer() -> None:
    from moonfx.optim.roles.table import Finding

    row = row_of("x", [3, 4], Finding("head", "seen", Layout(sizes=(1, 2))), "graph")
    assert row == RoleRow("x", (3, 4), "head", "graph", "adamw", f"seen; {ROLES['head'].why}")
