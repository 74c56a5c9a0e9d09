"""FLOP formulas of operators, for torch.utils.flop_counter.

That module imports Triton, and nobody reads a formula before it is imported: formulas are kept
here and handed over as the last thing that its import does.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

Formula = TypeVar("Formula", bound=Callable[..., int])

COUNTER = "torch.utils.flop_counter"
_formulas: list[tuple[Any, bool, Callable[..., int]]] = []


def register_flop_formula(operator: Any, get_raw: bool = False) -> Callable[[Formula], Formula]:
    """torch.utils.flop_counter.register_flop_formula, without the import of that module.

    Args:
        operator: one of torch.ops, without its overload.
        get_raw: whether the formula takes tensors and not their shapes.
    """

    def register(formula: Formula) -> Formula:
        if COUNTER in sys.modules:
            sys.modules[COUNTER].register_flop_formula(operator, get_raw)(formula)
        else:
            _formulas.append((operator, get_raw, formula))
        return formula

    return register


class _AtImport(MetaPathFinder):
    """Finds the counter's module as Python would, and hands the formulas over once it has run."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            while _formulas:
                operator, get_raw, formula = _formulas.pop()
                module.register_flop_formula(operator, get_raw)(formula)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _AtImport())
