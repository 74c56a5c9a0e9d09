"""QK-Clip of MuonClip: no attention logit grows beyond tau (Kimi K2, arXiv 2507.20534, sec. 2.1).

    S_h = max_ij q_i . k_j / sqrt(D)                        the largest logit of head h in this step
    g_h = min(1, tau / S_h)
    W_q, W_k of head h <- sqrt(g_h) W_q, sqrt(g_h) W_k      after the optimizer's step

Muon's updates have full rank, and logits of models trained with it grow further than with AdamW.
Heads below tau are left alone, bit for bit. Where a key head serves several query heads, what is
shared stays and the query takes all of g_h: the paper's own rule for the rotary keys that all heads
of latent attention share.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.table import RoleRow

CHUNK = 256  # queries whose logits exist at a time


class Clipped(NamedTuple):
    """A head that was scaled: its largest logit before, and g."""

    layer: str
    head: int
    largest: float
    factor: float


class _Layer(NamedTuple):
    """An attention module and the projections that make its queries and keys."""

    module: nn.Module
    query: nn.Module
    key: nn.Module
    layout: Layout | None  # of a projection that makes both


class QKClip:
    """Keeps the attention logits of a model at most tau.

        clip = QKClip(model)
        with clip.watch():
            loss = model(tokens).loss
        loss.backward()
        optimizer.step()
        clip.step()                  # or once, before training: clip.after(optimizer)

    Args:
        model: its attention layers are the modules that have the named projections as children.
        tau: the largest logit allowed; the paper's is 100.
        query, key: names of the projections (Linear, or Hugging Face's Conv1D). Give one name for
            both where one projection makes queries, keys and values.
        table: `optimizer.table` or `moonfx.roles(optimizer).rows`, which know how a fused
            projection is laid out; without it, its rows are all queries, then as many keys, then
            as many values.
    Raises:
        ValueError: if tau is not positive, no module has the projections, or a layer normalizes
            its queries or keys: scaling their projections would change nothing, nor is it needed.
            In watch(), if a layer's queries are not of the size that its projection was taken for.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tau: float = 100.0,
        query: str = "q_proj",
        key: str = "k_proj",
        table: Sequence[RoleRow] = (),
    ) -> None:
        if not (isinstance(tau, (int, float)) and 0 < tau < math.inf):
            raise ValueError(f"tau must be a positive number, got {tau!r}")
        self.tau = float(tau)
        layouts = {row.name: row.layout for row in table}
        self.layers: dict[str, _Layer] = {}
        for name, module in model.named_modules():
            children = dict(module.named_children())
            if query in children and key in children:
                layout = layouts.get(f"{name}.{query}.weight".lstrip("."), Layout())
                _refuse_norms(name, children)
                fused = None if query != key else layout if layout.sizes else _thirds(children[key])
                self.layers[name] = _Layer(module, children[query], children[key], fused)
        if not self.layers:
            raise ValueError(
                f"no module of {type(model).__name__} has children {query!r} and {key!r}: name the "
                "projections with query= and key="
            )
        self.largest: dict[str, Tensor] = {}

    def record(self, layer: str, largest: Tensor) -> None:
        """Takes in a layer's largest logit per head, [heads]; several count as their maximum.

        Raises:
            ValueError: for an unknown layer, or if `largest` is not one number per head.
        """
        if layer not in self.layers:
            known = ", ".join(list(self.layers)[:3])
            raise ValueError(f"layer must be one of {known}, ...; not {layer!r}")
        if largest.dim() != 1 or _rows(self.layers[layer].query) % largest.numel():
            raise ValueError(
                f"largest must be [heads], one logit per query head of {layer}, got "
                f"{list(largest.shape)}"
            )
        before = self.largest.get(layer)
        largest = largest.detach().float()
        self.largest[layer] = largest if before is None else torch.maximum(before, largest)

    @contextmanager
    def watch(self, sequences: int | None = None) -> Iterator[None]:
        """Records the logits of every scaled_dot_product_attention that the layers call inside.

        Only what the mask lets through counts. Costs one more product of queries and keys, 256
        queries at a time. Compiled models are watched by running them eagerly.

        Args:
            sequences: look at the first so many of each batch; None at all.
        Raises:
            RuntimeError: on leaving, if no layer called it: then give the logits to `record`.
        """
        inside: list[str] = []
        handles: list[RemovableHandle] = []
        for name, layer in self.layers.items():
            enter, leave = _marks(inside, name)
            handles.append(layer.module.register_forward_pre_hook(enter))
            handles.append(layer.module.register_forward_hook(leave, always_call=True))
        seen: list[str] = []

        def see(q: Tensor, k: Tensor, **how: Any) -> None:
            if inside:
                self._check_heads(inside[-1], q)
                seen.append(inside[-1])
                self.record(inside[-1], largest_logits(q[:sequences], k[:sequences], **how))

        try:
            with _Watch(see):
                yield
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise RuntimeError(
                "watch() saw no scaled_dot_product_attention in the model's attention layers: "
                "give it one that uses it (attn_implementation='sdpa'), or logits to record()"
            )

    @torch.no_grad()
    def step(self) -> list[Clipped]:
        """Scales each head whose recorded logit is above tau, forgets the records, and says which.

        Under torch.distributed the largest logit of all ranks counts, so all must call it.

        Raises:
            ValueError: before any change, if a recorded logit is NaN or infinite.
        """
        recorded, self.largest = self.largest, {}
        for largest in recorded.values():
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(largest, dist.ReduceOp.MAX)
        for name, largest in recorded.items():
            if not largest.isfinite().all():
                raise ValueError(f"an attention logit of {name} is NaN or infinite")
        return [row for name, largest in recorded.items() for row in self._clip(name, largest)]

    def after(self, optimizer: Optimizer) -> RemovableHandle:
        """Calls `step` after each step of an optimizer; remove() of what it returns ends that."""

        def clip(*_: Any) -> None:
            self.step()

        return optimizer.register_step_post_hook(clip)

    def _check_heads(self, name: str, q: Tensor) -> None:
        """That the rows taken for queries are as many as the queries have.

        Raises:
            ValueError: if not, as with fewer key heads in one projection that no table describes.
        """
        layer, made = self.layers[name], q.shape[1] * q.shape[3]
        rows = layer.layout.outer * layer.layout.sizes[0] if layer.layout else _rows(layer.query)
        if rows != made:
            raise ValueError(
                f"{name} attends with {q.shape[1]} heads of {q.shape[3]}, and {rows} outputs of "
                "its projection are taken for queries: say with table= how it is laid out"
            )

    def _clip(self, name: str, largest: Tensor) -> list[Clipped]:
        layer, heads = self.layers[name], largest.numel()
        factors = (self.tau / largest).where(largest > self.tau, 1.0)
        over = (largest > self.tau).nonzero().flatten().tolist()
        if over:
            projections = [layer.query, layer.key] if layer.layout is None else [layer.query]
            scales = [torch.ones(_rows(x), device=largest.device) for x in projections]
            if layer.layout is None:
                queries, keys = (scale.view(1, -1) for scale in scales)
            else:
                blocks = scales[0].view(layer.layout.outer, -1).split(layer.layout.sizes, 1)
                queries, keys = blocks[0], blocks[1]
            shared = keys.numel() < queries.numel()
            factor = (factors if shared else factors.sqrt()).view(queries.shape[0], -1, 1)
            D = queries.numel() // heads
            for block in [queries] if shared else [queries, keys]:
                block.unflatten(1, (-1, D)).mul_(factor)
            for module, scale in zip(projections, scales, strict=True):
                _scale(module, scale)
        return [Clipped(name, h, largest[h].item(), factors[h].item()) for h in over]


