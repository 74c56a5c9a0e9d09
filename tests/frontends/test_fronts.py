"""Every front end, one road: the same attentions are found, and the same numbers computed."""

import io
import math
import shutil
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export, load, save

import moonfx
from moonfx import LayerPolicy
from moonfx.backend.on_miss import NothingRewritten
from moonfx.report.report import Report
from tests.support.tiny import Plain

WIDTH, HEADS, WORDS, N = 32, 4, 50, 72
EAGER = {"compiler": "eager"}

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_matmul(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """nanoGPT's: masked_fill, softmax."""
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(WIDTH // HEADS))
    causal = torch.ones_like(scores, dtype=torch.bool).tril()
    scores = scores.masked_fill(causal.logical_not(), float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1), 0.1, False) @ v


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Llama's: a mask of causality and padding, fewer key heads than query heads."""
    square = (q[..., :1] * 0 + k[..., :1].mean(1, keepdim=True).transpose(-2, -1)) * 0 == 0
    keep = square.tril() & (padding[:, None, None, :] != 0)
    k, v = (x[:, : HEADS // 2] for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, keep, enable_gqa=True)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / (WIDTH // HEADS) ** 0.5
    causal = torch.ones_like(scores).tril()
    scores = torch.where(causal == 0, torch.finfo(torch.float32).min, scores)
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(scores, -1), v)


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend = attend

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2) for y in (q, k, v))
        return self.out(self.attend(q, k, v, padding).transpose(1, 2).flatten(2))


