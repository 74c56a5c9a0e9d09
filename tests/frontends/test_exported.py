"""The verbs on an ExportedProgram: a new program of the same state, signature and lengths."""

import io
import shutil
import warnings

import pytest
import torch
from torch.export import export, load, save

import moonfx
from moonfx.backend.on_miss import NothingRewritten
from tests.support.front_ends import (
    EAGER,
    N,
    by_einsum,
    by_matmul,
    by_sdpa,
    exported,
    inputs,
    model_of,
)
from tests.support.tiny import Plain


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
