"""Finds what a model uses each parameter for, by its data flow: no name is looked at.

    embedding(w, ids)                            embedding; with ids from arange, of positions
    linear(h, w) that the model returns          head; with both, tied head
    x * rsqrt(mean(x ** 2) + eps) * w            norm gain
    linear(x, w).chunk(3, -1)                    fused projection of three blocks
    bmm(x[e], w[e])                              experts
    softmax(linear(x, w)).topk(2)                router

`uses_in(flow)` gives a `Found` for each parameter of the flow. One whose use is not clear, or that
reads as two different things, has the role None and a reason: something else must decide.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moonfx.capture.graph_nodes import module_path, source_line
from moonfx.passes.graph.nodes import aten
from moonfx.passes.graph.operators import ADD, DIVIDE, EXP, MULTIPLY, SOFTMAX, SUBTRACT
from moonfx.passes.graph.walks import reachable
from moonfx.passes.parameters.dataflow import DataFlow, FlowValue, Worklist
from moonfx.passes.parameters.element_positions import REARRANGE, SAME, is_pointwise
from moonfx.passes.parameters.fused_projections import BlockPattern, FusedBlocks, follow, pattern_of
from moonfx.passes.parameters.heads_and_routers import CHOICES, produces_logits, routes
from moonfx.passes.parameters.indices import is_of_choices, is_of_positions
from moonfx.passes.parameters.inputs import reads_pixels
from moonfx.passes.parameters.learned_rows import learned_rows
from moonfx.passes.parameters.lora import is_first_factor, is_second_factor
from moonfx.passes.parameters.norms import NORMS, ROOTS, is_normalized
from moonfx.passes.parameters.values import argument_name, named_argument, op_name, wide_sizes
from moonfx.passes.parameters.weight_products import (
    WeightProduct,
    input_of,
    is_product,
    plane_of,
    product_of,
)
from moonfx.passes.parameters.weight_uses import GATHERS, TABLES, Use, uses_of


class Found(NamedTuple):
    """What one parameter is used for.

    Args:
        role: a role's name, None if the use is not clear.
        why: what was seen, and where.
        kind, dim, outer, sizes: where the matrices lie in it (see moonfx.optim.matrices.Layout).
    """

    role: str | None
    why: str
    kind: str = "matrix"
    dim: int = 0
    outer: int = 1
    sizes: tuple[int, ...] = ()


_CONVOLUTIONS = {
    "conv1d", "conv2d", "conv3d", "convolution", "_convolution",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
# Kinds of use that a matrix between activations does not have.
_NO_WEIGHTS = ("filters", "gain", "rows", "added", "scale", "other")
_ATTENDS = {aten.scaled_dot_product_attention.default}
_JOINS = {aten.cat.default, aten.stack.default}
_SUMS, _SCALES = ADD | SUBTRACT, MULTIPLY | DIVIDE
_SEEN_THROUGH = REARRANGE | SAME | SOFTMAX | CHOICES


def uses_in(flow: DataFlow, names: dict[int, str] | None = None) -> dict[int, Found]:
    """What each parameter of a run is used for, by its id.

    Args:
        names: id of each module of the user's model -> its qualified name, for reasons.
    """
    flow.activate(learned_rows(flow))
    reader = _Reader(flow, names or {})
    found = {key: reader.read(value) for key, value in flow.parameters.items()}
    return reader.with_scans(found)


class _Reader:
    def __init__(self, flow: DataFlow, names: dict[int, str]) -> None:
        self.flow, self.names = flow, names
        self.uses = {key: uses_of(flow, value) for key, value in flow.parameters.items()}

    # --- one parameter ----------------------------------------------------------------------------

    def read(self, parameter: FlowValue) -> Found:
        uses = self.uses[parameter.key]
        kinds: dict[str, list[Use]] = {}
        for use in uses:
            kinds.setdefault(self.kind(use), []).append(use)
        if not uses:
            if (leaves := _left_to_python(self.flow, parameter)) is not None:
                return Found(None, f"{self.where(leaves)}, goes to code that was not traced")
            if not _reaches_results(self.flow, parameter):
                return Found("unused", "nothing that the model returns is made of it")
            return Found(None, "no operator reads it together with an input of the model")
        for kind, rule in self.RULES:
            if kind in kinds:
                return rule(self, parameter, kinds)
        where = ", ".join(dict.fromkeys(self.where(use.op) for use in uses))
        return Found(None, f"its use is not clear: read by {where}")

    def kind(self, use: Use) -> str:
        """What kind of use it is: a key of RULES, or "other"."""
        op, name = use.op, op_name(use.op)
        argument = argument_name(op, use.value)
        if op.target in TABLES or (op.target in GATHERS and op.args[0] is use.value):
            return "gathered"
        if op.target in _ATTENDS:
            return "rows"
        if op.target in _SCALES and use.through and is_normalized(use.value):
            return "rows"  # of a norm by hand, whose gain is the other factor
        if name in NORMS or name in _CONVOLUTIONS:
            if argument == "bias":
                return "bias"
            if argument == "weight":
                return "gain" if name in NORMS else "filters"
            return "rows"
        if is_product(op):
            if argument == "bias" or (name in ("addmm", "baddbmm") and op.args[0] is use.value):
                return "bias"
            if name == "linear" and argument == "input":
                return "rows"
            if input_of(op) is use.value and not any(map(self.flow.active, op.reads)):
                return "rows"
            return "weight" if product_of(use) is not None else "computed weight"
        if op.target in _JOINS:
            return "rows"
        if op.target in _SUMS:
            return "added"
        return "scale" if op.target in _SCALES else "other"

    def gathered(self, parameter: FlowValue, kinds: dict[str, list[Use]]) -> Found:
        first = kinds["gathered"][0]
        where = f"gathered at {self.where(first.op)}"
        if "weight" in kinds:
            products = [p for p in map(product_of, kinds["weight"]) if p is not None]
            if head := [p for p in products if produces_logits(self.flow, p.op)]:
                gives = f"gives the logits at {self.where(head[0].op)}"
                return Found("tied head", f"{where}, and {gives}")
            return Found("embedding", f"{where}, and multiplied at {self.where(products[0].op)}")
        if len(wide_sizes(parameter)) < 2:
            return Found("vector", where)
        indices = [x for x in first.op.reads if x is not first.value]
        if first.op.target not in TABLES and any(map(is_of_choices, indices)):
            return Found("bias", f"{where}, a row for each chosen expert")
        if any(map(is_of_positions, indices)):
            return Found("position embedding", f"{where}, by positions")
        return Found("embedding", where)

    def filters(self, parameter: FlowValue, kinds: dict[str, list[Use]]) -> Found:
        op = kinds["filters"][0].op
        if kinds["filters"][0].at is None:
            return self.computed({"computed weight": kinds["filters"]})
        where = self.where(op)
        groups = named_argument(op, "groups", 1)
        channels = op.args[0].shape[-len(parameter.shape) + 1]
        if groups > 1 and groups == channels:
            return Found("depthwise convolution", f"{groups} groups of one channel at {where}")
        if produces_logits(self.flow, op):
            return Found("head", f"gives what the model returns at {where}")
        if not self.flow.trained(op.args[0]):
            return Found("first convolution", f"reads the model's input at {where}")
        rows, columns = parameter.shape[0] // groups, math.prod(parameter.shape[1:])
        if min(rows, columns) < 2:
            each = " in each group" if groups > 1 else ""
            return Found("thin matrix", f"a matrix [{rows}, {columns}]{each} at {where}")
        many = f"{groups} groups of " if groups > 1 else ""
        return Found("convolution", f"{many}filters at {where}", "flatten", 0, groups)

    def computed(self, kinds: dict[str, list[Use]]) -> Found:
        use = kinds["computed weight"][0]
        names = ", ".join(dict.fromkeys(map(op_name, use.through)))
        by = names or "a product of another form"
        where = self.where(use.op)
        weights = reachable([use.value], lambda value: value.reads, stop=self.flow.active)
        if any(x.target in ROOTS or "norm" in op_name(x) for x in weights):
            return Found("weight norm", f"the weight at {where} is computed of it and of a norm")
        return Found(None, f"its use is not clear: the weight at {where} is computed of it by {by}")

    def computed_weight(self, parameter: FlowValue, kinds: dict[str, list[Use]]) -> Found:
        return self.computed(kinds)

    def weight(self, parameter: FlowValue, kinds: dict[str, list[Use]]) -> Found:
        products = [p for p in map(product_of, kinds["weight"]) if p is not None]
        first = products[0]
        where = self.where(first.op)
        if "computed weight" in kinds:
            return self.computed(kinds)
        if others := [kinds[kind][0].op for kind in _NO_WEIGHTS if kind in kinds]:
            also = self.where(others[0])
            return Found(None, f"its use is not clear: a weight at {where}, and read by {also}")
        if (
            head := next((p for p in products if produces_logits(self.flow, p.op)), None)
        ) is not None:
            return Found("head", f"gives the logits at {self.where(head.op)}")
        if len(wide_sizes(parameter)) < 2:
            return Found("thin matrix", f"multiplied at {where}, of shape {list(parameter.shape)}")
        if len(parameter.shape) == 2 and any(map(self.is_lora, products)):
            return Found("LoRA", f"a factor of low rank beside a weight at {where}")
        if any(reads_pixels(self.flow, p.op) for p in products):
            return Found("patch embedding", f"reads the model's input at {where}")
        if any(self.escapes(p.op) for p in products):
            return Found(None, f"what comes of {where} goes to code that was not traced")
        if any(routes(self.flow, p.op) for p in products):
            return Found("router", f"chooses experts at {where}")
        return self.matrix(parameter, products, where)

    def escapes(self, output: FlowValue) -> bool:
        """Whether code between two graphs may read a product, and do what no graph shows."""
        worklist = Worklist(self.flow, [output])
        for value in worklist:
            if value.escapes:
                return True
            if value is output or value.target in _SEEN_THROUGH or is_pointwise(value):
                worklist.add(value.users)
        return False

    def is_lora(self, product: WeightProduct) -> bool:
        """Whether a product is one of LoRA's two."""
        summed, out = product.op.reads, product.op.shape[-1] if product.op.shape else 0
        x = next((v for v in summed if self.flow.active(v)), None)
        size = x.shape[-1] if x is not None and x.shape else 0
        if out < size:
            return is_first_factor(self.flow, product, out, size)
        return is_second_factor(self.flow, product, size, out)

    def matrix(self, parameter: FlowValue, products: Sequence[WeightProduct], where: str) -> Found:
        """A matrix between activations, or several: where they lie."""
        found = plane_of(parameter.shape, products)
        if found is None:
            return Found(None, f"no layout says where the matrices are that {where} multiplies")
        kind, plane = found
        if kind == "flatten":
            return Found("hidden matrix", f"one matrix at {where}", kind)
        role = "hidden matrix" if kind == "matrix" else "experts"
        dims = {p.out[0] for p in products if p.line is not None}
        if len(dims) != 1 or any(p.line is None for p in products):
            return Found(role, f"multiplied at {where}", kind)
        dim = dims.pop()
        pattern = self.pattern(parameter, products, dim)
        if pattern.sizes and min(pattern.sizes) * pattern.outer == 1:
            pattern = BlockPattern(1, (), "kept whole: one of its blocks is a single row")
        if pattern.sizes:
            parts = " + ".join(map(str, pattern.sizes))
            times = f"{pattern.outer} times " if pattern.outer > 1 else ""
            role = "fused projection" if kind == "matrix" else role
            why = f"its output at {where} is {times}{parts} features that go apart"
            return Found(role, why, kind, plane.index(dim), pattern.outer, pattern.sizes)
        why = f"multiplied at {where}" + (f", {pattern.why}" if pattern.why else "")
        return Found(role, why, kind)

    def pattern(
        self, parameter: FlowValue, products: Sequence[WeightProduct], dim: int
    ) -> BlockPattern:
        blocks = FusedBlocks(parameter.shape[dim])
        for product in products:
            follow(self.flow, product.op, product.positions, blocks)
        blocks.join_heads()
        return pattern_of(blocks)

    def rows(self, parameter: FlowValue, kinds: dict[str, list[Use]]) -> Found:
        where = self.where(kinds["rows"][0].op)
        if len(wide_sizes(parameter)) < 2:
            return Found("vector", f"joins the activations at {where}")
        return Found("embedding", f"learned rows that join the activations at {where}")

    def gain(self, parameter: FlowValue, kinds: dict[str, list[Use]]) -> Found:
        return Found("norm gain", f"the gain of {self.where(kinds['gain'][0].op)}")

    def bias(self, parameter: FlowValue, kinds: dict[str, list[Use]]) -> Found:
        return Found("bias", f"added at {self.where(kinds['bias'][0].op)}")

    def added(self, parameter: FlowValue, kinds: dict[str, list[Use]]) -> Found:
        use = kinds["added"][0]
        where = f"added at {self.where(use.op)}"
        gathers = any(x.target in GATHERS for x in use.through)
        if "scale" in kinds and len(wide_sizes(parameter)) > 1:
            return Found(None, f"its use is not clear: {where}, and multiplied elsewhere")
        if len(wide_sizes(parameter)) < 2:
            return Found("bias", where)
        by = ", gathered by positions" if gathers else ", to each position its own"
        return Found("position embedding", where + by)

    def scale(self, parameter: FlowValue, kinds: dict[str, list[Use]]) -> Found:
        uses = kinds["scale"]
        where = self.where(uses[0].op)
        if self.decays(uses[0]):
            return Found("scan parameter", f"-exp of it is a decay at {where}")
        if not wide_sizes(parameter):
            return Found("vector", f"one number that multiplies at {where}")
        if any(is_normalized(x) for use in uses for x in use.op.reads if x is not use.value):
            return Found("norm gain", f"multiplies what a norm gives at {where}")
        return Found("vector", f"multiplied elementwise at {where}")

    def decays(self, use: Use) -> bool:
        """Whether a use reads -exp(parameter), and exp is taken again."""
        through = {x.target for x in use.through}
        if not through & EXP or not any(op_name(x) == "neg" for x in use.through):
            return False
        worklist = Worklist(self.flow, [use.op])
        for value in worklist:
            if value.target in EXP or not is_pointwise(value):
                return True  # exp, or a scan that is one operator
            worklist.add(value.users)
        return False

    RULES: tuple[tuple[str, Callable[["_Reader", FlowValue, dict[str, list[Use]]], Found]], ...] = (
        ("gathered", gathered),
        ("filters", filters),
        ("weight", weight),
        ("computed weight", computed_weight),
        ("gain", gain),
        ("bias", bias),
        ("rows", rows),
        ("added", added),
        ("scale", scale),
    )

    # --- parameters together ----------------------------------------------------------------------

    def with_scans(self, found: dict[int, Found]) -> dict[int, Found]:
        """The steps and skips of a recurrence: their module uses a decay as well."""
        modules = {
            self.module(use.op)
            for key, each in found.items()
            if each.role == "scan parameter"
            for use in self.uses[key]
        }
        for key, uses in self.uses.items():
            if found[key].role == "scan parameter":
                continue
            at = {self.module(use.op) for use in uses}
            own = {self.kind(use) for use in uses} <= {"added", "scale", "other"}
            if own and uses and at <= modules and len(wide_sizes(self.flow.parameters[key])) < 2:
                where = self.where(uses[0].op)
                found[key] = Found("scan parameter", f"beside a decay at {where}")
        return found

    def module(self, value: FlowValue) -> str:
        return module_path(value, self.names, "")

    def where(self, value: FlowValue) -> str:
        """A node, its module and its source line, in words."""
        module = "a layer" if value.shared else self.module(value) or "the model"
        return f"{value.name} in {module}, {source_line(value)}"


def _left_to_python(flow: DataFlow, value: FlowValue) -> FlowValue | None:
    """What is made of a value and may be read by code between two graphs."""
    worklist = Worklist(flow, [value])
    for each in worklist:
        if each.escapes:
            return each
        worklist.add(each.users)
    return None


def _reaches_results(flow: DataFlow, value: FlowValue) -> bool:
    worklist = Worklist(flow, [value])
    for each in worklist:
        if each.returned:
            return True
        worklist.add(each.users)
    return False
