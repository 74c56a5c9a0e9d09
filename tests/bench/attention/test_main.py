"""`moonfx bench attention`: what it prints adds up, and what it is given is checked."""

import json
from pathlib import Path

import pytest

from moonfx.bench.attention import contenders, options, table
from moonfx.bench.attention import main as attention
from moonfx.bench.attention.cases import PASSES, SUITES
from moonfx.bench.attention.results import read
from moonfx.bench.harness import into_page, machine
from moonfx.ops.flops import attended_keys
from tests.support.bench_cases import SLOW, SMALL, results_of

ROOT = Path(__file__).resolve().parents[3]
# What `moonfx bench attention --json` wrote; another benchmark's data is named for it.
DATA = sorted(set(ROOT.glob("docs/benchmarks/*.json")) - {ROOT / "docs/benchmarks/perplexity.json"})

# name, words after `moonfx bench attention`, what the error says
REFUSED = [
    ("sinks fill topk", ["--topk", "2", "--sinks", "2"], "sinks must be"),
    ("no tokens", ["--length", "0"], "sizes must be at least 1"),
    ("heads that do not divide", ["--heads", "8", "--kv-heads", "3"], "a multiple of --kv-heads"),
    ("unknown dtype", ["--dtype", "float64"], "invalid choice: 'float64'"),
    ("no turn", ["--repeats", "0"], "--repeats must be at least 1"),
    ("a size beside a suite", ["--suite", "cpu", "--heads", "4"], "cannot be given with --suite"),
    ("a length that a suite has not", ["--suite", "cpu", "--length", "7"], "has no such case"),
    ("more queries than keys", ["--queries", "300", "--length", "256"], "--queries must be 1 to"),
    ("no such file", ["--from", "/nowhere.json"], "--from must name what"),
]


def test_each_dtype_and_pass_is_one_result_with_its_own_times(capsys):
    said = results_of([], capsys)
    cases = [(r["case"]["dtype"], r["case"]["work"]) for r in said["results"]]
    assert cases == [(dtype, work) for dtype in ("float32", "bfloat16") for work in PASSES]
    for result in said["results"]:
        seconds = result["seconds"]
        assert [len(turns) for turns in seconds.values()] == [1, 1]
        assert result["speedup"] == pytest.approx(seconds["dense"][0] / seconds["moonfx"][0])
        assert result["baseline"] in contenders.BASELINES
    assert {"hardware", "versions", "kernel", "threads", "ceilings"} <= said["where"].keys()


def test_the_ideal_is_the_share_of_key_tokens_that_the_policy_skips(capsys):
    said = results_of(["--dtype", "float32", "--work", "forward"], capsys)
    (result,) = said["results"]
    dense = 256 * 257 // 2
    assert result["flop_ideal"] == pytest.approx(dense / attended_keys(256, 256, 32, 2))
    assert result["flop_share"] == pytest.approx(result["speedup"] / result["flop_ideal"])
    # Read q, k and v, write out and the softmax's denominators: 8, 2, 2, 8 heads of 16; 8.
    floor = 256 * 4 * (20 * 16 + 8) / SLOW.copy
    assert result["byte_floor"] == pytest.approx(floor)
    assert result["byte_ideal"] == pytest.approx(result["seconds"]["dense"][0] / floor)


