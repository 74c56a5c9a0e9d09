"""Muon as several packages have it, whole optimizers, written from what each is said to do.

What differs: where the momentum lies and what it sums, whether matrices are iterated on one by one
or stacked, in new tensors or in buffers, what is a number and what a tensor, how a parameter is
written to, and which pieces are under a torch.compile of their own.

Most cast to DTYPE and not to bfloat16, as theirs do, where two orders of one sum are not near
enough to tell them from another sum.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

Parameters = list[nn.Parameter]
Coefficients = Sequence[tuple[float, float, float]]
Closure = Callable[[], Tensor]

DTYPE = torch.float32
ONE: Coefficients = [(3.4445, -4.775, 2.0315)] * 2
EACH: Coefficients = [(4.0848, -6.8946, 2.927), (3.9505, -6.3029, 2.6377)]


def iterate(G: Tensor, numbers: Coefficients = ONE, eps: float | Tensor = 1e-7) -> Tensor:
    """The rows of G, or of each of a batch, made nearly orthogonal; tall ones by their columns."""
    tall = G.shape[-2] > G.shape[-1]
    X = (G.mT if tall else G).to(DTYPE, copy=True)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    for a, b, c in numbers:
        A = X @ X.mT
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.mT if tall else X


own_compile = torch.compile(iterate, fullgraph=True)


class WithAdam(torch.optim.Optimizer):
    """Keller Jordan's for one device: averages into gradients, and has Adam for the other group."""

    def __init__(self, made: Parameters, lr: Any = 0.02) -> None:
        groups = [{"params": made[:-1], "lr": lr}, {"params": made[-1:], "lr": 0.1 * lr}]
        super().__init__(groups, {})
        for group, use in zip(self.param_groups, (True, False), strict=True):
            group["use_muon"] = use

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if group["use_muon"]:
                    if not state:
                        state["buffer"] = torch.zeros_like(p)
                    update = self.muon(p.grad, state["buffer"])
                else:
                    if not state:
                        state.update(first=torch.zeros_like(p), second=torch.zeros_like(p), step=0)
                    state["step"] += 1
                    update = self.adam(p.grad, state["first"], state["second"], state["step"])
                p.mul_(1 - group["lr"] * 0.1)
                p.add_(update.reshape(p.shape), alpha=-group["lr"])

    @staticmethod
    def muon(gradient: Tensor, buffer: Tensor) -> Tensor:
        buffer.lerp_(gradient, 0.05)
        update = gradient.lerp_(buffer, 0.95)
        if update.ndim == 4:  # a convolution's
            update = update.view(len(update), -1)
        update = iterate(update)
        update *= max(1, update.size(-2) / update.size(-1)) ** 0.5
        return update

    @staticmethod
    def adam(gradient: Tensor, first: Tensor, second: Tensor, step: int) -> Tensor:
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.05)
        return first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-10)


class ByData(torch.optim.Optimizer):
    """Moonlight's: writes to p.data, gradients on; the iteration has a torch.compile of its own."""

    def __init__(self, made: Parameters, lr: Any = 0.02, run: Any = own_compile) -> None:
        super().__init__(made, {"lr": lr, "wd": 0.1, "momentum": 0.95})
        self.run = run

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(g)
                buffer = state["momentum_buffer"]
                buffer.mul_(momentum).add_(g)
                u = self.run(g.add(buffer, alpha=momentum))
                p.data.mul_(1 - lr * group["wd"])
                p.data.add_(u, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))
        return loss


class Task:
    """Runs a generator up to its next yield: in dion, until something has been sent."""

    def __init__(self, work: Iterator[None]) -> None:
        self.work = work
        self.run()

    def run(self) -> bool:
        try:
            next(self.work)
        except StopIteration:
            return False
        return True


def run_tasks(tasks: Iterator[Task], most: int = 3) -> None:
    waiting: list[Task] = []
    more = True
    while more or waiting:
        still = [task for task in waiting if task.run()]
        if more and len(waiting) < most:
            try:
                still.append(next(tasks))
            except StopIteration:
                more = False
        waiting = still


@torch.compile(fullgraph=True)
def average(gradients: list[Tensor], buffers: list[Tensor], mu: Tensor) -> list[Tensor]:
    torch._foreach_mul_(buffers, mu)
    torch._foreach_add_(buffers, gradients)
    return [b.to(DTYPE, copy=True) for b in buffers]


