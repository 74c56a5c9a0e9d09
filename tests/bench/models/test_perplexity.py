"""`moonfx bench perplexity` on a small model: which tokens count, and where its table goes."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moonfx.bench.harness import into_page
from moonfx.bench.models import perplexity
from moonfx.cli import command as cli
from tests.support import tiny_smollm2

ROOT = Path(__file__).resolve().parents[3]
DATA = "docs/benchmarks/perplexity.json"
SMALL = ["--length", "256", "--last", "64", "--block", "16", "--topk", "3"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(perplexity.smollm2, "load", tiny_smollm2.load)


def printed(words, capsys):
    assert cli.main(["bench", "perplexity", *SMALL, *words]) == 0
    return capsys.readouterr().out


def test_each_text_is_read_densely_and_sparsely_and_its_last_tokens_count(tiny, capsys):
    texts = ["heapq.py", "help topics"]
    said = json.loads(printed(["--texts", *texts, "--json"], capsys))
    assert said["policy"] == {"block": 16, "topk": 3, "sinks": 1}
    assert {"hardware", "versions"} <= said["where"].keys()
    assert [(r["text"], r["tokens"]) for r in said["results"]] == [(name, 256) for name in texts]
    for result in said["results"]:
        assert result["sparse"] != result["dense"]
        assert result["over_dense"] == pytest.approx(result["sparse"] / result["dense"] - 1)


def test_perplexity_is_that_of_the_last_tokens_given_all_before_them():
    model, _ = tiny_smollm2.load(torch.float32)
    tokens = torch.randint(256, (1, 96))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0, 95 - 32 : 95]
    expected = math.exp(F.cross_entropy(logits, tokens[0, 64:]).item())
    assert perplexity.perplexity(model, tokens, 32) == pytest.approx(expected, rel=1e-5)


def test_where_the_blocks_cover_the_text_but_one_the_cost_is_small(tiny, capsys):
    """15 of 16 blocks: one is left out by the last tokens alone."""
    words = ["--topk", "15", "--texts", "heapq.py", "--json"]
    (result,) = json.loads(printed(words, capsys))["results"]
    assert abs(result["over_dense"]) < 1e-2


def test_the_table_goes_between_the_comments_that_name_its_data(tiny, capsys, tmp_path):
    kept, page = tmp_path / "data.json", tmp_path / "page.md"
    kept.write_text(printed(["--texts", "heapq.py", "--json"], capsys))
    page.write_text(f"before\n<!-- {kept} -->\n<!-- /{kept} -->\nafter\n")
    printed(["--from", str(kept), "--into", str(page)], capsys)
    table = printed(["--from", str(kept), "--markdown"], capsys).strip()
    assert into_page.between(page.read_text(), str(kept)) == table
    (row,) = [line for line in table.splitlines() if line.startswith("| heapq.py")]
    assert row.split()[3] == "256"
    assert perplexity.parse(["--from", str(kept), "--into"]).into == into_page.PAGE
    text = printed(["--from", str(kept)], capsys)
    assert "block/topk/sinks 16/3/1; perplexity of the last 64 tokens" in text


def test_the_table_of_the_benchmarks_page_is_what_its_data_prints():
    """And that of the README, where it has one."""
    table = perplexity.markdown(perplexity.read([str(ROOT / DATA)]))
    pages = {name: (ROOT / name).read_text() for name in ("README.md", into_page.PAGE)}
    found = {n: into_page.between(p, DATA) for n, p in pages.items() if f"<!-- {DATA} -->" in p}
    assert into_page.PAGE in found
    assert set(found.values()) == {table}


def test_files_of_one_machine_and_policy_are_joined_and_others_are_not(tiny, capsys, tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text(printed(["--texts", "heapq.py", "--json"], capsys))
    other.write_text(printed(["--texts", "shlex.py", "--json"], capsys))
    joined = perplexity.read([str(one), str(other)])
    assert [r.text for r in joined.results] == ["heapq.py", "shlex.py"]
    other.write_text(printed(["--texts", "shlex.py", "--sinks", "0", "--json"], capsys))
    with pytest.raises(ValueError, match=r"other.json is of another machine, version or policy"):
        perplexity.read([str(one), str(other)])


# name, words after `moonfx bench perplexity`, what the error says
REFUSED = [
    ("no such text", ["--texts", "no/such.py"], "no/such.py is no file, here or in the standard"),
    ("nothing to score", ["--last", "0"], "--last must be 1 to less than --length, got 0"),
    ("more than is read", ["--last", "9000"], "--last must be 1 to less than --length"),
    ("dense", ["--length", "1024", "--last", "9"], "up to there it is dense"),
    ("sinks fill topk", ["--topk", "2", "--sinks", "2"], "sinks must be"),
    ("no data", ["--into"], "--into needs --from"),
    ("no such data", ["--from", "/nowhere.json"], "--from must name what"),
]


@pytest.mark.parametrize(
    ("words", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_a_wrong_argument_ends_with_the_usage(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        perplexity.main(words)
    assert says in capsys.readouterr().err


def test_a_text_that_is_too_short_is_an_error_before_anything_is_measured(tiny, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a" * 50)
    with pytest.raises(ValueError, match=r"short.txt has 50 tokens, and must have 65"):
        perplexity.main([*SMALL, "--texts", str(short)])
