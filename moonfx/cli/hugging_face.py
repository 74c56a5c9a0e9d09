"""Builds a Hugging Face model from its type's name alone, for `moonfx explain`: nothing is read
from a network, and of a model too large to fill with numbers the weights are views of one zero.

    "falcon"                       FalconForCausalLM, 2 narrow layers, {"input_ids": [1, 98304]}
    "whisper"                      WhisperModel, {"input_features": .., "decoder_input_ids": ..}
    "meta-llama/Llama-3.1-8B"      UsageError: .. name its model type (llama) ..
"""

import contextlib
import copy
import difflib
import importlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moonfx.cli.tiny_config import Sizes, tiny

# Tables that the input must fit in.
POSITIONS = (
    "max_position_embeddings",
    "max_seq_len",
    "n_positions",
    "n_ctx",
    "context_length",
    "max_target_positions",
)
SPARE = 8  # rows that a table of positions may keep for itself, before those of the tokens
ROOM = 2 << 30  # bytes of a model that are worth filling with random numbers
SHORT = 4096  # tokens, where a model keeps a table of queries by keys

Call = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line that says what can."""


@dataclass(frozen=True)
class Wish:
    """What the user asks of the model to build.

    Args:
        target: a model type, or a folder with a config.json.
        layers: how many to build.
        batch: rows of the input.
        length: tokens of the input.
        may_shorten: whether the length may be cut where the model's tables would not fit.
        attention: "eager" or "sdpa"; None is the model's own choice.
        full: keeps the configuration's own widths.
    """

    target: str
    layers: int
    batch: int
    length: int
    may_shorten: bool = False
    attention: str | None = None
    full: bool = False


def call_of(wish: Wish) -> Call:
    """The model that a wish names, and arguments for it."""
    default = configuration(wish.target)
    first: Exception | None = None
    for config in forms_of(default):
        try:
            model, length = model_of(config, wish)
        except Exception as error:  # noqa: BLE001 - a model's own code may fail in any way
            first = first or error
            continue
        return model, (), inputs_of(model, wish.batch, length)
    assert first is not None
    raise UsageError(f"transformers cannot build {wish.target!r} so: {one_line(first)}") from first


def forms_of(default: Any) -> Iterator[Any]:
    """What to build of a configuration, best first; the others where the library refuses it.

    A model made of several may need packages for pixels or sound, and its decoder not; and some are
    a language model only if they are told that they decode.
    """
    best = text_part(default)
    yield best
    text = default.get_text_config(decoder=True)
    if text is not best:
        yield text
    if getattr(best, "is_decoder", None) is False:
        decoder = copy.deepcopy(best)
        decoder.is_decoder = True
        yield decoder


def model_of(default: Any, wish: Wish) -> tuple[torch.nn.Module, int]:
    """A model, and the length of its input: the wished one, or a short one that its tables fit."""
    transformers = library()
    lengths = [wish.length, SHORT] if wish.may_shorten and wish.length > SHORT else [wish.length]
    for length in lengths:
        config = small(default, wish, length)
        # An encoder-decoder's class for causal language models is its decoder alone.
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        causal &= not config.is_encoder_decoder
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel

        def make(config: Any = config, auto: Any = auto) -> torch.nn.Module:
            return auto.from_config(config, attn_implementation=wish.attention).eval()

        model = built(make, last=length == lengths[-1])
        if model is not None:
            return model, length
    raise AssertionError("the last length is built whatever it takes")


def library() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise UsageError(
            "a model type needs Hugging Face transformers: pip install transformers"
        ) from error
    transformers.logging.set_verbosity_error()
    return transformers


def configuration(target: str) -> Any:
    """The library's own configuration of a model type, or that of a folder."""
    transformers = library()
    known = list(transformers.CONFIG_MAPPING.keys())
    if os.path.isfile(os.path.join(target, "config.json")):
        try:
            return transformers.AutoConfig.from_pretrained(
                target, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise UsageError(f"{target}/config.json is not read: {one_line(error)}") from error
    if target in known:
        try:
            return transformers.CONFIG_MAPPING[target]()
        except Exception as error:
            raise UsageError(
                f"transformers has no sound default of {target!r}: {one_line(error)}"
            ) from error
    if "/" in target:
        raise UsageError(
            f"{target!r} is no folder with a config.json, and nothing is downloaded: name the "
            f"model type{model_type_of(target, known)}, or a folder"
        )
    raise UsageError(
        f"unknown model type {target!r}{nearest(target, known)}; "
        "a model of your own is named module:factory"
    )


def model_type_of(name: str, known: list[str]) -> str:
    """What "meta-llama/Llama-3.1-8B" is likely to be, in brackets: the longest type it starts with.

    Names and types write "gemma-2", "gemma2" and "gpt_neo" as they like, so letters and digits
    alone are compared.
    """
    plain = only_letters(name.rstrip("/").rpartition("/")[2])
    begins = [k for k in known if plain.startswith(only_letters(k))]
    if begins:
        return f" ({max(begins, key=len)})"
    close = difflib.get_close_matches(plain, known, n=3, cutoff=0.4)
    return f" ({', '.join(close)}?)" if close else ""


def only_letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def text_part(config: Any) -> Any:
    """A model that reads text as it is; of one made of several, the part that does."""
    if config.is_encoder_decoder or type(config) in library().MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    text = config.get_text_config(decoder=True)
    return text if hasattr(text, "vocab_size") else config


def small(default: Any, wish: Wish, length: int) -> Any:
    """Few layers of each kind, enough positions and, unless full, narrow layers."""
    sizes = Sizes(
        layers=wish.layers,
        most=wish.layers,
        positions=length,
        window=max(8, length // 8),
    )
    config = tiny(default, sizes, narrow=not wish.full)
    parts = [getattr(config, name, None) for name in type(config).sub_configs]
    for part in [config, *(p for p in parts if p is not None)]:
        if getattr(part, "use_cache", False):
            part.use_cache = False
        if getattr(part, "rope_parameters", None) is None:  # rotary positions need no table
            for name in POSITIONS:
                rows = getattr(part, name, None)
                if isinstance(rows, int) and 0 < rows < length + SPARE:  # -1: without bound
                    setattr(part, name, length + SPARE)
    return config


def built(make: Callable[[], torch.nn.Module], last: bool) -> torch.nn.Module | None:
    """The model, its parameters without memory of their own where they would take too much.

    Buffers keep their values, which proofs rest on (a triangle of True, say).

    Returns:
        None where the buffers alone are too large, unless it is the last try.
    """
    with torch.device("meta"):
        shapes = make()
    tables = sum(b.nbytes for b in shapes.buffers())
    if tables > ROOM and not last:
        return None
    if tables + sum(p.nbytes for p in shapes.parameters()) <= ROOM:
        return make()
    with parameters_without_data():
        model = make()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Views of one zero: real to the tracer, which computes nothing, and of no size.
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=parameter.requires_grad))
    return model


@contextlib.contextmanager
def parameters_without_data() -> Iterator[None]:
    """Every parameter that a module is given is its shape alone, so that none is filled."""
    register = torch.nn.Module.register_parameter

    def without_data(
        module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None
    ) -> None:
        if parameter is not None:
            shape = parameter.detach().to("meta")
            parameter = torch.nn.Parameter(shape, requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = without_data  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def inputs_of(model: torch.nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens [batch, length], int64, and the sound that a decoder of speech listens to."""
    config: Any = model.config
    reads = model.main_input_name
    listens = reads == "input_features" and config.is_encoder_decoder
    listens &= {"max_source_positions", "num_mel_bins"} <= vars(config).keys()
    if reads != "input_ids" and not listens:
        raise UsageError(
            f"{type(model).__name__} reads {reads}, not tokens: "
            "name a module:factory that returns (model, args)"
        )
    vocabulary = int(config.get_text_config().vocab_size)
    tokens = torch.randint(vocabulary, (batch, length))
    if listens:
        sound = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": sound, "decoder_input_ids": tokens}
    names = ["input_ids", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
    return dict.fromkeys(names, tokens)


def nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"; the nearest are {', '.join(close)}" if close else ""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
