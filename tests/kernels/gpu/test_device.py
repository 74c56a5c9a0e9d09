"""What only a GPU can show: real sizes, graph capture, determinism, memory, races. `make gpu`.

The numerics of every feature at small shapes are in test_gpu*.py, which a GPU runs as well.
"""

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import moonfx
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from tests.support.moba_cases import Case

pytestmark = pytest.mark.gpu

# Both sides round the result to its dtype, and the kernel the softmax's weights and the score's
# gradient: two units in the last place (2**-7, 2**-10) of a result or of a sum's largest term.
# float32: three TF32 products err by 2**-21 of the sum of absolute terms.
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 4e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},
    torch.float16: {"rtol": 2**-9, "atol": 2**-8},
}
DTYPES = list(TOLERANCE)
LSE = {"rtol": 1e-5, "atol": 2e-5}


def case(length: int, dim: int, block: int, topk: int, **changes: object) -> Case:
    """A batch of one with 8 heads on 2, a sink, on the grid where routing has no near-tie."""
    named = dict(batch=1, kv_heads=2, group=4, queries=length, length=length, sinks=1)
    named |= dict(dim=dim, value_dim=dim, block=block, topk=topk)
    return Case(**(named | changes))  # type: ignore[arg-type]


REAL = [
    ("128/8, D 64", case(4096, 64, 128, 8)),
    ("128/8, D 128", case(4096, 128, 128, 8)),
    ("512/3, D 128", case(4096, 128, 512, 3)),
    ("64/16, an odd length", case(3989, 64, 64, 16)),
    ("16/40, more blocks than a register's table of 32", case(2048, 64, 16, 40)),
    ("32/80, beyond a table in registers", case(4096, 64, 32, 80)),
    ("the own block alone", case(4096, 128, 128, 1, sinks=0)),
    ("dense", case(4096, 128, 4096, 2)),
    ("D 96", case(2048, 96, 128, 4)),
    ("D 192, values of 128", case(2048, 192, 128, 4, value_dim=128)),
    ("D 256", case(2048, 256, 128, 4)),
    ("D 512", case(1024, 512, 128, 3)),
    ("D 72, values of 40", case(2048, 72, 128, 4, value_dim=40)),
    ("no groups", case(4096, 128, 128, 8, kv_heads=4, group=1)),
    ("a group of 12", case(2048, 128, 128, 8, kv_heads=1, group=12)),
    ("bidirectional", case(4096, 64, 128, 8, causal=False)),
    ("left padding", case(4096, 64, 128, 8, padding="left", batch=2)),
    ("packed", case(2048, 64, 64, 4, packing="runs", batch=2)),
    ("a bias and a softcap", case(2048, 64, 128, 8, bias="by head", scale=0.25, softcap=4.0)),
    ("heads before tokens, strided", case(2048, 64, 128, 8, layout="strided")),
]
DECODE = [
    *((f"batch {batch}, {queries} queries", case(4096, 128, 128, 8, batch=batch, queries=queries))
      for batch in (1, 3, 32) for queries in (1, 2, 8)),
    ("batch 256", case(1024, 64, 64, 4, batch=256, queries=1)),
    ("padding", case(4096, 128, 128, 8, batch=4, queries=1, padding="left")),
    ("one block of 4096", case(4096, 128, 4096, 2, queries=1)),
    ("512 blocks, shared by programs", case(16384, 128, 32, 8, queries=1)),
    ("a block for each processor", case(16384, 128, 4096, 3, queries=1)),
]  # fmt: skip


def named(case: Case) -> dict[str, object]:
    """The settings of a case, on the GPU."""
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in case.named().items()}


def leaves(case: Case) -> list[Tensor]:
    inputs = [tensor.cuda() for tensor in case.inputs()]
    bias = case.full_bias()
    return [
        x.detach().requires_grad_() for x in (*inputs, *(() if bias is None else [bias.cuda()]))
    ]