class LM(nn.Module):
    def __init__(self, attend: Attend, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(Attention(attend) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(self.norm(x), padding)
        return self.head(x)


MODELS = [("nanoGPT", by_matmul), ("llama", by_sdpa), ("einsum", by_einsum)]
IDS = [name for name, _ in MODELS]


def model_of(attend: Attend, layers: int = 2) -> LM:
    torch.manual_seed(0)
    return LM(attend, layers).eval()


def inputs(length: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WORDS, (2, length), generator=generator)
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    return ids, padding


def exported(attend: Attend, layers: int = 2, **options: bool) -> ExportedProgram:
    n = Dim("n", min=8, max=512)
    shapes = {"ids": {1: n}, "padding": {1: n}}
    return export(model_of(attend, layers), inputs(), dynamic_shapes=shapes, **options)


def by_module(attend: Attend) -> tuple[Tensor, Report]:
    model = moonfx.sparsify(model_of(attend), 8, 3, **EAGER)
    return model(*inputs()), moonfx.report(model)


def by_program(attend: Attend) -> tuple[Tensor, Report]:
    program = moonfx.sparsify(exported(attend), 8, 3)
    return program.module()(*inputs()), moonfx.report(program)


def by_strict_program(attend: Attend) -> tuple[Tensor, Report]:
    program = moonfx.sparsify(exported(attend, strict=True), 8, 3)
    return program.module()(*inputs()), moonfx.report(program)


def by_graph_module(attend: Attend) -> tuple[Tensor, Report]:
    sparse = moonfx.sparsify(fx.symbolic_trace(model_of(attend)), 8, 3, **EAGER)
    return sparse(*inputs()), moonfx.report(sparse)


def by_unlifted_program(attend: Attend) -> tuple[Tensor, Report]:
    sparse = moonfx.sparsify(exported(attend).module(), 8, 3, **EAGER)
    return sparse(*inputs()), moonfx.report(sparse)


def by_compile(attend: Attend) -> tuple[Tensor, Report]:
    model = model_of(attend)
    options = {"block": 8, "topk": 3, **EAGER}
    out = torch.compile(model, backend="moonfx", options=options)(*inputs())  # type: ignore[arg-type]
    return out, moonfx.report(model)


def sites(report: Report) -> list[tuple[object, ...]]:
    """What every front end must agree on; without the model, a layer's place in it is unknown."""
    assert report.failures == []
    return [
        (r.layer, r.form, r.mask, r.action, r.policy, r.heads, r.kv_heads, r.head_dim)
        for r in report.rows
    ]


@pytest.mark.parametrize("attend", [a for _, a in MODELS], ids=IDS)
def test_every_front_end_finds_the_same_attentions_and_computes_the_same(attend) -> None:
    dense = model_of(attend)(*inputs())
    expected, report = by_module(attend)
    assert [r.layer for r in report.rows] == [f"layers.{i}" for i in range(2)]
    assert {r.action for r in report.rows} == {"sparse"}
    real = inputs()[1] == 1
    assert (expected - dense)[real].abs().max() > 1e-3
    ways = (by_program, by_strict_program, by_graph_module, by_unlifted_program, by_compile)
    for way in ways if attend is by_matmul else ways[::2]:
        found, its = way(attend)
        assert sites(its) == sites(report), way.__name__
        # The same operators in the same order: equal but for how a product is laid out.
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5, msg=way.__name__)


def test_a_program_keeps_its_state_signature_and_dynamic_lengths() -> None:
    program = exported(by_matmul)
    before = str(program)
    sparse = moonfx.sparsify(program, 8, 3)
    assert str(program) == before
    assert sparse is not program
    assert "moba_attention" in str(sparse.graph)
    assert "softmax" not in str(sparse.graph)
    assert sparse.range_constraints == program.range_constraints
    assert str(sparse.graph_signature.input_specs) == str(program.graph_signature.input_specs)
    assert [s.kind for s in sparse.graph_signature.output_specs] == [
        s.kind for s in program.graph_signature.output_specs
    ]
    assert sparse.state_dict.keys() == program.state_dict.keys()
    same = (sparse.state_dict[k].data_ptr() == v.data_ptr() for k, v in program.state_dict.items())
    assert all(same), "the state is shared, not copied"
    reference = moonfx.sparsify(model_of(by_matmul), 8, 3, **EAGER)
    for length in (9, 40, 131):
        found = sparse.module()(*inputs(length))
        torch.testing.assert_close(found, reference(*inputs(length)), atol=2e-6, rtol=1e-5)


def test_a_rewritten_program_is_saved_loaded_decomposed_and_exported_again() -> None:
    sparse = moonfx.sparsify(exported(by_sdpa), 8, 3)
    expected = sparse.module()(*inputs())
    file = io.BytesIO()
    save(sparse, file)
    file.seek(0)
    loaded = load(file)
    for again in (loaded, sparse.run_decompositions(), export(sparse.module(), inputs())):
        assert str(again.graph).count("moonfx.moba_attention.default") == 2
        torch.testing.assert_close(again.module()(*inputs()), expected, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="a report is not saved"):
        moonfx.report(loaded)


def test_a_rewritten_program_trains_as_the_module_does() -> None:
    program = moonfx.sparsify(exported(by_einsum), 8, 3).module()
    module = moonfx.sparsify(model_of(by_einsum), 8, 3, **EAGER)
    for model in (program, module):
        model(*inputs()).square().mean().backward()
    expected = dict(module.named_parameters())
    for name, parameter in program.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-6, rtol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_rewritten_program_is_packaged_by_aot_inductor(tmp_path) -> None:
    sparse = moonfx.sparsify(exported(by_matmul, layers=1), 8, 3)
    path = torch._inductor.aoti_compile_and_package(sparse, package_path=str(tmp_path / "m.pt2"))
    package = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        for length in (N, 40):
            expected = sparse.module()(*inputs(length))
            found = package(*inputs(length))
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


class OnlyAttention(nn.Module):
    """The attention is the graph's own output, whose name is in the signature."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return q + 1, F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_an_attention_that_is_the_programs_output_keeps_the_signature_true() -> None:
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    program = moonfx.sparsify(export(OnlyAttention(), (q, k, v)), 8, 3)
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    names = [spec.arg.name for spec in program.graph_signature.output_specs]
    assert names == [n.name for n in output.args[0]]
    expected = moonfx.moba_attention(q, k, v, 8, 3, sinks=1)
    torch.testing.assert_close(program.module()(q, k, v)[1], expected)


@pytest.mark.parametrize("front", ["program", "graph module"])
def test_every_front_end_honours_the_policy_of_each_layer(front: str) -> None:
    policy = {"layers": {"layers.1": None, "re:0$": LayerPolicy(4, 5)}, "dense_last": 1}
    if front == "program":
        program = exported(by_matmul, layers=3)
        report = moonfx.report(moonfx.sparsify(program, 8, 3, **policy))
        assert moonfx.explain(program, block=8, topk=3, **policy).rows == report.rows
    else:
        gm = fx.symbolic_trace(model_of(by_matmul, layers=3))
        sparse = moonfx.sparsify(gm, 8, 3, **policy, **EAGER)
        sparse(*inputs())
        report = moonfx.report(sparse)
        assert moonfx.explain(gm, *inputs(), block=8, topk=3, **policy).rows == report.rows
    assert [str(r.policy or r.reason) for r in report.rows] == [
        "4/5/1",
        "kept dense by the policy",
        "one of the last 1 (dense_last)",
    ]


def test_a_graph_module_stays_dense_and_its_sparse_copy_shares_the_parameters() -> None:
    gm = fx.symbolic_trace(model_of(by_matmul))
    calls: list[int] = []
    gm.register_forward_pre_hook(lambda *_: calls.append(1))
    dense = gm(*inputs())
    sparse = moonfx.sparsify(gm, 8, 3, **EAGER)
    assert isinstance(sparse, fx.GraphModule)
    assert sparse is not gm
    first = sparse(*inputs())
    assert torch.equal(gm(*inputs()), dense)
    assert not torch.equal(first, dense)
    assert len(calls) == 3, "the copy keeps the hooks"
    assert {id(p) for p in sparse.parameters()} == {id(p) for p in gm.parameters()}
    again = moonfx.sparsify(sparse, 8, 9, **EAGER)
    torch.testing.assert_close(again(*inputs()), dense, atol=2e-6, rtol=1e-5)
    assert torch.equal(sparse(*inputs()), first)
    assert torch.equal(moonfx.restore(sparse)(*inputs()), dense)


@pytest.mark.parametrize("form", [by_matmul, by_sdpa], ids=["matmul", "sdpa"])
def test_a_decomposed_program_is_rewritten(form: Callable[..., Tensor]) -> None:
    """scaled_dot_product_attention decomposes to the flash attention of the CPU."""
    sparse = moonfx.sparsify(exported(form).run_decompositions(), 8, 3)
    assert len(moonfx.report(sparse).rewritten) == 2
    expected, _ = by_module(form)
    torch.testing.assert_close(sparse.module()(*inputs()), expected, atol=2e-6, rtol=1e-5)


def test_a_program_without_attention_warns_raises_or_is_ignored() -> None:
    program, x = export(Plain(), (torch.randn(2, 8),)), torch.randn(2, 8)
    with pytest.warns(UserWarning, match="no attention of the ExportedProgram became sparse"):
        sparse = moonfx.sparsify(program, 8, 3)
    assert torch.equal(sparse.module()(x), program.module()(x))
    with pytest.raises(NothingRewritten):
        moonfx.sparsify(program, 8, 3, on_miss="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moonfx.sparsify(program, 8, 3, on_miss="ignore")


def test_what_does_not_apply_to_a_program_is_one_clear_error() -> None:
    program = exported(by_matmul)
    with pytest.raises(ValueError, match="compiler='eager' is not for an ExportedProgram"):
        moonfx.sparsify(program, 8, 3, compiler="eager")
    with pytest.raises(TypeError, match="give no call arguments"):
        moonfx.explain(program, *inputs())
    with pytest.raises(ValueError, match=r"no module of that name; nearest: .*layers.0"):
        moonfx.sparsify(program, 8, 3, layers={"layer.0": None})
    with pytest.raises(ValueError, match="must come from moonfx.sparsify in this process"):
        moonfx.report(program)
