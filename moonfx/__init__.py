"""moonfx changes how a model that someone else wrote runs, without an edit to its code.

Importing it registers its operators, which torch.export.load needs, and adds little to the time
that torch takes: what a name needs is imported when the name is first read.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a bare checkout the passes and kernels lie beside this package; installed, they lie inside it.
# Not through __path__: whoever walks this package (TORCH_LOGS does) would find it in itself.
_root = Path(__file__).resolve().parents[1]
if (_root / "passes" / "attention" / "sparsify_attention.py").is_file():
    for _name in ("passes", "kernels"):
        _spec = importlib.machinery.ModuleSpec(f"moonfx.{_name}", None, is_package=True)
        _spec.submodule_search_locations = [str(_root / _name)]
        sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
        globals()[_name] = sys.modules[_spec.name]

# `sparsify` and `report` are modules here as well as functions. Their modules are imported now, so
# that no later import puts a module in a function's place.
from moonfx.ops.moba import moba_attention  # noqa: E402  (registers the operators)
from moonfx.policy import LayerPolicy  # noqa: E402
from moonfx.report.report import Report  # noqa: E402
from moonfx.sparsify import explain, report, sparsify  # noqa: E402

if TYPE_CHECKING:
    from moonfx.model_state import full_attention, restore
    from moonfx.onnx import export_onnx, onnx_table
    from moonfx.optim.convert import convert_optimizer
    from moonfx.optim.memory import state_memory
    from moonfx.optim.muon import Muon
    from moonfx.optim.qk_clip import QKClip
    from moonfx.optim.roles.table import roles
    from moonfx.optim.to_adamw import to_adamw
    from moonfx.optim.update_rms import update_rms

__version__ = "0.1.0"

__all__ = [
    "LayerPolicy",
    "Muon",
    "QKClip",
    "Report",
    "convert_optimizer",
    "explain",
    "export_onnx",
    "full_attention",
    "moba_attention",
    "onnx_table",
    "report",
    "restore",
    "roles",
    "sparsify",
    "state_memory",
    "to_adamw",
    "update_rms",
]

# The names above that are imported when they are first read -> their modules.
_LATER = {
    "Muon": "moonfx.optim.muon",
    "QKClip": "moonfx.optim.qk_clip",
    "convert_optimizer": "moonfx.optim.convert",
    "export_onnx": "moonfx.onnx",
    "full_attention": "moonfx.model_state",
    "onnx_table": "moonfx.onnx",
    "restore": "moonfx.model_state",
    "roles": "moonfx.optim.roles.table",
    "state_memory": "moonfx.optim.memory",
    "to_adamw": "moonfx.optim.to_adamw",
    "update_rms": "moonfx.optim.update_rms",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
        return globals()[name]
    if name == "optim":  # with all that a conversion imports: moonfx.optim.matrices.Layout
        importlib.import_module("moonfx.optim.convert")
        return sys.modules["moonfx.optim"]
    raise AttributeError(f"module 'moonfx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
