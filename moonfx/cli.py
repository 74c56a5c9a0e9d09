"""The `moonfx` command: explain a model, benchmark, look at this machine."""

import argparse
import difflib
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import moonfx
from moonfx import doctor
from moonfx.policy import check_block_topk_sinks
from moonfx.tiny_config import Sizes, tiny

# Tables that the input must fit in.
POSITIONS = (
    "max_position_embeddings",
    "max_seq_len",
    "n_positions",
    "n_ctx",
    "context_length",
    "max_target_positions",
)
ROOM = 2 << 30  # bytes of a model that are worth filling with random numbers

BENCHMARKS = {
    "attention": "moonfx.bench.attention",
    "compile": "moonfx.bench.compile_time",
    "passes": "moonfx.bench.passes",
}

Call = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line that says what can."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after `moonfx`; None reads them from the process.

    Returns:
        The exit status: 0 done, 1 `doctor` found the core broken, 2 a wrong argument.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"] and words[1:2] and words[1] in BENCHMARKS:
        # A benchmark has a parser, and a --help, of its own.
        return int(importlib.import_module(BENCHMARKS[words[1]]).main(words[2:]) or 0)
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
  MOONFX_DUMP=DIR       writes each graph before and after each pass into DIR, as Python
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

    look = commands.add_parser("doctor", help="what each feature needs, and whether it is here")
    look.set_defaults(run=run_doctor)
    look.add_argument("--json", action="store_true", help="print JSON")

    bench = commands.add_parser("bench", help="the benchmarks; `moonfx bench attention --help`")
    bench.add_argument(
        "what",
        choices=BENCHMARKS,
        help="attention: sparse against dense; compile: what sparsify adds to torch.compile; "
        "passes: what the retrace and the passes add to Dynamo's capture",
    )
    return top


def run_doctor(options: argparse.Namespace) -> int:
    checks = list(tqdm(doctor.diagnose(), unit="check", leave=False, disable=None))
    works = doctor.core_works(checks)
    if options.json:
        print(json.dumps({"ok": works, "checks": [check.to_dict() for check in checks]}, indent=2))
    else:
        rows = [(c.component, c.found, c.needed_by, c.status, c.fix or "-") for c in checks]
        print(tabulate(rows, ["component", "found", "needed by", "status", "fix"]))
        print(f"\nmoonfx {'works' if works else 'does not work'} on this machine.")
    return 0 if works else 1


def run_explain(options: argparse.Namespace) -> int:
    settings = {"block": options.block, "topk": options.topk, "sinks": options.sinks}
    try:
        check_block_topk_sinks(**settings)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if options.length is None:  # nothing is computed, so a length that shows the savings is free
        options.length = 2 * options.block * options.topk
    for name in ("length", "batch", "layers"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(options, name)}")
    model, args, kwargs = load(options)
    try:
        report = moonfx.explain(model, *args, **settings, **kwargs)
    except Exception as error:
        if ":" in options.target:  # the user's own code: theirs to see whole
            raise
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"transformers' {type(model).__name__} does not run so: {reason}"
        ) from error
    print(report.to_json() if options.json else report)
    return 0


def load(options: argparse.Namespace) -> Call:
    """Builds what TARGET names."""
    target: str = options.target
    if ":" in target:
        return from_factory(target, options)
    return hugging_face_call(hugging_face_config(target, options), options)


def from_factory(target: str, options: argparse.Namespace) -> Call:
    """Calls `module:factory`; the module may lie in the current folder."""
    module_name, _, name = target.partition(":")
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
            f"{target}() must return a torch.nn.Module, (model, args) or (model, args, kwargs), "
            f"got {type(made).__name__}"
        )
    if not args and not kwargs and hasattr(model, "main_input_name"):
        return model, (), hugging_face_inputs(model, options, torch.device("cpu"))
    return model, tuple(args), dict(kwargs)


def hugging_face_config(target: str, options: argparse.Namespace) -> Any:
    """The library's own configuration of a model type, or that of a folder, with few layers."""
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise UsageError(
            "a model type needs Hugging Face transformers: pip install transformers"
        ) from error
    transformers.logging.set_verbosity_error()
    known = list(transformers.CONFIG_MAPPING.keys())
    if os.path.isfile(os.path.join(target, "config.json")):
        default = transformers.AutoConfig.from_pretrained(target, local_files_only=True)
    elif target in known:
        default = transformers.CONFIG_MAPPING[target]()
    else:
        raise UsageError(
            f"unknown model type {target!r}{nearest(target, known)}; "
            "a model of your own is named module:factory"
        )
    try:
        return small(text_part(default), options)
    except Exception as error:  # each validator of the library has a type of its own
        raise cannot_build(target, error) from error


def text_part(config: Any) -> Any:
    """A model that reads text as it is; of one made of several, the part that does."""
    transformers = importlib.import_module("transformers")
    if config.is_encoder_decoder or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    text = config.get_text_config(decoder=True)
    return text if hasattr(text, "vocab_size") else config


def small(default: Any, options: argparse.Namespace) -> Any:
    """Few layers of each kind, enough positions and, unless full, narrow layers."""
    sizes = Sizes(
        layers=options.layers,
        most=options.layers,
        positions=options.length,
        window=max(8, options.length // 8),
    )
    config = tiny(default, sizes, narrow=not options.full)
    if getattr(config, "rope_parameters", None) is None:  # rotary positions need no table
        for name in POSITIONS:
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, max(options.length, getattr(config, name)))
    return config


def hugging_face_call(config: Any, options: argparse.Namespace) -> Call:
    transformers = importlib.import_module("transformers")
    if getattr(config, "use_cache", False):
        config.use_cache = False
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    causal &= not config.is_encoder_decoder
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    try:
        with torch.device("meta"):
            model = auto.from_config(config, attn_implementation=options.attention).eval()
        tensors = [*model.parameters(), *model.buffers()]
        # Large ones stay without data: numbers that nobody reads are not worth minutes to fill in.
        device = torch.device("cpu" if sum(t.nbytes for t in tensors) <= ROOM else "meta")
        if device.type == "cpu":
            model = auto.from_config(config, attn_implementation=options.attention).eval()
    except Exception as error:  # a model's own code may fail in any way
        raise cannot_build(options.target, error) from error
    return model, (), hugging_face_inputs(model, options, device)


def hugging_face_inputs(
    model: torch.nn.Module, options: argparse.Namespace, device: torch.device
) -> dict[str, torch.Tensor]:
    """Random tokens [batch, length], int64."""
    config: Any = model.config
    if model.main_input_name != "input_ids":
        raise UsageError(
            f"{type(model).__name__} reads {model.main_input_name}, not tokens: "
            "name a module:factory that returns (model, args)"
        )
    vocabulary = int(config.get_text_config().vocab_size)
    tokens = torch.randint(vocabulary, (options.batch, options.length), device=device)
    names = ["input_ids", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
    return dict.fromkeys(names, tokens)


def cannot_build(target: str, error: Exception) -> UsageError:
    """The library's reason, such as an attention form that the model does not have."""
    reason = " ".join(str(error).split())
    return UsageError(f"transformers cannot build {target!r} so: {reason}")


def nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"; the nearest are {', '.join(close)}" if close else ""


if __name__ == "__main__":
    sys.exit(main())
