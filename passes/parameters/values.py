"""Small readings of one value of the data flow: its operator's name, its arguments, its sizes."""

from typing import Any

from moonfx.passes.parameters.dataflow import FlowValue


def op_name(value: FlowValue) -> str:
    """The operator's name, "add" of aten.add_.Tensor."""
    return str(getattr(value.target, "__name__", value.target)).split(".")[0].rstrip("_")


def argument_name(op: FlowValue, value: FlowValue) -> str:
    """The name under which an operator's schema has an argument, "" if it is none by itself."""
    schema = getattr(op.target, "_schema", None)
    named = [] if schema is None else [a.name for a in schema.arguments]
    for name, given in (*zip(named, op.args, strict=False), *op.kwargs.items()):
        if given is value:
            return str(name)
    return ""


def named_argument(op: FlowValue, name: str, default: Any) -> Any:
    """An argument by its name in the operator's schema."""
    place = [a.name for a in op.target._schema.arguments].index(name)
    return op.argument(place, name, default)


def wide_sizes(value: FlowValue) -> list[int]:
    """The sizes that are more than 1."""
    return [n for n in value.shape if n > 1]


def is_float(value: FlowValue) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point
