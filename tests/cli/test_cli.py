"""The `moonfx` command as a user runs it: what it prints, and its exit status."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moonfx.cli import command as cli
from moonfx.cli import doctor

CHECKOUT = Path(__file__).resolve().parents[2]

# name, words after `moonfx explain`, attention sites found
EXPLAINED = [
    ("llama", ["llama"], 2),
    ("llama, eager", ["llama", "--attention", "eager"], 2),
    ("qwen3, one layer", ["qwen3", "--layers", "1"], 1),
    ("gpt2", ["gpt2"], 2),
    ("llama at its own width", ["llama", "--full"], 2),
]

# Words after `moonfx explain`, attentions made sparse, attentions declined. Between them: tables of
# queries by keys, widths that are never filled, sound, parts that read pixels, three inputs of
# positions, windows, experts, encoders, no bound on
# positions, a part that cannot be built.
ARCHITECTURES = [
    (["falcon"], 2, 0),
    (["falcon", "--full"], 2, 0),
    (["gpt_neo"], 1, 1),
    (["qwen2_vl"], 2, 0),
    (["qwen2_5_vl"], 2, 0),
    (["whisper"], 2, 4),
    (["gemma3"], 1, 1),
    (["gemma3", "--full"], 1, 1),
    (["llava"], 2, 0),
    (["mixtral"], 2, 0),
    (["bart"], 2, 4),
    (["roberta"], 0, 2),
    (["xlnet"], 0, 2),
    (["gemma3n"], 2, 2),
]

# name, words after `moonfx`, what the one line on stderr says
REFUSED = [
    ("misspelt model", ["explain", "lama"], "unknown model type 'lama'; the nearest are llama"),
    ("unlike any model", ["explain", "zzzzzz"], "a model of your own is named module:factory"),
    ("block of no tokens", ["explain", "llama", "--block", "0"], "block must be at least 1"),
    ("no blocks", ["explain", "llama", "--topk", "0"], "topk must be at least 1"),
    ("sinks fill topk", ["explain", "llama", "--topk", "2", "--sinks", "2"], "sinks must be"),
    ("no layers", ["explain", "llama", "--layers", "0"], "--layers must be at least 1, got 0"),
    ("no tokens", ["explain", "llama", "--length", "0"], "--length must be at least 1, got 0"),
    ("id on the hub", ["explain", "meta-llama/Llama-3.1-8B"], "name the model type (llama)"),
    ("id, a digit", ["explain", "google/gemma-2-9b-it"], "name the model type (gemma2)"),
    ("id of nobody", ["explain", "me/q"], "name the model type, or a folder"),
    ("no sdpa form", ["explain", "bloom", "--attention", "sdpa"], "cannot build 'bloom'"),
    ("pixels", ["explain", "vit"], "reads pixel_values, not tokens"),
    ("no such module", ["explain", "no_such_module:f"], "there is no module 'no_such_module'"),
    ("no such factory", ["explain", "own_models:mak"], "no function 'mak'; the nearest are make"),
    ("arguments loose", ["explain", "own_models:loose"], "(model, args) or (model, args, kwargs)"),
    ("not a model", ["explain", "own_models:not_a_model"], "must return a torch.nn.Module"),
]

OWN_MODELS = """
import torch
import torch.nn.functional as F

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
    def forward(self, x, scale=None):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

def make():
    return Attention(), (torch.randn(1, 64, 32),)

def make_with_keywords():
    return Attention(), (torch.randn(1, 64, 32),), {"scale": 0.5}

def loose():
    return Attention(), torch.randn(1, 64, 32)

def not_a_model():
    return 3