def test_a_case_larger_than_the_memory_is_left_out_with_a_line_that_says_so(monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1 << 20)
    assert attention.main([*SMALL, "--dtype", "float32", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "no case fits this machine" in printed
    assert printed.count("left out: batch 1, heads 8/2, queries 256") == len(PASSES)


def test_quick_changes_defaults_only_and_the_table_names_its_columns(capsys):
    words = ["--quick", *SMALL, "--dtype", "float32", "--device", "cpu"]
    assert attention.main(words) == 0
    printed = capsys.readouterr().out
    assert "batch 1, heads 8/2, block/topk/sinks 32/2/0, queries N" in printed
    for column in (*table.TIMES, *table.ROOFS, *table.MEMORY):
        assert column.title in printed
    assert "lowest share of the FLOP-ideal speedup, forward+backward:" in printed


def test_what_json_writes_prints_the_same_table_again_and_files_are_joined(capsys, tmp_path):
    kept = tmp_path / "data.json"
    said = results_of(["--dtype", "float32"], capsys)
    kept.write_text(json.dumps(said))
    run = read([str(kept)])
    assert json.loads(run.to_json()) == said
    assert attention.main(["--from", str(kept)]) == 0
    assert capsys.readouterr().out.strip() == table.text(run)
    assert attention.main(["--from", str(kept), str(kept), "--markdown"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 256 ")]
    assert len(rows) == 4
    assert rows[:2] == rows[2:]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(said | {"where": said["where"] | {"turns": "best of 9"}}))
    joined = read([str(kept), str(other), str(kept)])
    assert joined.where["turns"] == f"{said['where']['turns']} or best of 9"


def test_a_table_is_put_between_the_comments_that_name_its_data(capsys, tmp_path):
    kept, document = tmp_path / "data.json", tmp_path / "page.md"
    kept.write_text(json.dumps(results_of(["--dtype", "float32"], capsys)))
    comments = f"<!-- {kept} -->", f"<!-- /{kept} -->"
    document.write_text(f"before\n{comments[0]}\nold\n{comments[1]}\nafter\n")
    for _ in range(2):
        assert attention.main(["--from", str(kept), "--into", str(document)]) == 0
        table_of = table.markdown(read([str(kept)]))
        assert into_page.between(document.read_text(), str(kept)) == table_of
        assert document.read_text() == (
            f"before\n{comments[0]}\n{table_of}\n{comments[1]}\nafter\n"
        )
    document.write_text("no comments")
    with pytest.raises(ValueError, match="once each"):
        attention.main(["--from", str(kept), "--into", str(document)])


@pytest.mark.parametrize("data", DATA, ids=lambda path: path.name)
def test_a_table_of_the_benchmarks_page_is_what_its_data_prints(data):
    page = (ROOT / into_page.PAGE).read_text()
    assert into_page.between(page, str(data.relative_to(ROOT))) == table.markdown(read([str(data)]))


def test_a_table_goes_into_the_benchmarks_page_unless_another_is_named():
    words = ["--from", str(DATA[0]), "--into"]
    assert options.parse(words, "").into == "docs/benchmarks.md"
    assert options.parse([*words, "other.md"], "").into == "other.md"
    assert options.parse(words[:2], "").into is None


def test_files_of_two_machines_are_not_joined(capsys, tmp_path):
    said = results_of(["--dtype", "float32", "--work", "forward"], capsys)
    for name in ("one", "two"):
        said["where"]["hardware"] = name
        (tmp_path / name).write_text(json.dumps(said))
    with pytest.raises(SystemExit, match="2"):
        attention.main(["--from", str(tmp_path / "one"), str(tmp_path / "two")])
    assert "other hardware: two" in capsys.readouterr().err


def test_a_plot_has_a_line_and_its_ideal_for_each_shape(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    results_of(["--plot", str(picture)], capsys)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        attention.main([*SMALL, "--plot", "out.png"])
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_a_wrong_argument_ends_with_the_usage(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        attention.main(words)
    assert says in capsys.readouterr().err


# name, cases, the first's shape, and the last's
SUITE_TABLE = [
    ("cpu", 32, (1, 8, 2, 16384, 64, "float32", 512, 3, 1), (1, 8, 2, 16384, 128, "bfloat16",
                                                           128, 8, 1)),
    ("flashmoba", 14, (2, 16, 16, 8192, 128, "bfloat16", 128, 8, 0),
     (2, 16, 16, 524288, 128, "bfloat16", 128, 8, 0)),
    ("paper", 12, (1, 32, 8, 32768, 128, "bfloat16", 4096, 12, 0),
     (1, 32, 8, 1048576, 128, "bfloat16", 4096, 12, 0)),
    ("decode", 16, (1, 32, 8, 32768, 128, "bfloat16", 128, 16, 1),
     (256, 32, 8, 32768, 128, "bfloat16", 128, 16, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "count", "first", "last"), SUITE_TABLE)
def test_a_suite_has_the_shapes_that_it_is_named_for(name, count, first, last):
    cases = list(SUITES[name]())
    assert len(set(cases)) == count
    for case, shape in ((cases[0], first), (cases[-1], last)):
        assert shape == (
            *(case.batch, case.heads, case.kv_heads, case.length, case.dim, case.dtype),
            *(case.block, case.topk, case.sinks),
        )
