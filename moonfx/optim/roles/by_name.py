"""The role of a parameter by its name and shape alone, for optimizers that came without a model.

Names are compared by whole parts: `multihead_attn.out_proj` holds no part `head`.
"""

import re
from collections.abc import Sequence

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.table import Finding

# What torch.compile, DDP, FSDP and activation checkpointing put between a module and its name.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# `module` is a word that a model may use itself: without the model it is dropped in front only.
_INNER_WRAPPERS = WRAPPERS[:1] + WRAPPERS[2:]
# What peft puts between a module that is trained beside adapters and its name, and before all.
_SAVED, _REPLACED, _OF_PEFT = "modules_to_save", "original_module", ["base_model", "model"]

HEADS = {
    "lm_head", "embed_out", "score", "classifier", "classification_head", "lm_logits",
    "qa_outputs", "seq_relationship", "output_projection", "decoder", "head", "heads",
}  # fmt: skip
HEADS_ON_TOP = {"fc", "output", "output_layer", "logits", "proj_out", "to_logits"}
EMBEDDINGS = {"wte", "shared", "emb", "tok_emb", "vocab"}
POSITIONS = {"wpe", "pos_emb", "pos_enc", "relative_attention_bias", "relative_position_bias_table"}
SCAN = {"A_log", "dt_bias", "D", "time_decay", "time_first"}
WEIGHT_NORM = {"original0", "original1", "weight_g", "weight_v"}
FLAT = {"_flat_param", "flat_param"}

FLATTENED = (
    "a flattened shard (FSDP1 with use_orig_params=False, or DeepSpeed ZeRO): the matrices are gone"
    ", and Muon needs them whole; use FSDP2 (fully_shard) or use_orig_params=True"
)
# Words by which a table of something else than tokens is called.
_NOT_OF_TOKENS = {
    "pos", "position", "positions", "positional", "rel", "relative", "dist", "distance", "bucket",
    "buckets", "type", "segment",
}  # fmt: skip
# A token table is many times longer than wide; a projection of a Transformer is 1:8 at most.
ASPECT_OF_A_TABLE = 16


def unwrapped(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    parts = [part for part in name.split(".") if part not in _INNER_WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def unsaved(path: Sequence[str]) -> list[str]:
    """A module's path without what peft adds: classifier.modules_to_save.<adapter>."""
    parts = list(path[2:] if list(path[:2]) == _OF_PEFT else path)
    while _SAVED in parts:
        at = parts.index(_SAVED)
        del parts[at : at + 2]
    return [part for part in parts if part != _REPLACED]


def by_name(name: str, shape: Sequence[int]) -> Finding | None:
    """What the name says, with the shape; None if it says nothing."""
    *path, own = name.split(".")
    path = unsaved(path)
    parts = [*path, own]
    last = path[-1] if path else own
    if own in FLAT:
        return Finding("vector", FLATTENED)
    if (found := special(parts)) is not None:
        return found
    if re.search(r"(^|_)bias(_|$)", own) and len(shape) < 2:
        return Finding("bias", f"called {own!r}")
    normal = next((p for p in parts if _is_norm(p)), None)
    if len(shape) < 2:
        return Finding("norm gain", f"in {normal!r}") if normal else None
    if patches := next((p for p in parts if is_of_patches(p)), None):
        return Finding("patch embedding", f"called {patches!r}")
    if position := next((p for p in parts if is_position(p)), None):
        return Finding("position embedding", f"called {position!r}")
    if len(shape) == 2 and is_head(path or [own]):
        return Finding("head", f"called {last!r}")
    table = next((p for p in parts if _is_embedding(p)), None)
    if table and len(shape) == 2:
        return Finding("embedding", f"called {table!r}")
    if len(shape) == 3 and any("expert" in p for p in parts):
        return Finding("experts", "three dimensions, in experts", Layout("batch"))
    return None


def special(parts: Sequence[str]) -> Finding | None:
    """Names that mean one thing whatever holds them: LoRA, weight norm, state-space scans."""
    own = parts[-1]
    if lora := next((p for p in parts if _is_lora(p)), None):
        return Finding("LoRA", f"called {lora!r}")
    if "parametrizations" in parts or own in WEIGHT_NORM:
        return Finding("weight norm", f"called {own!r}, from which a parametrization computes")
    if own in SCAN:
        return Finding("scan parameter", f"called {own!r}")
    return None


def _is_lora(part: str) -> bool:
    """Whether one part of a name is that of an adapter of peft: lora_A, vblora_logits_B."""
    kind, underscore, _ = part.lower().partition("_")
    return bool(underscore) and kind.endswith("lora")


def by_shape(shape: Sequence[int]) -> Finding:
    """What the shape alone says."""
    sizes = [n for n in shape if n != 1]
    if len(sizes) < 2:
        return Finding("vector" if len(shape) < 2 else "thin matrix", f"of shape {list(shape)}")
    if len(shape) == 2 and max(shape) > ASPECT_OF_A_TABLE * min(shape):
        why = f"{max(shape) / min(shape):.0f} times longer than wide, as no projection is"
        return Finding("embedding", why)
    if len(shape) == 2:
        return Finding("hidden matrix", "two dimensions, and no name that says otherwise")
    if len(shape) > 3:
        return Finding("convolution", f"{len(shape)} dimensions", Layout("flatten"))
    return Finding("unclear", "three dimensions are experts or a convolution's filters")


def is_head(path: Sequence[str]) -> bool:
    """Whether a module's path is a head's: classifier.2 is judged by `classifier`."""
    named = [p for p in path if not p.isdigit()] or [""]
    return named[-1] in HEADS or (len(named) == 1 and named[-1] in HEADS_ON_TOP)


def is_position(part: str) -> bool:
    """Whether one part of a name speaks of positions: pos_embed, embed_positions, wpe."""
    words = part.lower().split("_")
    table = any(w.startswith("emb") for w in words)
    return part in POSITIONS or (table and any(w.startswith("pos") for w in words))


def is_of_patches(part: str) -> bool:
    """Whether one part of a name speaks of patches that are embedded: to_patch_embedding."""
    words = part.lower().split("_")
    return "patch" in words and any(w.startswith("embed") for w in words)


def is_of_tokens(part: str) -> bool:
    """Whether an embedding of this name may be of tokens, and not of positions or their like."""
    return part not in POSITIONS and _NOT_OF_TOKENS.isdisjoint(part.lower().split("_"))


def _is_embedding(part: str) -> bool:
    return part in EMBEDDINGS or any(w.startswith("embed") for w in part.lower().split("_"))


def _is_norm(part: str) -> bool:
    return "norm" in part.lower() or re.fullmatch(r"(ln|bn)_?\w{0,2}", part) is not None