"""


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    """A folder with a user's own_models.py, made the current one."""
    (tmp_path / "own_models.py").write_text(OWN_MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield
    sys.modules.pop("own_models", None)


@pytest.mark.parametrize(
    ("words", "sites"), [row[1:] for row in EXPLAINED], ids=[row[0] for row in EXPLAINED]
)
def test_explain_finds_every_layer_of_a_hugging_face_model(words, sites, capsys):
    assert cli.main(["explain", *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [site["action"] for site in report["sites"]] == ["sparse"] * sites
    assert report["savings"]["keys"] == 2 * 4096 * 12


@pytest.mark.parametrize(
    ("words", "sparse", "declined"), ARCHITECTURES, ids=[" ".join(row[0]) for row in ARCHITECTURES]
)
def test_explain_builds_any_kind_of_architecture(words, sparse, declined, capsys):
    assert cli.main(["explain", *words, "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    found = [site["action"] for site in sites]
    assert (found.count("sparse"), found.count("declined")) == (sparse, declined)
    assert len(found) == sparse + declined


def test_explain_prints_the_report_as_text(capsys):
    words = ["explain", "llama", "--block", "16", "--topk", "3", "--length", "128"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("16/3/1") == 2
    assert "model.layers.0.self_attn" in printed
    assert "at N = 128" in printed


@pytest.mark.parametrize("factory", ["make", "make_with_keywords"])
def test_explain_calls_a_factory_of_the_current_folder(factory, own_models, capsys):
    words = ["explain", f"own_models:{factory}", "--block", "8", "--topk", "2", "--json"]
    assert cli.main(words) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 1


@pytest.mark.parametrize(
    ("words", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_a_wrong_argument_is_one_line_and_exit_status_2(words, says, own_models, capsys):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_an_error_inside_a_users_module_keeps_its_traceback(tmp_path, own_models):
    (tmp_path / "half_models.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        cli.main(["explain", "half_models:make"])


@pytest.mark.parametrize("words", [[], ["explain"], ["dance"], ["bench", "dance"]])
def test_an_incomplete_command_shows_the_usage(words, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith("usage: moonfx")


def test_bench_hands_its_words_to_the_benchmark(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "attention", "--help"])
    assert "attention" in capsys.readouterr().out


def test_the_module_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "moonfx", "--help"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("explain", "doctor", "bench"):
        assert command in run.stdout


def test_the_doctor_finds_the_core_working_here(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    assert {c["component"]: c["status"] for c in said["checks"] if c["core"]} == {
        "Python": "ok",
        "torch": "ok",
        "moonfx::moba_attention": "ok",
    }


def test_the_doctor_prints_one_row_per_component(capsys):
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["component", "found", "needed by", "status", "fix"]
    for component in (
        *("torch", "triton", "C++ compiler", "OpenMP", "GPU", "Triton kernels"),
        *("transformers", "onnx"),
    ):
        assert sum(line.startswith(component + " ") for line in lines) == 1
    environment = lines[lines.index("environment:") + 1 :]
    variables = [re.split(r"\W", line.strip())[0] for line in environment]
    assert variables == [
        *("MOONFX_AUTOTUNE", "MOONFX_DUMP", "MOONFX_VERIFY"),
        *("TORCH_LOGS", "TORCH_TRACE"),
    ]


def test_whatever_is_missing_has_exactly_one_fix_and_nothing_else_has():
    for check in doctor.diagnose():
        assert bool(check.fix) == (check.status not in (doctor.OK, doctor.ABSENT)), check
        assert "\n" not in check.fix
        assert "&&" not in check.fix


def test_the_doctor_exits_with_1_when_the_core_is_broken(monkeypatch, capsys):
    monkeypatch.setattr("moonfx.moba_attention", None)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "does not work" in printed
    assert "broken" in printed


@pytest.mark.parametrize(
    ("variable", "fix"), [("PATH", "apt-get install -y g++"), ("CXX", "unset CXX")]
)
def test_a_missing_compiler_is_reported_and_leaves_the_core_working(variable, fix, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, "/no/such/place")
    checks = doctor.check_compiler()
    assert [check.component for check in checks] == ["C++ compiler", "OpenMP"]
    assert {(check.status, check.fix) for check in checks} == {(doctor.MISSING, fix)}
    assert doctor.core_works(checks)


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.10.1", doctor.UNSUPPORTED),
        ("2.11.0", doctor.OK),
        ("2.13.0+cpu", doctor.OK),
        ("2.15.2", doctor.OK),
        ("2.16.0a0+git123", doctor.UNSUPPORTED),
    ],
)
def test_torch_is_supported_from_2_11_to_2_15(version, status):
    assert doctor.check_torch(version).status == status


def test_triton_kernels_are_absent_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = doctor.check_triton_kernels()
    assert (check.found, check.status, check.fix) == ("-", doctor.ABSENT, "")


GPU_KERNELS = [
    # what dispatch finds, what a call gives, and what the doctor says
    ("they run", (object(), None), 1e-6, doctor.OK, "tiles of sm_90, differ"),
    ("they are wrong", (object(), None), 1e-2, doctor.BROKEN, "differ from the reference by 1e-02"),
    ("an old chip", (None, "compute capability 7.5"), 0.0, doctor.BROKEN, "capability 7.5"),
]


@pytest.mark.parametrize(("found", "error", "status", "said"), [x[1:] for x in GPU_KERNELS])
def test_the_doctor_says_how_triton_kernels_do_on_a_gpu(found, error, status, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("moonfx.ops.dispatch.find_triton_kernels", lambda: found)
    monkeypatch.setattr(doctor, "error_on", lambda device: error)
    monkeypatch.setattr("moonfx.kernels.gpu.configs.architecture", lambda: "sm_90")
    check = doctor.check_triton_kernels()
    assert said in check.found
    assert check.status == status
    assert bool(check.fix) == (status != doctor.OK)
    assert not check.core


def test_a_package_that_is_not_installed_is_missing():
    check = doctor.check_package("no_such_package", "nothing")
    assert (check.status, check.fix) == (doctor.MISSING, "pip install no_such_package")
    assert doctor.check_package("torch", "everything").found == torch.__version__


def test_vector_units_are_absent_without_a_fix_on_a_processor_without_them():
    assert [check.status for check in doctor.check_vector_units(set())] == [doctor.ABSENT] * 2
    assert [check.status for check in doctor.check_vector_units({"avx512f", "avx512_bf16"})] == [
        doctor.OK
    ] * 2
