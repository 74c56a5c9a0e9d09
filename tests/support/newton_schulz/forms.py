"""Newton-Schulz iterations as people write them, each written again from its definition.

Every form takes a matrix (or a batch) and returns X_k of a X + (b A + c A^2) X, A = X X^T.
"""

from collections.abc import Callable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
CHANGING = ((4.08, -6.89, 2.93), (3.95, -6.30, 2.64), (2.84, -3.05, 1.20))

Form = Callable[[Tensor], Tensor]


def normalized(G: Tensor, eps: float = 1e-7) -> Tensor:
    return G / (G.norm(dim=(-2, -1), keepdim=True) + eps)


def wide(G: Tensor) -> bool:
    return G.shape[-2] <= G.shape[-1]


def step(X: Tensor) -> Tensor:
    """One step, as most write it."""
    a, b, c = QUINTIC
    A = X @ X.mT
    return a * X + (b * A + c * A @ A) @ X


def jordan(G: Tensor, steps: int = 5) -> Tensor:
    """Keller Jordan's: bfloat16, transposed on entry and exit, two products and two sums."""
    a, b, c = QUINTIC
    X = G.bfloat16()
    X = X if wide(G) else X.mT
    X = normalized(X)
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X if wide(G) else X.mT


def moonlight(G: Tensor) -> Tensor:
    """Moonlight's: one matrix, .T, the norm of all entries."""
    a, b, c = QUINTIC
    X = G.bfloat16()
    if not wide(G):
        X = X.T
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X if wide(G) else X.T


def dion(G: Tensor) -> Tensor:
    """dion's reference: other coefficients in each step, a norm with a margin."""
    X = G.to(dtype=torch.bfloat16)
    if not wide(G):
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in CHANGING:
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X if wide(G) else X.mT


def timm(G: Tensor) -> Tensor:
    """timm's: products into three buffers that are made once."""
    fused = torch.baddbmm if G.dim() > 2 else torch.addmm
    X = G.bfloat16()
    X = X if wide(G) else X.mT
    X = X.div(X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).contiguous()
    A = X.new_empty((*X.shape[:-1], X.shape[-2]))
    B, C = torch.empty_like(A), torch.empty_like(X)
    for a, b, c in CHANGING:
        fused(A, X, X.mT, beta=0.0, alpha=1.0, out=A)
        fused(A, A, A, beta=b, alpha=c, out=B)
        fused(X, B, X, beta=a, alpha=1.0, out=C)
        X, C = C, X
    return X if wide(G) else X.mT


def gram_free(G: Tensor) -> Tensor:
    """X^T X on the other side, for a tall matrix that stays tall."""
    X = normalized(G)
    for a, b, c in CHANGING:
        A = X.mT @ X
        X = a * X + X @ (b * A + c * A @ A)
    return X


def horner(G: Tensor) -> Tensor:
    """(a I + A (b I + c A)) X."""
    X = normalized(G)
    identity = torch.eye(X.shape[-2], dtype=X.dtype)
    for a, b, c in CHANGING:
        A = X @ X.mT
        X = (a * identity + A @ (b * identity + c * A)) @ X
    return X


def identity_like_x(G: Tensor) -> Tensor:
    """The identity is made in float32 and cast to X's dtype."""
    X = normalized(G).bfloat16()
    identity = torch.eye(X.shape[-2]).to(X)
    for a, b, c in CHANGING:
        A = X @ X.mT
        X = a * X + (b * identity + c * A) @ A @ X
    return X


def horner_on_x(G: Tensor) -> Tensor:
    """a X + A (b X + c A X): A^2 is never formed."""
    X = normalized(G)
    for a, b, c in CHANGING:
        A = X @ X.mT
        Y = A @ X
        X = X * a + A @ (Y * c + X * b)
    return X


def in_place(G: Tensor) -> Tensor:
    X = normalized(G)
    for a, b, c in CHANGING:
        A = torch.matmul(X, X.transpose(-2, -1))
        B = torch.matmul(A, A).mul_(c)
        B.add_(A, alpha=b)
        Y = torch.matmul(B, X)
        X.mul_(a).add_(Y)
    return X


def addmm_in_place(G: Tensor) -> Tensor:
    X = normalized(G)
    for a, b, c in CHANGING:
        A = X.mm(X.t())
        B = A.clone().addmm_(A, A, beta=b, alpha=c)
        X = X.clone().addmm_(B, X, beta=a)
    return X


def baddbmm(G: Tensor) -> Tensor:
    X = normalized(G)
    for a, b, c in CHANGING:
        A = torch.bmm(X, X.permute(0, 2, 1))
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a, alpha=1)
    return X