def results(
    attention: Callable[..., tuple[Tensor, Tensor]], case: Case, upcast: bool = False
) -> list[Tensor]:
    """out, lse and the gradients of every leaf. Upcast: of the same numbers in float32."""
    inputs = leaves(case)
    if upcast:
        inputs = [x.detach().float().requires_grad_() for x in inputs]
    settings = named(case) | ({"key_bias": inputs[3]} if len(inputs) > 3 else {})
    out, lse = attention(*inputs[:3], case.block, case.topk, **settings)
    generator = torch.Generator("cuda").manual_seed(1)
    grads = [
        torch.randint(-8, 9, x.shape, generator=generator, device="cuda").to(x) / 8
        for x in (out, lse)
    ]
    seen = ~lse.isneginf()
    return [out, lse, *torch.autograd.grad((out, lse), inputs, (grads[0], grads[1] * seen))]


def ours(*arguments: object, **settings: object) -> tuple[Tensor, Tensor]:
    return moonfx.moba_attention(*arguments, **settings, return_lse=True)  # type: ignore[call-overload,no-any-return]


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, block: int, topk: int, **settings: Any
) -> tuple[Tensor, Tensor]:
    return reference.moba_attention(query, key, value, MobaArguments(block, topk, **settings))


def rows(table: list[tuple[str, Case]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [row[1] for row in table], ids=[row[0] for row in table])


@rows(REAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_equal_the_reference_on_upcast_inputs(case, dtype):
    case = case.but(dtype=dtype)
    got, expected = results(ours, case), results(by_definition, case, upcast=True)
    names = ("out", "lse", "dq", "dk", "dv", "dbias")
    for name, mine, theirs in zip(names, got, expected):
        assert mine.dtype == (torch.float32 if name in ("lse", "dbias") else dtype), name
        tolerance = LSE if name == "lse" else TOLERANCE[dtype]
        torch.testing.assert_close(
            mine.float(), theirs, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@rows(DECODE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_few_queries_equal_the_reference_on_upcast_inputs(case, dtype):
    case = case.but(dtype=dtype)
    inputs = [x.detach() for x in leaves(case)]
    out, lse = ours(*inputs, case.block, case.topk, **named(case))
    upcast = [x.float() for x in inputs]
    expected = reference.moba_attention(
        *upcast, MobaArguments(case.block, case.topk, **named(case))
    )
    torch.testing.assert_close(out.float(), expected[0], **TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected[1], **LSE)


def test_a_million_tokens_reach_every_offset():
    """The paper's setting; a tensor has more than 2**31 elements. The last queries are compared."""
    length, few = 1 << 20, 8
    if torch.cuda.get_device_properties(0).total_memory < 70 << 30:
        pytest.skip("needs 70 GB of GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randint(-8, 9, (1, length, heads, 128), generator=generator, device="cuda")
        .to(torch.bfloat16)
        .transpose(1, 2)
        .div_(8)
        for heads in (32, 8, 8)
    )
    with torch.no_grad():
        out = moonfx.moba_attention(query, key, value, 4096, 12)
        tail = query[:, :, -few:]
        decoded = moonfx.moba_attention(tail, key, value, 4096, 12)
        expected = [
            reference.moba_attention(
                *(tail[:, 4 * h : 4 * h + 4].float(), key[:, h : h + 1].float()),
                value[:, h : h + 1].float(),
                MobaArguments(4096, 12),
            )[0]
            for h in range(8)
        ]
    for got in (out[:, :, -few:], decoded):
        torch.testing.assert_close(got.float(), torch.cat(expected, 1), rtol=2**-6, atol=2**-8)


def drawn(length: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Off the grid, where another order of summation would show. One block is every row's."""
    return [
        torch.randn(2, length, heads, 64, device="cuda", dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (8, 2, 2)
    ]


def train(inputs: list[Tensor], **settings: object) -> list[Tensor]:
    """out, lse and gradients at 64/4 with a sink."""
    out, lse = ours(*inputs, 64, 4, sinks=1, **settings)
    return [out, lse, *torch.autograd.grad((out, lse), inputs, (out.detach(), lse.detach()))]


@contextmanager
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_backward_repeat_bit_for_bit(dtype, packed, monkeypatch):
    inputs = drawn(2000, dtype)
    segments = torch.arange(2000, device="cuda").div(300, rounding_mode="floor").expand(2, -1)
    settings = {"segments": segments} if packed else {}
    with deterministic(monkeypatch):
        first = train(inputs, **settings)
        for _ in range(10):
            # What else runs, and where memory lies, differ from run to run.
            torch.randn(1 << 20, device="cuda").sort()
            again = train(inputs, **settings)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_tensors_of_another_gpu_are_read_there():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = drawn(2000)
    others = [x.detach().to("cuda:1").requires_grad_() for x in inputs]
    torch.cuda.synchronize()
    for here, there in zip(train(inputs), train(others), strict=True):
        assert there.device.index == 1
        torch.testing.assert_close(here.cpu(), there.cpu())
    assert torch.cuda.current_device() == 0


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("packed", [False, True])
def test_the_host_never_waits_for_the_gpu(packed):
    inputs = drawn(2000)
    mask = torch.rand(2, 2000, device="cuda") > 0.2
    segments = torch.randint(0, 5, (2, 2000), device="cuda")
    settings = {"key_mask": mask, "segments": segments} if packed else {}
    train(inputs, **settings)  # compiles
    with no_waiting():
        train(inputs, **settings)
        moonfx.moba_attention(inputs[0][:, :, -1:], *inputs[1:], 64, 4, sinks=1)


def test_a_cuda_graph_replays_forward_and_backward_on_other_inputs():
    inputs = drawn(2000)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and fills the allocator
            train(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(inputs)
    for _ in range(3):
        with torch.no_grad():
            for x in inputs:
                x.copy_(torch.randn_like(x))
        graph.replay()
        expected = train(inputs)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_a_cuda_graph_replays_decoding_over_a_cache_that_changes():
    query, key, value = (x.detach() for x in drawn(4096))
    query = query[:, :, -1:].contiguous()
    moonfx.moba_attention(query, key, value, 64, 4, sinks=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moonfx.moba_attention(query, key, value, 64, 4, sinks=1)
    for _ in range(3):
        for x in (query, key, value):
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, moonfx.moba_attention(query, key, value, 64, 4, sinks=1))


def test_a_new_length_compiles_nothing():
    import triton

    train(drawn(2048))
    compiled: list[str] = []

    def note(*, fn: object, **_: object) -> None:
        compiled.append(str(fn))

    with mock.patch.object(triton.knobs.runtime, "jit_post_compile_hook", note):
        for length in (2064, 2049, 3333, 4096):
            train(drawn(length))
    assert compiled == []


def peak(step: Callable[[], object]) -> int:
    """Bytes that a step allocates at its peak, beyond what was there."""
    step()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_training_at_64k_takes_little_more_memory_than_dense_flash_attention():
    """FlashMoBA's setting: batch 2, 16 heads of 128, blocks of 128, 8 of them."""
    shape = 2, 1 << 16, 16, 128
    query, key, value = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    upstream = torch.randn_like(query)
    inputs = query, key, value

    def sparse() -> tuple[Tensor, ...]:
        return torch.autograd.grad(moonfx.moba_attention(*inputs, 128, 8), inputs, upstream)

    def dense() -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*inputs, is_causal=True)
        return torch.autograd.grad(out, inputs, upstream)

    held = sum(x.nbytes for x in (*inputs, upstream))
    ours, theirs = held + peak(sparse), held + peak(dense)
    assert ours <= 1.2 * theirs, f"{ours / theirs:.2f}: {ours >> 20} and {theirs >> 20} MiB"


SANITIZED = """
import torch, moonfx
for dtype in (torch.bfloat16, torch.float32):
    for length, dim, named in [
        (130, 16, {}),
        (130, 24, {"segments": torch.arange(130, device="cuda").expand(2, -1) // 50}),
        (130, 16, {"key_mask": torch.arange(130, device="cuda").expand(2, -1) > 9}),
        (40, 16, {"key_bias": torch.randn(2, 4, 40, device="cuda"), "softcap": 5.0}),
        (20, 16, {}),  # dense
    ]:
        inputs = [
            torch.randn(2, heads, length, dim, device="cuda", dtype=dtype, requires_grad=True)
            for heads in (4, 2, 2)
        ]
        moonfx.moba_attention(*inputs, 16, 3, sinks=1, **named).sum().backward()
    moonfx.moba_attention(inputs[0][:, :, -1:], *inputs[1:], 16, 1)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool, monkeypatch):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit, on PATH")
    # Each tensor in an allocation of its own, so that one past its end is seen.
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]


def test_the_operator_runs_these_kernels_here():
    from moonfx.ops import dispatch

    arguments = MobaArguments(64, 4)
    assert arguments.causal
    assert dispatch.kernel_for(torch.device("cuda")).__name__ == "moonfx.kernels.gpu.moba"
