"""One Newton-Schulz step in every spelling: products, sums, identities, copies and reshapes.

Each takes X and (a, b, c) and returns a X + (b A + c A^2) X with A = X X^T.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Spelling = Callable[[Tensor, float, float, float], Tensor]


def plain(X: Tensor, A: Tensor, a: float, b: float, c: float) -> Tensor:
    return a * X + (b * A + c * A @ A) @ X


def full_slices(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X[:], X[...] @ X[:, :].mT, a, b, c)


def slices_to_the_end(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return plain(X[0:], X[:, : X.shape[1]] @ X.narrow(0, 0, len(X)).mT, a, b, c)


def views_of_the_same_shape(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X.view(X.shape) @ X.reshape_as(X).mT.reshape(X.shape[::-1])
    return a * X.flatten(1) + (b * A + c * A @ A).view(-1, len(X)) @ X.expand(-1, -1)


def copies(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = (X.clone() @ X.T.contiguous()).type_as(X)
    return (a * X.detach()).to(X.dtype) + (b * A + c * A.clone() @ A) @ X.contiguous()


def inner(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.inner(X, X)
    return a * X + (b * A + c * torch.inner(A, A)) @ X


def inner_of_transposes(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.inner(X, X)
    return a * X + torch.inner(b * A + c * A @ A, X.mT)


def tensordot(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.tensordot(X, X, dims=([1], [1]))
    B = b * A + c * torch.tensordot(A, A, dims=1)
    return a * X + torch.tensordot(X, B, dims=([0], [1])).mT


def products_into_buffers(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.empty(len(X), len(X), dtype=X.dtype)
    torch.mm(X, X.t(), out=A)
    B = torch.empty_like(A)
    torch.matmul(A, A, out=B)
    return a * X + (b * A + c * B) @ X


def sums_into_buffers(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A, Y = X @ X.mT, torch.empty_like(X)
    B = torch.empty_like(A)
    torch.mul(A, c, out=B)
    torch.add(b * A, B @ A, out=B)
    return torch.add(a * X, B @ X, out=Y)


def methods(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X.matmul(X.mT)
    return X.mul(a).add(A.matmul(X), alpha=b).add(A.matmul(A.matmul(X)), alpha=c)


def operators_with_alpha(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mH
    return torch.add(a * X, torch.sub(b * A, A @ A, alpha=-c) @ X, alpha=1.0)


def augmented(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.T
    AX = A @ X
    Y = X * a
    Y += AX * b
    Y -= A @ AX * -c
    return Y


def python_sum(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """Which begins with 0 + a X."""
    A = X @ X.T
    terms = [a * X, b * A @ X, c * A @ A @ X]
    return sum(terms[1:], start=0 + terms[0])


def addmm_of_nothing(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.addmm(0 * X.new_zeros(len(X), len(X)), X, X.t())
    B = torch.addmm(torch.empty_like(A), A, A, beta=0, alpha=c)
    return torch.addmm(a * X, b * A + B, X)


def zeros_that_are_added_to(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.zeros(len(X), len(X)).addmm_(X, X.t())
    Y = torch.zeros_like(X)
    Y += a * X
    Y += (b * A + c * A @ A) @ X
    return Y


def einsum_of_three(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.einsum("ij,kj->ik", X, X)
    return a * X + b * torch.einsum("kl,ik->il", X, A) + c * torch.einsum("ij,jk,kl->il", A, A, X)


def einsum_of_five(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """A is never formed."""
    cube = torch.einsum("ij,kj,kl->il", X, X, X)
    return a * X + b * cube + c * torch.einsum("ij,kj,kl,ml,mn->in", X, X, X, X, X)


def einsum_without_an_arrow(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.einsum("ij,kj", X, X)
    return a * X + torch.einsum("ij,jk", b * A + c * A @ A, X)


def einsum_of_a_batch(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.einsum("bij,bkj->bki", X, X)
    B = b * A + c * torch.einsum("bij,bjk->bik", A, A)
    return a * X + torch.einsum("bij,bjk->bik", B, X)


def chain_of_products(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.T
    return torch.linalg.multi_dot([a * torch.eye(len(X)) + b * A, X]) + c * (
        torch.linalg.multi_dot([A, A, X])
    )


def batches_of_one(X: Tensor, a: float, b: float, c: float) -> Tensor:
    X = X.unsqueeze(0)
    A = torch.bmm(X, X.transpose(1, 2))
    return (a * X + torch.bmm(b * A + c * torch.bmm(A, A), X)).squeeze(0)


def products_in_batches_of_one(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = torch.bmm(X[None], X.T[None])[0]
    return a * X + (b * A + c * torch.bmm(A[None], A[None]).squeeze(0)) @ X


def batch_dims_in_one(X: Tensor, a: float, b: float, c: float) -> Tensor:
    flat = X.reshape(-1, *X.shape[-2:])
    return plain(flat, flat @ flat.mT, a, b, c).reshape(X.shape)


def batch_dims_flattened(X: Tensor, a: float, b: float, c: float) -> Tensor:
    flat = X.flatten(0, 1)
    return plain(flat, flat @ flat.mT, a, b, c).unflatten(0, X.shape[:2])


def identity_expanded(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    eye = torch.eye(X.shape[-2], dtype=X.dtype)
    return (a * eye.expand(*A.shape) + (b * eye.expand_as(A) + c * A) @ A) @ X


def identity_repeated(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    eye = torch.eye(X.shape[-2]).to(X)
    return (a * eye.unsqueeze(0) + (b * eye.repeat(len(X), 1, 1) + c * A) @ A) @ X


def identity_from_ones(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A, n = X @ X.mT, len(X)
    ones = torch.diag(torch.ones(n)), torch.diag_embed(X.new_ones(n))
    return (a * ones[0] + (b * ones[1] + c * A) @ A) @ X


def diagonal_of_a_number(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return (torch.diag(torch.full((len(X),), a)) + b * A + c * A @ A) @ X


def diagonal_filled(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return (torch.zeros_like(A).fill_diagonal_(a) + b * A + c * A @ A) @ X


def identity_into_a_buffer(X: Tensor, a: float, b: float, c: float) -> Tensor:
    A = X @ X.mT
    return (a * torch.eye(len(X), out=torch.empty_like(A)) + b * A + c * A @ A) @ X


def written_back(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return X.copy_(plain(X, X @ X.mT, a, b, c))


def written_to_slices(X: Tensor, a: float, b: float, c: float) -> Tensor:
    X[:] = plain(X, X @ X.mT, a, b, c)
    return X


def copied_to_a_buffer(X: Tensor, a: float, b: float, c: float) -> Tensor:
    return torch.empty_like(X).copy_(plain(X, X @ X.mT, a, b, c))


MATRIX, BATCH, BATCHES = (4, 6), (3, 4, 6), (2, 3, 4, 6)
# name, one step, shape of X
SPELLINGS: list[tuple[str, Spelling, tuple[int, ...]]] = [
    ("full slices", full_slices, MATRIX),
    ("slices to the end", slices_to_the_end, MATRIX),
    ("views of the same shape", views_of_the_same_shape, MATRIX),
    ("copies", copies, MATRIX),
    ("inner", inner, MATRIX),
    ("inner of transposes", inner_of_transposes, MATRIX),
    ("tensordot", tensordot, MATRIX),
    ("products, out=", products_into_buffers, MATRIX),
    ("sums, out=", sums_into_buffers, MATRIX),
    ("methods", methods, MATRIX),
    ("methods, batched", methods, BATCH),
    ("add and sub with alpha", operators_with_alpha, MATRIX),
    ("augmented assignments", augmented, MATRIX),
    ("sum()", python_sum, MATRIX),
    ("addmm of nothing", addmm_of_nothing, MATRIX),
    ("zeros", zeros_that_are_added_to, MATRIX),
    ("einsum of three", einsum_of_three, MATRIX),
    ("einsum of five", einsum_of_five, MATRIX),
    ("einsum without an arrow", einsum_without_an_arrow, MATRIX),
    ("einsum of a batch", einsum_of_a_batch, BATCH),
    ("multi_dot of sums", chain_of_products, MATRIX),
    ("batches of one", batches_of_one, MATRIX),
    ("products in batches of one", products_in_batches_of_one, MATRIX),
    ("two batch dims in one", batch_dims_in_one, BATCHES),
    ("two batch dims, flattened", batch_dims_flattened, BATCHES),
    ("identity expanded", identity_expanded, BATCH),
    ("identity repeated", identity_repeated, BATCH),
    ("identity from ones", identity_from_ones, MATRIX),
    ("diagonal of a number", diagonal_of_a_number, MATRIX),
    ("diagonal filled", diagonal_filled, MATRIX),
    ("identity, out=", identity_into_a_buffer, MATRIX),
    ("X.copy_", written_back, MATRIX),
    ("X[:] =", written_to_slices, MATRIX),
    ("copied to a buffer", copied_to_a_buffer, MATRIX),
]