def einsum(G: Tensor) -> Tensor:
    X = normalized(G)
    for a, b, c in CHANGING:
        A = torch.einsum("ik,jk->ij", X, X)
        B = torch.einsum("ij,jk->ik", A, A)
        X = a * X + torch.einsum("ij,jk->ik", b * A + c * B, X)
    return X


def einsum_with_dots(G: Tensor) -> Tensor:
    X = normalized(G)
    for a, b, c in CHANGING:
        A = torch.einsum("...ik,...jk->...ij", X, X)
        B = torch.einsum("... i j, ... j k -> ... i k", A, A)
        X = a * X + torch.einsum("...ij,...jk->...ik", b * A + c * B, X)
    return X


def linear(G: Tensor) -> Tensor:
    """nn.functional.linear(x, w) is x w^T."""
    X = normalized(G)
    for a, b, c in CHANGING:
        A = torch.nn.functional.linear(X, X)
        X = torch.sub(a * X, (-b * A - c * torch.linalg.matrix_power(A, 2)) @ X)
    return X


def multi_dot(G: Tensor) -> Tensor:
    X = normalized(G)
    for a, b, c in CHANGING:
        A = X @ X.T
        X = a * X + b * torch.linalg.multi_dot([A, X]) + c * torch.linalg.multi_dot([A, A, X])
    return X


def factored(G: Tensor) -> Tensor:
    """A user's own: coefficients given as a common factor and ratios, sums by lerp and division."""
    X = normalized(G)
    for a, b, c in CHANGING:
        A = X @ X.adjoint()
        B = torch.lerp(A, A @ A, c / (b + c)) * (b + c)
        X = (X + B @ X / a) * a
    return X


def transposed_a(G: Tensor) -> Tensor:
    """A^T for A, and A X from the right: (X^T A)^T."""
    X = normalized(G)
    for a, b, c in CHANGING:
        A = X @ X.T
        B = b * A.T + c * A.T @ A
        X = a * X + (X.T @ B).T
    return X


def doubled_between(G: Tensor) -> Tensor:
    """Each step's X is doubled in place after A was made of it: coefficients 2 a, 2 b, 2 c."""
    X = normalized(G)
    for a, b, c in CHANGING:
        A = X @ X.T
        X.mul_(2.0)
        X = 0.5 * (a * X + (b * A + c * A @ A) @ X)
    return X


def in_float32(G: Tensor) -> Tensor:
    """Normalized in float32, iterated in bfloat16, returned in the gradient's dtype."""
    return jordan(normalized(G.float())).to(G.dtype)


def one_step(G: Tensor) -> Tensor:
    return jordan(G, steps=1)


# name, form, shape of G, steps
FORMS: list[tuple[str, Form, tuple[int, ...], int]] = [
    ("Jordan, wide", jordan, (4, 6), 5),
    ("Jordan, tall", jordan, (6, 4), 5),
    ("Jordan, square", jordan, (5, 5), 5),
    ("Jordan, batched", jordan, (3, 4, 6), 5),
    ("Jordan, batched and tall", jordan, (3, 6, 4), 5),
    ("Jordan, two batch dims", jordan, (2, 3, 4, 6), 5),
    ("Moonlight", moonlight, (4, 6), 5),
    ("Moonlight, tall", moonlight, (6, 4), 5),
    ("dion", dion, (4, 6), 3),
    ("dion, tall", dion, (6, 4), 3),
    ("dion, batched", dion, (2, 4, 6), 3),
    ("timm", timm, (4, 6), 3),
    ("timm, tall", timm, (6, 4), 3),
    ("timm, batched", timm, (2, 4, 6), 3),
    ("X^T X", gram_free, (6, 4), 3),
    ("X^T X, batched", gram_free, (2, 6, 4), 3),
    ("Horner with an identity", horner, (4, 6), 3),
    ("Horner with an identity, batched", horner, (2, 4, 6), 3),
    ("Horner on X", horner_on_x, (4, 6), 3),
    ("in place", in_place, (4, 6), 3),
    ("addmm_", addmm_in_place, (4, 6), 3),
    ("baddbmm", baddbmm, (2, 4, 6), 3),
    ("einsum", einsum, (4, 6), 3),
    ("einsum with dots", einsum_with_dots, (4, 6), 3),
    ("einsum with dots, batched", einsum_with_dots, (2, 4, 6), 3),
    ("identity like X", identity_like_x, (4, 6), 3),
    ("linear and matrix_power", linear, (4, 6), 3),
    ("multi_dot", multi_dot, (4, 6), 3),
    ("lerp and ratios", factored, (4, 6), 3),
    ("A^T for A", transposed_a, (4, 6), 3),
    ("doubled in between", doubled_between, (4, 6), 3),
    ("cast back and forth", in_float32, (4, 6), 5),
    ("one step", one_step, (4, 6), 1),
]
