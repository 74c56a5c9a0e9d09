"""moonfx changes how a model that someone else wrote runs, without an edit to its code."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

# In a bare checkout the passes and kernels lie beside this package; installed, they lie inside it.
# Not through __path__: whoever walks this package (TORCH_LOGS does) would find it in itself.
_root = Path(__file__).resolve().parents[1]
if (_root / "passes" / "attention" / "sparsify_attention.py").is_file():
    for _name in ("passes", "kernels"):
        _spec = importlib.machinery.ModuleSpec(f"moonfx.{_name}", None, is_package=True)
        _spec.submodule_search_locations = [str(_root / _name)]
        sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
        globals()[_name] = sys.modules[_spec.name]

from moonfx.model_state import full_attention, restore  # noqa: E402
from moonfx.onnx import export_onnx, onnx_table  # noqa: E402
from moonfx.ops.moba import moba_attention  # noqa: E402
from moonfx.optim.convert import convert_optimizer  # noqa: E402
from moonfx.optim.memory import state_memory  # noqa: E402
from moonfx.optim.muon import Muon  # noqa: E402
from moonfx.optim.qk_clip import QKClip  # noqa: E402
from moonfx.optim.roles.table import roles  # noqa: E402
from moonfx.optim.to_adamw import to_adamw  # noqa: E402
from moonfx.optim.update_rms import update_rms  # noqa: E402
from moonfx.policy import LayerPolicy  # noqa: E402
from moonfx.report.report import Report  # noqa: E402
from moonfx.sparsify import explain, report, sparsify  # noqa: E402

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
