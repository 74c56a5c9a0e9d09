"""Who takes part: all compute the same attention."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import profile

from moonfx.bench.attention import (
    contenders,
    flex,
)
from moonfx.bench.attention.cases import PASSES
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from tests.support.bench_cases import CPU, SPARSE, close, results_of


@pytest.mark.parametrize("work", PASSES)
def test_all_contenders_compute_the_same(work):
    """Dense, too, where the blocks cover the sequence."""
    case = replace(SPARSE, work=work)
    given = contenders.inputs(case, CPU)
    expected = contenders.by_definition(case, given, 256)()
    close(contenders.moonfx(case, given)(), expected)
    covered = replace(case, length=64, queries=64, topk=2)
    given = contenders.inputs(covered, CPU)
    expected = contenders.moonfx(covered, given)()
    close(contenders.dense(covered, given, "enable_gqa")(), expected)
    if work == "forward":  # else keys and values have more gradients
        close(contenders.dense(covered, given, "expanded")(), expected)


@pytest.mark.parametrize("queries", [1, 3])
def test_dense_queries_stand_at_the_end_of_the_keys(queries):
    case = replace(SPARSE, length=64, queries=queries, topk=2)
    given = contenders.inputs(case, CPU)
    close(contenders.dense(case, given, "enable_gqa")(), contenders.moonfx(case, given)())


@pytest.mark.parametrize("queries", [1, 8])
def test_means_that_are_given_are_those_that_the_kernel_would_take(queries):
    case = replace(SPARSE, queries=queries)
    given = contenders.inputs(replace(case, means=True), CPU)
    assert given.means.shape == (2, 2, 8, 16)
    expected = contenders.by_definition(case, given, 256)()
    close(contenders.moonfx(case, given)(), expected)
    # They are what the gate reads: other means choose other blocks.
    other = contenders.moonfx(case, given._replace(means=-given.means))()
    assert not torch.allclose(other, expected, atol=1e-2)


def test_the_mask_of_flex_attention_lists_the_chosen_blocks_and_no_others():
    """Read from its tiles and its mask_mod, by the reference's choice."""
    case = replace(SPARSE, batch=1, length=1024, queries=1024, block=256, topk=2)
    given = contenders.inputs(case, CPU)
    chosen = reference.select_blocks(given.query, given.key, MobaArguments(256, 2, sinks=1))
    mask = flex.block_mask(case, given.query, given.key)
    tiles = torch.zeros(1, 4, 8, 9)
    for counts_of, index in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        listed = torch.arange(8) < counts_of[..., None]
        tiles.scatter_add_(-1, index.long().where(listed, torch.tensor(8)), listed.float())
    queries, keys = torch.arange(1024)[:, None], torch.arange(1024)
    wanted = chosen.repeat_interleave(256, -1) & (keys <= queries)
    by_tile = wanted.unflatten(3, (8, 128)).unflatten(2, (8, 128)).any(5).any(3)
    assert torch.equal(tiles[..., :8], by_tile.float())
    head = torch.arange(4)[:, None, None]
    assert torch.equal(mask.mask_mod(torch.tensor(0), head, queries, keys), wanted[0])


@pytest.mark.slow
def test_flex_attention_with_that_mask_is_this_attention():
    case = replace(SPARSE, batch=1, length=512, queries=512, block=128, topk=2)
    given = contenders.inputs(case, CPU)
    call, _ = flex.flex(case, given)
    close(call(), contenders.moonfx(case, given)())


def test_dense_runs_by_the_backend_that_is_asked_for(capsys):
    said = results_of(["--dense", "math", "--dtype", "float32", "--work", "forward"], capsys)
    assert said["where"]["dense"] == "math backend"
    given = contenders.inputs(SPARSE, CPU)
    for backend, runs in (
        ("math", "aten::_scaled_dot_product_attention_math"),
        ("auto", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ):
        with profile() as seen:
            contenders.dense(SPARSE, given, "enable_gqa", backend)()
        assert runs in {event.key for event in seen.key_averages()}
