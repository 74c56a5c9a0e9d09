"""The `moonfx` command: explain a model, benchmark, look at this machine."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence

import torch
from tabulate import tabulate
from tqdm import tqdm

import moonfx
from moonfx.cli import doctor
from moonfx.cli.hugging_face import Call, UsageError, Wish, call_of, inputs_of, nearest, one_line
from moonfx.policy import check_block_topk_sinks

# Name -> its module, and what `moonfx bench --help` says of it.
BENCHMARKS = {
    "attention": ("moonfx.bench.attention.main", "sparse against dense"),
    "compile": ("moonfx.bench.models.compile_time", "what sparsify adds to torch.compile"),
    "model": ("moonfx.bench.models.model", "a real model reads and trains"),
    "newton-schulz": ("moonfx.bench.optimizers.newton_schulz", "the operator against the loop"),
    "optimizer": ("moonfx.bench.optimizers.optimizer", "a step of Muon, eager and compiled"),
    "passes": ("moonfx.bench.models.passes", "what capture and the passes take"),
    "perplexity": ("moonfx.bench.models.perplexity", "what sparsity costs without training"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after `moonfx`; None reads them from the process.

    Returns:
        The exit status: 0 done, 1 `doctor` found the core broken or a benchmark's verdict is a
        failure, 2 a wrong argument.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"] and words[1:2] and words[1] in BENCHMARKS:
        # A benchmark has a parser, and a --help, of its own.
        module = importlib.import_module(BENCHMARKS[words[1]][0])
        return int(module.main(words[2:]) or 0)
    try:
        options = parser().parse_args(words)
    except SystemExit as leave:  # argparse has printed the help or the error
        return int(leave.code or 0)
    try:
        return int(options.run(options))
    except UsageError as error:
        print(f"moonfx {options.command}: {error}", file=sys.stderr)
        return 2


# What the environment changes, for `moonfx --help` and `moonfx doctor`.
ENVIRONMENT = """environment:
  MOONFX_AUTOTUNE=1     GPU kernels measure their tiles at the first call of a shape class
  MOONFX_DUMP=DIR       writes each graph before and after each pass, and its .diff, into DIR
  MOONFX_VERIFY=1       checks each graph after each pass; a pass that fails raises
  TORCH_LOGS=moonfx     says what became of each attention; +moonfx also what each pass did
  TORCH_TRACE=DIR       adds the graphs of MOONFX_DUMP to torch's own traces, for tlparse
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="moonfx",
        description=__doc__,
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    explain = commands.add_parser(
        "explain",
        help="what sparsify would do to a model, layer by layer; nothing is changed",
    )
    explain.set_defaults(run=run_explain)
    add_explain(explain)

    look = commands.add_parser("doctor", help="what each feature needs, and whether it is here")
    look.set_defaults(run=run_doctor)
    look.add_argument("--json", action="store_true", help="print JSON")

    bench = commands.add_parser(
        "bench",
        help="the benchmarks; `moonfx bench attention --help`",
        epilog="benchmarks:\n"
        + "".join(f"  {name:<15}{what}\n" for name, (_, what) in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("what", choices=BENCHMARKS, metavar="BENCHMARK", help="one of these")
    return top


def add_explain(explain: argparse.ArgumentParser) -> None:
    """The arguments of `moonfx explain`."""
    explain.add_argument(
        "target",
        metavar="TARGET",
        help="a Hugging Face model type (llama, qwen3, gpt2, ...), a folder with a config.json, or "
        "module:factory, where factory() returns a model, (model, args) or (model, args, kwargs)",
    )
    model = explain.add_argument_group("Hugging Face models")
    for group, name, default, help_text in (
        (explain, "--block", 4096, "tokens per block"),
        (explain, "--topk", 12, "blocks that a query attends"),
        (explain, "--sinks", 1, "first blocks that are always attended"),
        (model, "--batch", 1, "rows of the traced input"),
        (model, "--layers", 2, "layers to build"),
    ):
        group.add_argument(name, type=int, default=default, help=f"{help_text} (%(default)s)")
    model.add_argument(
        "--length", type=int, help="tokens of the traced input (twice what block * topk covers)"
    )
    model.add_argument(
        "--attention", choices=["eager", "sdpa"], help="code path (the model's own choice)"
    )
    model.add_argument(
        "--full",
        action="store_true",
        help="keep the configuration's own widths (without data) instead of narrow ones",
    )
    explain.add_argument("--json", action="store_true", help="print JSON")


def run_doctor(options: argparse.Namespace) -> int:
    checks = list(tqdm(doctor.diagnose(), unit="check", leave=False, disable=None))
    works = doctor.core_works(checks)
    if options.json:
        print(json.dumps({"ok": works, "checks": [check.to_dict() for check in checks]}, indent=2))
    else:
        rows = [(c.component, c.found, c.needed_by, c.status, c.fix or "-") for c in checks]
        print(tabulate(rows, ["component", "found", "needed by", "status", "fix"]))
        print(f"\nmoonfx {'works' if works else 'does not work'} on this machine.\n")
        print(ENVIRONMENT, end="")
    return 0 if works else 1


def run_explain(options: argparse.Namespace) -> int:
    settings = {"block": options.block, "topk": options.topk, "sinks": options.sinks}
    try:
        check_block_topk_sinks(**settings)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    # Nothing is computed, so a length that shows the savings is free.
    length = 2 * options.block * options.topk if options.length is None else options.length
    for name, value in (("length", length), ("batch", options.batch), ("layers", options.layers)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    model, args, kwargs = load(
        Wish(
            target=options.target,
            layers=options.layers,
            batch=options.batch,
            length=length,
            may_shorten=options.length is None,
            attention=options.attention,
            full=options.full,
        )
    )
    try:
        report = moonfx.explain(model, *args, **settings, **kwargs)
    except Exception as error:
        if ":" in options.target:  # the user's own code: theirs to see whole
            raise
        raise UsageError(
            f"transformers' {type(model).__name__} does not run so: {one_line(error)}"
        ) from error
    print(report.to_json() if options.json else report)
    return 0


def load(wish: Wish) -> Call:
    """Builds what TARGET names."""
    return from_factory(wish) if ":" in wish.target else call_of(wish)


def from_factory(wish: Wish) -> Call:
    """Calls `module:factory`; the module may lie in the current folder."""
    module_name, _, name = wish.target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is the user's to see whole.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"there is no module {error.name!r} here or installed") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        known = sorted(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
        raise UsageError(f"{module_name} has no function {name!r}{nearest(name, known)}")
    made = factory()
    match made:
        case (model, args, kwargs):
            pass
        case (model, args):
            kwargs = {}
        case model:
            args, kwargs = (), {}
    if not (
        isinstance(model, torch.nn.Module)
        and isinstance(args, (tuple, list))
        and isinstance(kwargs, Mapping)
    ):
        raise UsageError(
            f"{wish.target}() must return a torch.nn.Module, (model, args) or "
            f"(model, args, kwargs), got {type(made).__name__}"
        )
    if not args and not kwargs and hasattr(model, "main_input_name"):
        return model, (), inputs_of(model, wish.batch, wish.length)
    return model, tuple(args), dict(kwargs)


if __name__ == "__main__":
    sys.exit(main())
