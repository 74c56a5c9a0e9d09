"""The role of a parameter by the types of the modules that hold it.

    nn.Linear.weight                    hidden matrix, or head by what else is known of it
    nn.MultiheadAttention.in_proj_weight    fused projection: q, k, v are blocks of rows
    nn.LSTM.weight_ih_l0                fused projection: a block of rows per gate
    Conv2d(3, ...), groups == channels  first and depthwise convolutions

Where a Linear's output is split is not in its type: only a trace proves a fused projection of the
user's own. What a tied parameter is depends on all of its sites together.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.by_name import (
    by_name,
    is_head,
    is_of_patches,
    is_of_tokens,
    is_position,
    special,
)
from moonfx.optim.roles.parameter_sites import ParameterSite
from moonfx.optim.roles.table import Finding

ModuleRule = Callable[["Modules", ParameterSite, Tensor], Finding | None]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3, nn.RNN: 1, nn.RNNCell: 1}
# Names of a Linear whose output is split as a rule, which nothing proves without a trace.
_SPLIT_AS_A_RULE = {
    "qkv", "qkv_proj", "Wqkv", "to_qkv", "query_key_value", "c_attn", "in_proj", "gate_up_proj",
    "kv", "kv_proj", "to_kv",
}  # fmt: skip


class Modules:
    """What the modules of one model say of its parameters.

    Args:
        model: inside its wrappers.
        sites: where each parameter lies, by id.
    """

    def __init__(self, model: nn.Module, sites: dict[int, list[ParameterSite]]) -> None:
        self.sites = sites
        every = [site for places in sites.values() for site in places]
        self.outputs = _by_accessor(model, "get_output_embeddings")
        self.inputs = _by_accessor(model, "get_input_embeddings")
        linears = list(dict.fromkeys(s.module for s in every if is_linear(s.module)))
        # It is judged by its width where nothing else is known to give the logits.
        known = bool(self.outputs) or any(map(_is_tied, sites.values()))
        self.last_linear = linears[-1] if linears and not known else None
        tables = [s for s in every if isinstance(s.module, nn.Embedding)]
        given = self.inputs
        tokens = [s for s in tables if id(s.module) in given or is_of_tokens("".join(s.path[-1:]))]
        self.vocabularies = {s.module.num_embeddings for s in tokens}
        convolutions = (m for m in model.modules() if isinstance(m, _CONVOLUTIONS))
        self.first_convolution = next(convolutions, None)

    def of(self, parameter: Tensor) -> Finding:
        """What a parameter's sites say together."""
        places = self.sites[id(parameter)]
        found = [(site, self._at(site, parameter)) for site in places]
        roles = {finding.role for _, finding in found}
        if len({id(site.module) for site in places}) > 1:
            names = " and ".join(dict.fromkeys(".".join(site.path) for site in places))
            if "embedding" in roles and len(roles) > 1:
                return Finding("tied head", f"one parameter of {names}")
            if "head" in roles:
                return Finding("head", f"one parameter of {names}")
        return found[0][1]

    def _at(self, site: ParameterSite, parameter: Tensor) -> Finding:
        found = special([*site.path, site.own])
        for rule in _RULES if found is None else ():
            if (found := rule(self, site, parameter)) is not None:
                break
        assert found is not None
        sizes = [n for n in parameter.shape if n != 1]
        if found.role in _MATRICES and len(sizes) < 2:
            return Finding("thin matrix", f"{found.why}, of shape {list(parameter.shape)}")
        return found


_MATRICES = ("hidden matrix", "fused projection", "router", "convolution", "first convolution")


def _by_accessor(model: nn.Module, name: str) -> set[int]:
    """ids of the modules that Hugging Face's accessor gives, of each model inside the model."""
    found: set[int] = set()
    for module in model.modules():
        accessor = getattr(module, name, None)
        try:
            given = accessor() if callable(accessor) else None
        except (AttributeError, NotImplementedError, TypeError):
            continue  # the library's way to say that this model has none
        if isinstance(given, nn.Module):
            found.add(id(given))
    return found


def _is_tied(places: Sequence[ParameterSite]) -> bool:
    """Whether a parameter is both an embedding and what a Linear multiplies by."""
    table = any(isinstance(site.module, nn.Embedding) for site in places)
    return table and any(is_linear(site.module) for site in places)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is x W^T + b or, as Hugging Face's Conv1D, x W + b."""
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    named = type(module).__name__
    alike = named == "Conv1D" or named.endswith("Linear")
    return alike and isinstance(weight, Tensor) and weight.ndim == 2