class _Watch(TorchFunctionMode):
    """Shows the queries and keys of each scaled_dot_product_attention to a function."""

    def __init__(self, see: Callable[..., None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            how = {name: given.get(name) for name in ("attn_mask", "is_causal", "scale")}
            self.see(given["query"], given["key"], **how)
        return func(*args, **kwargs)


@torch.no_grad()
def largest_logits(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool | None = False,
    scale: float | None = None,
) -> Tensor:
    """The largest logit of each query head among the pairs that a mask lets through, [Hq].

    Args:
        q, k: [B, Hq, Nq, D] and [B, Hkv, Nk, D]; Hq a multiple of Hkv.
        attn_mask, is_causal, scale: as scaled_dot_product_attention has them. Of an additive mask
            only what shuts pairs out counts, not what it adds.
    """
    (B, Hq, Nq, D), Nk = q.shape, k.shape[2]
    k = k.repeat_interleave(Hq // k.shape[1], 1).float().mT
    largest = torch.full((Hq,), -math.inf, device=q.device)
    for first in range(0, Nq, CHUNK):
        logits = q[:, :, first : first + CHUNK].float() @ k
        rows = torch.arange(first, first + logits.shape[2], device=q.device)
        if is_causal:
            logits.masked_fill_(torch.arange(Nk, device=q.device) > rows[:, None], -math.inf)
        if attn_mask is not None:
            part = attn_mask[:B] if attn_mask.dim() == 4 else attn_mask
            part = part.expand(*part.shape[:-2], Nq, Nk)[..., first : first + CHUNK, :]
            shut = ~part if part.dtype == torch.bool else part < torch.finfo(part.dtype).min / 2
            logits.masked_fill_(shut, -math.inf)
        largest = torch.maximum(largest, logits.amax((0, 2, 3)))
    return largest * (D**-0.5 if scale is None else scale)


def _marks(inside: list[str], name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that keep the names of the layers whose forward is running."""

    def enter(*_: Any) -> None:
        inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    return enter, leave


def _refuse_norms(name: str, children: dict[str, nn.Module]) -> None:
    norms = [c for c in children if c in ("q_norm", "k_norm", "query_norm", "key_norm", "qk_norm")]
    if norms:
        raise ValueError(
            f"{name} normalizes its queries or keys ({', '.join(norms)}): scaling their "
            "projections would change nothing, and their logits are bounded"
        )


def _thirds(module: nn.Module) -> Layout:
    return Layout(sizes=(_rows(module) // 3,) * 3)


def _rows(module: nn.Module) -> int:
    """The number of outputs."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[_dim(module)]


def _dim(module: nn.Module) -> int:
    """The weight's dimension of outputs: Hugging Face's Conv1D is a Linear transposed."""
    return 1 if type(module).__name__ == "Conv1D" else 0


def _scale(module: nn.Module, scale: Tensor) -> None:
    """Multiplies each output of a projection."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight.mul_(scale if _dim(module) else scale[:, None])
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias.mul_(scale)