@torch.compile(fullgraph=True)
def write(made: Parameters, updates: list[Tensor], lr: Tensor, scaled: Tensor, wd: Tensor) -> None:
    torch._foreach_mul_(made, 1 - lr * wd)
    torch._foreach_sub_(made, torch._foreach_mul(updates, scaled))


class Megabatch(torch.optim.Optimizer):
    """dion's: equal shapes stacked, numbers as tensors without dims, generators run as tasks."""

    def __init__(self, made: Parameters, lr: Any = 0.02) -> None:
        super().__init__(made, {"lr": lr, "mu": 0.95, "wd": 0.01, "epsilon": 1e-8})
        for p in made:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        run_tasks(self.tasks())

    def tasks(self) -> Iterator[Task]:
        for group in self.param_groups:
            given = {k: group[k] for k in ("lr", "mu", "wd", "epsilon")}
            numbers = {k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in given.items()}
            alike: dict[Any, Parameters] = defaultdict(list)
            for p in group["params"]:
                alike[p.shape, p.dtype].append(p)
            for made in alike.values():
                yield Task(self.update(made, **numbers))

    def update(
        self, made: Parameters, lr: Tensor, mu: Tensor, wd: Tensor, epsilon: Tensor
    ) -> Iterator[None]:
        updates = average([p.grad for p in made], [self.state[p]["momentum"] for p in made], mu)  # type: ignore[misc]
        updates = list(own_compile(torch.stack(updates), EACH, epsilon).unbind(0))
        scaled = lr * math.sqrt(made[0].shape[-2] / made[0].shape[-1])
        write(made, updates, lr, scaled, wd)
        yield


class IntoBuffers(torch.optim.Optimizer):
    """timm's: a copy normalized in place, products into buffers by out=, numbers for each step."""

    def __init__(self, made: Parameters, lr: Any = 0.02) -> None:
        super().__init__(made, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"]
                buffer.lerp_(p.grad, 0.05)
                u = self.orthogonal(p.grad.lerp(buffer, 0.95))
                p.add_(u, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)

    @staticmethod
    def orthogonal(G: Tensor) -> Tensor:
        tall = G.size(-2) > G.size(-1)
        X = G.to(torch.bfloat16, copy=True)
        X = X.mT if tall else X
        X.div_(X.norm(2, dim=(-2, -1), keepdim=True).clamp_(min=1e-7))
        X = X.contiguous()
        A = torch.empty((X.size(-2), X.size(-2)), dtype=X.dtype)
        B, C = torch.empty_like(A), torch.empty_like(X)
        for a, b, c in EACH:
            torch.addmm(A, X, X.mT, beta=0.0, alpha=1.0, out=A)
            torch.addmm(A, A, A, beta=b, alpha=c, out=B)
            torch.addmm(X, B, X, beta=a, alpha=1.0, out=C)
            X, C = C, X
        return X.mT if tall else X


class Foreach(torch.optim.Optimizer):
    """pytorch-optimizer's: lists throughout, tall matrices turned and stacked with wide ones."""

    def __init__(self, made: Parameters, lr: Any = 0.02) -> None:
        super().__init__(made, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[Any, Parameters] = defaultdict(list)
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                alike[min(p.shape), max(p.shape)].append(p)
            for made in alike.values():
                gradients = [p.grad for p in made]
                buffers = [self.state[p]["momentum_buffer"] for p in made]
                torch._foreach_lerp_(buffers, gradients, weight=0.05)
                torch._foreach_lerp_(gradients, buffers, weight=0.95)
                tall = [len(p) > p.shape[1] for p in made]
                pairs = list(zip(gradients, tall, strict=True))
                whole = iterate(torch.stack([g.mT if turn else g for g, turn in pairs]))
                each = zip(whole.unbind(), tall, strict=True)
                updates = [
                    u.mT.to(p.dtype) if t else u.to(p.dtype)
                    for (u, t), p in zip(each, made, strict=True)
                ]
                torch._foreach_mul_(made, 1 - group["lr"] * 0.1)
                torch._foreach_add_(made, updates, alpha=-group["lr"])


class Own(torch.optim.Optimizer):
    """A user's own: no helper, a profiler's mark, the iteration in parameters' dtype."""

    def __init__(self, made: Parameters, lr: Any = 0.02) -> None:
        super().__init__(made, {"lr": lr})

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        with torch.no_grad(), record_function("my muon"):
            for group in self.param_groups:
                for p in group["params"]:
                    X = p.grad / p.grad.norm().clamp(min=1e-7)
                    for a, b, c in ONE:
                        A = torch.mm(X, X.t())
                        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
                    p -= group["lr"] * X
        return loss
