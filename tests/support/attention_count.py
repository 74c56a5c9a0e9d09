"""Counts the attentions of a model without moonfx, and says what their queries see.

Counted is each call of F.scaled_dot_product_attention, and each softmax over the last dim whose
result enters a product with values, directly or after a cast, a dropout, a slice or a change of
shape. A router's softmax does not (its best experts are picked from it), and a state-space layer
has none.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
PRODUCT = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum,
           torch.baddbmm)  # fmt: skip
SAME = {
    *("to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone", "dropout"),
    *("view", "reshape", "transpose", "permute", "swapaxes", "unsqueeze", "squeeze", "expand"),
    *("flatten", "__getitem__", "mul", "__mul__", "__rmul__", "masked_fill", "nan_to_num", "where"),
}


class Count(TorchFunctionMode):
    """Each attention that runs: the module that it runs in, and what its queries see."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.running: list[str] = []
        self.softmaxes: list[str] = []  # where each ran
        self.counted: set[int] = set()
        self.made: dict[int, tuple[Tensor, int]] = {}  # id of a result -> it, and its softmax
        self.hooks: list[Any] = []
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, n=name: self.running.append(n))
            leave = module.register_forward_hook(lambda *_: self.leave())
            self.hooks += [enter, leave]

    def leave(self) -> None:
        self.running.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def source(self, tensor: Any) -> int | None:
        kept, source = self.made.get(id(tensor), (None, None))
        return source if kept is tensor else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        where = self.running[-1] if self.running else ""
        if func is F.scaled_dot_product_attention:
            self.found.append((where, kind_of_call(*args, **(kwargs or {}))))
        elif func in SOFTMAX:
            self.made[id(out)] = (out, len(self.softmaxes))
            self.softmaxes.append(where)
        else:
            for argument in tree_leaves((args, kwargs)):
                source = self.source(argument)
                if source is None:
                    continue
                if func in PRODUCT and source not in self.counted:
                    self.counted.add(source)
                    self.found.append((self.softmaxes[source], kind_of(argument.detach() > 0)))
                elif func.__name__ in SAME and out.numel() <= argument.numel():
                    self.made[id(out)] = (out, source)
        return out


def kind_of_call(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                 dropout_p: float = 0.0, is_causal: bool = False, **other: Any) -> str:  # fmt: skip
    visible = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
    elif attn_mask is not None:
        visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4
    return kind_of(visible)


def kind_of(visible: Tensor) -> str:
    """causal: each query sees all keys up to its own; narrower: only some of them."""
    queries, keys = visible.shape[-2:]
    if queries != keys:
        return "cross"
    triangle = torch.ones(queries, keys, dtype=torch.bool).tril()
    if torch.equal(visible, triangle.expand_as(visible)):
        return "causal"
    if bool(visible.all()):
        return "bidirectional"
    return "narrower" if not bool((visible & ~triangle).any()) else "other"