def _embedding(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding | None:
    given = id(site.module) in known.inputs and parameter.ndim == 2
    if not given and not isinstance(site.module, nn.Embedding | nn.EmbeddingBag):
        return None
    if id(site.module) in known.outputs:
        return Finding("tied head", "the model's get_output_embeddings() is its embedding")
    if any(map(is_position, site.path[-1:])):
        return Finding("position embedding", f"an {_type(site)} called {site.path[-1]!r}")
    return Finding("embedding", f"an {_type(site)}")


def _norm(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding | None:
    named = type(site.module).__name__
    if "Norm" not in named or parameter.ndim > 1 or isinstance(site.module, nn.ModuleList):
        return None
    return Finding("bias" if "bias" in site.own else "norm gain", f"of a {named}")


def _bias(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding | None:
    of_attention = isinstance(site.module, nn.MultiheadAttention) and parameter.ndim == 3
    if "bias" not in site.own or (parameter.ndim > 1 and not of_attention):
        return None
    return Finding("bias", f"{site.own!r} of a {_type(site)}")


def _head(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding | None:
    if parameter.ndim != 2 or not is_linear(site.module):
        return None
    if id(site.module) in known.outputs:
        return Finding("head", "what the model's get_output_embeddings() gives")
    if is_head(site.path) and not _followed(site):
        return Finding("head", f"a {_type(site)} called {'.'.join(site.path[-2:])!r}")
    wide = parameter.shape[0] if isinstance(site.module, nn.Linear) else parameter.shape[1]
    if site.module is known.last_linear and wide in known.vocabularies:
        return Finding("head", "the model's last Linear, as wide as its vocabulary")
    return None


def _followed(site: ParameterSite) -> bool:
    """Whether a later Linear follows in the same container, as in classifier.0, .1, .2."""
    children = [] if site.parent is None else list(site.parent.children())
    if not site.path[-1].isdigit() or site.module not in children:
        return False
    return any(map(is_linear, children[children.index(site.module) + 1 :]))


def _router(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding | None:
    if parameter.ndim != 2 or site.own != "weight":
        return None
    named = type(site.module).__name__
    if "Router" in named or "router" in site.path[-1:]:
        return Finding("router", f"a {named} called {'.'.join(site.path[-1:])!r}")
    beside = getattr(site.parent, "experts", None)
    if site.path[-1:] in (["gate"], ["wg"]) and isinstance(beside, nn.Module):
        return Finding("router", f"a {named} called {site.path[-1]!r} beside experts")
    return None


def _attention(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding | None:
    if not isinstance(site.module, nn.MultiheadAttention) or parameter.ndim != 2:
        return None
    if site.own != "in_proj_weight":
        return Finding("hidden matrix", f"{site.own!r} of a MultiheadAttention")
    width = site.module.embed_dim
    why = "queries, keys and values of a MultiheadAttention"
    return Finding("fused projection", why, Layout(sizes=(width, width, width)))


def _recurrent(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding | None:
    gates = next((n for kind, n in _GATES.items() if isinstance(site.module, kind)), None)
    if gates is None or parameter.ndim != 2:
        return None
    if gates == 1 or "weight_hr" in site.own:
        return Finding("hidden matrix", f"{site.own!r} of a {_type(site)}")
    sizes = (parameter.shape[0] // gates,) * gates
    return Finding("fused projection", f"the {gates} gates of a {_type(site)}", Layout(sizes=sizes))


def _convolution(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding | None:
    module: Any = site.module
    if not isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)) or site.own != "weight":
        return None
    if module.groups > 1 and module.groups == module.in_channels:
        return Finding("depthwise convolution", f"groups == channels == {module.groups}")
    if module is known.first_convolution:
        return Finding("first convolution", f"the first {_type(site)} of the model")
    if min(parameter.shape[0] // module.groups, parameter[0].numel()) < 2:
        return Finding("thin matrix", f"a {_type(site)} of shape {list(parameter.shape)}")
    return Finding("convolution", f"a {_type(site)}", Layout("flatten", outer=module.groups))


def _linear(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding | None:
    if parameter.ndim != 2 or not is_linear(site.module):
        return None
    if patches := next((part for part in site.path if is_of_patches(part)), None):
        return Finding("patch embedding", f"a {_type(site)} in {patches!r}")
    if site.path and site.path[-1] in _SPLIT_AS_A_RULE:
        why = f"a {_type(site)} called {site.path[-1]!r}, kept whole: no trace shows a split"
        return Finding("hidden matrix", why)
    return Finding("hidden matrix", f"a {_type(site)}")


def _experts(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding | None:
    named = f"{type(site.module).__name__} {'.'.join(site.path[-1:])}"
    if parameter.ndim != 3 or "expert" not in named.lower():
        return None
    return Finding("experts", f"three dimensions, in {type(site.module).__name__}", Layout("batch"))


def _by_its_name(known: Modules, site: ParameterSite, parameter: Tensor) -> Finding:
    """The last rule: a parameter of a module of the user's own."""
    if (found := by_name(site.name, parameter.shape)) is not None:
        return found._replace(why=f"{found.why}, in {_type(site)}")
    if len([n for n in parameter.shape if n != 1]) < 2:
        kind = "vector" if parameter.ndim != 2 else "thin matrix"
        return Finding(kind, f"{site.own!r} of {_type(site)}")
    why = f"{site.own!r} of {_type(site)}, a type that says nothing; example= would show its use"
    return Finding("unclear", why)


def _type(site: ParameterSite) -> str:
    return type(site.module).__name__


_RULES: Sequence[ModuleRule] = (
    _embedding,
    _norm,
    _bias,
    _head,
    _router,
    _attention,
    _recurrent,
    _convolution,
    _linear,
    _experts,
    _by_its_name,
)
