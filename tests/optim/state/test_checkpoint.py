"""A run resumed from a checkpoint goes on bit for bit; that of an AdamW is converted, and says so.

The parts: the same process, another process, torch.distributed.checkpoint, other dtypes, misfits.
"""

import copy
import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import moonfx
from moonfx.optim.matrices import Layout
from tests.support.optim.nets import ON_MUON, equal, net, train
from tests.support.optim.sources import BitsandbytesAdamW

pytestmark = pytest.mark.filterwarnings("error")

ROOT = Path(__file__).resolve().parents[3]


class Run:
    """A model, its converted optimizer and a scheduler that was made before the conversion."""

    def __init__(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, warmup: int = 0, **options: Any
    ) -> None:
        self.model = net(seed, dtype)
        adamw = AdamW(self.model.parameters(), lr=0.01)
        self.scheduler: LRScheduler = CosineAnnealingLR(adamw, T_max=20)
        self.step = 0
        self.optimizer: Any = adamw
        self.train(warmup)
        self.optimizer = moonfx.convert_optimizer(adamw, self.model, **options)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            train(self.model, self.optimizer, range(self.step, self.step + 1))
            self.scheduler.step()
            self.step += 1

    def save(self, path: Path) -> None:
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "step": self.step,
            },
            path,
        )

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)  # plain data and tensors: no code to trust
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.step = saved["step"]


def assert_same(a: Run, b: Run) -> None:
    """Weights, states and groups are equal bit for bit."""
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        mine, other = a.optimizer.state[p], b.optimizer.state[q]
        assert list(mine) == list(other)
        for key, value in mine.items():
            assert equal(value, other[key]), (name, key)
    without = [
        [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups]
        for run in (a, b)
    ]
    assert without[0] == without[1]


@pytest.mark.parametrize("kept_in", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_run_resumed_in_one_process_is_the_uninterrupted_one(
    warmup, dtype, kept_in, tmp_path
) -> None:
    if kept_in:
        pytest.importorskip("torchao", reason="needs torchao")
    run = Run(dtype=dtype, warmup=warmup, momentum_dtype=kept_in)
    run.train(3)
    run.save(tmp_path / "checkpoint")
    # No AdamW state, other weights: all comes from the file.
    resumed = Run(seed=1, dtype=dtype, momentum_dtype=kept_in)
    resumed.load(tmp_path / "checkpoint")
    run.train(3)
    resumed.train(3)
    assert_same(run, resumed)


CONTINUE = """
import sys
from pathlib import Path
import torch
from tests.optim.state.test_checkpoint import Run
folder = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))  # the sums of a product go by threads
for dtype in (torch.float32, torch.bfloat16):
    run = Run(seed=1, dtype=dtype)
    run.load(folder / f"before {dtype}")
    run.train(3)
    run.save(folder / f"after {dtype}")
"""


def test_a_run_resumed_in_another_process_is_the_uninterrupted_one(tmp_path) -> None:
    runs = {dtype: Run(dtype=dtype, warmup=2) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, run in runs.items():
        run.train(2)
        run.save(tmp_path / f"before {dtype}")
        run.train(3)
    words = [sys.executable, "-c", CONTINUE, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(words, cwd=ROOT, check=True, timeout=300)
    for dtype, run in runs.items():
        other = Run(seed=2, dtype=dtype)
        other.load(tmp_path / f"after {dtype}")
        assert_same(run, other)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_run_resumed_by_torch_distributed_checkpoint_is_the_uninterrupted_one(
    flatten, tmp_path
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    run = Run(warmup=2)
    run.train(2)
    saved = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer, options=options))
    torch.save(saved, tmp_path / "optimizer")
    resumed = Run(seed=1)
    resumed.model.load_state_dict(run.model.state_dict())
    set_optimizer_state_dict(
        resumed.model,
        resumed.optimizer,
        torch.load(tmp_path / "optimizer", weights_only=True),
        options=options,
    )
    resumed.scheduler.load_state_dict(run.scheduler.state_dict())
    resumed.step = run.step
    run.train(3)
    resumed.train(3)
    assert_same(run, resumed)


def test_distributed_checkpoint_writes_and_reads_files(tmp_path) -> None:
    import torch.distributed.checkpoint as dcp

    def flat(run: Run) -> Any:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        return get_optimizer_state_dict(run.model, run.optimizer, options=options)

    run = Run(warmup=2)
    run.train(2)
    resumed = Run(seed=1)
    into = flat(resumed)
    with warnings.catch_warnings():  # it says that there is one process only
        warnings.simplefilter("ignore")
        dcp.save(flat(run), checkpoint_id=tmp_path / "checkpoint", no_dist=True)
        dcp.load(into, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_optimizer_state_dict(resumed.model, resumed.optimizer, into, options=options)
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.scheduler.load_state_dict(run.scheduler.state_dict())
    resumed.step = run.step
    run.train(2)
    resumed.train(2)
    assert_same(run, resumed)


def test_the_schedulers_of_the_adamw_drive_on_after_a_load(tmp_path) -> None:
    run = Run(warmup=1)
    groups = list(run.optimizer.param_groups)
    run.save(tmp_path / "checkpoint")
    run.load(tmp_path / "checkpoint")
    assert all(a is b for a, b in zip(groups, run.optimizer.param_groups, strict=True))
    run.train(2)
    (lr,) = run.scheduler.get_last_lr()
    assert run.optimizer.param_groups[0]["lr"] == lr < 0.01


# --- dtypes ---------------------------------------------------------------------------------------


def test_a_float32_momentum_of_bfloat16_weights_and_the_step_keep_their_dtype() -> None:
    """torch's own load would cast both states to the parameter's dtype; 257 is no bfloat16."""
    model = net(dtype=torch.bfloat16)
    muon = moonfx.convert_optimizer(BitsandbytesAdamW(model.parameters()), model)
    train(model, muon, range(1))
    up = model.up.weight
    muon.state[up]["momentum_buffer"] = torch.randn_like(up, dtype=torch.float32)
    muon.state[up]["step"].fill_(257)
    saved = copy.deepcopy(muon.state_dict())
    again = moonfx.convert_optimizer(BitsandbytesAdamW(model.parameters()), model)
    again.load_state_dict(saved)
    assert again.state[up]["momentum_buffer"].dtype is torch.float32
    assert torch.equal(again.state[up]["momentum_buffer"], muon.state[up]["momentum_buffer"])
    assert again.state[up]["step"] == 257
    # Nor are the bytes and maps of quantized states cast.
    eight = BitsandbytesAdamW(model.parameters(), bits=8)
    muon = moonfx.convert_optimizer(eight, model)
    train(model, muon, range(2))
    again = moonfx.convert_optimizer(BitsandbytesAdamW(model.parameters(), bits=8), model)
    # torchao's states cannot be deep-copied, but pickled.
    again.load_state_dict(pickle.loads(pickle.dumps(muon.state_dict())))
    for p in model.parameters():
        assert all(equal(value, again.state[p][key]) for key, value in muon.state[p].items())


def test_the_adamw_part_takes_its_parameters_dtype_as_in_torchs_own_load() -> None:
    wide, narrow = Run(), Run(dtype=torch.bfloat16)
    wide.train(1)
    narrow.optimizer.load_state_dict(wide.optimizer.state_dict())
    assert narrow.optimizer.state[narrow.model.embed.weight]["exp_avg"].dtype is torch.bfloat16
    up = narrow.model.up.weight
    assert narrow.optimizer.state[up]["momentum_buffer"].dtype is torch.float32
    narrow.train(1)


def test_a_tensor_lr_stays_one_whatever_was_saved() -> None:
    model = net()
    muon = moonfx.convert_optimizer(AdamW(model.parameters(), lr=torch.tensor(0.5)), model)
    muon.load_state_dict(
        moonfx.convert_optimizer(AdamW(model.parameters(), lr=0.25), model).state_dict()
    )
    lr = muon.param_groups[0]["lr"]
    assert isinstance(lr, torch.Tensor)
    assert lr == 0.25


# --- an AdamW's checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [AdamW, BitsandbytesAdamW, partial(BitsandbytesAdamW, bits=8)],
    ids=["AdamW", "bitsandbytes", "bitsandbytes 8-bit"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_an_adamws_state_dict_becomes_what_a_conversion_would_have_made_of_it(kind, nested) -> None:
    model = net()
    adamw = kind(model.parameters(), lr=0.01)
    train(model, adamw, range(3))
    saved = copy.deepcopy(adamw.state_dict())
    if nested:  # as bitsandbytes saves what is quantized
        saved["state"] = {
            k: {"step": s["step"], "quantized": {x: y for x, y in s.items() if x != "step"}}
            for k, s in saved["state"].items()
        }
    expected = moonfx.convert_optimizer(adamw, model)
    loaded = moonfx.convert_optimizer(kind(model.parameters()), model)
    said = "AdamW state_dict .* first moments of 2 parameters .* 6 stay AdamW's"
    with pytest.warns(UserWarning, match=said) as caught:
        loaded.load_state_dict(saved)
    assert [w.filename for w in caught] == [__file__]
    known = [[o.facts[p].second_moment for p in model.parameters()] for o in (loaded, expected)]
    assert known[0] == known[1]
    assert loaded.param_groups[0]["lr"] == 0.01
    for p in model.parameters():
        mine, other = loaded.state[p], expected.state[p]
        assert list(mine) == list(other)
        for key, value in mine.items():
            assert equal(value, other[key]), key
    train(model, loaded, range(3, 5))


def test_the_way_back_after_a_load_is_from_what_was_loaded() -> None:
    run = Run(warmup=2)
    run.train(3)
    fresh = Run(seed=1, warmup=1)  # has not stepped yet: the AdamW is still whole
    fresh.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    back = moonfx.to_adamw(fresh.optimizer)
    momentum = run.optimizer.state[run.model.up.weight]["momentum_buffer"]
    first = back.state[fresh.model.up.weight]["exp_avg"]
    torch.testing.assert_close(first, momentum * (1 - 0.9**5))


def test_a_plain_adamw_cannot_go_on_from_a_muons_state_dict() -> None:
    """It takes it without a word: that is torch's, and said in convert_optimizer's docstring."""
    model = net()
    adamw = AdamW(model.parameters())
    adamw.load_state_dict(saved_of())
    with pytest.raises(KeyError, match="exp_avg"):
        train(model, adamw, range(1))
    with pytest.raises(ValueError, match="convert first, then load"):
        moonfx.convert_optimizer(adamw, model)


# --- misfits --------------------------------------------------------------------------------------


def saved_of(**changes: Any) -> dict[str, Any]:
    run = Run(**changes)
    run.train(1)
    state: dict[str, Any] = copy.deepcopy(run.optimizer.state_dict())
    return state


def of_sgd() -> dict[str, Any]:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, sgd, range(1))
    return sgd.state_dict()


def of_fewer() -> dict[str, Any]:
    model = net()
    adamw = AdamW(list(model.parameters())[:-1])
    return adamw.state_dict()


def of_two_groups() -> dict[str, Any]:
    first, *rest = net().parameters()
    return AdamW([{"params": [first]}, {"params": rest}]).state_dict()


def of_other_order() -> dict[str, Any]:
    model = net()
    adamw = AdamW(list(model.parameters())[::-1])
    train(model, adamw, range(1))
    return adamw.state_dict()


MISFITS = [
    # name, the state_dict, the error, what it says
    ("another role", lambda: saved_of(roles={"up.weight": "adamw"}), ValueError,
     "up.weight is on 'muon' here and on 'adamw' in state_dict"),
    ("SGD's", of_sgd, ValueError, "momentum_buffer of embed.weight, which is neither"),
    ("fewer parameters", of_fewer, ValueError, "7 parameters in group 0, the optimizer 8"),
    ("more groups", of_two_groups, ValueError, "state_dict has 2 groups, the optimizer 1"),
    ("another order", of_other_order, ValueError, r"shape \[64, 128\] for norm.bias, which has"),
    ("a model's", lambda: net().state_dict(), TypeError, "must be an optimizer's"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "kind", "words"), [m[1:] for m in MISFITS], ids=[m[0] for m in MISFITS]
)
def test_a_state_dict_that_does_not_fit_is_named_and_changes_nothing(make, kind, words) -> None:
    run = Run(warmup=1)
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(kind, match=words):
        run.optimizer.load_state_dict(make())
    after = run.optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, state in before["state"].items():
        assert all(equal(v, after["state"][key][k]) for k, v in state.items())
    run.train(1)


def test_hooks_of_load_state_dict_run_before_and_after_and_may_replace_it() -> None:
    run, seen = Run(), []
    other = saved_of()

    def before(optimizer: Any, state_dict: Any) -> Any:
        seen.append(optimizer.state[run.model.up.weight].get("step"))
        return other

    def after(optimizer: Any) -> None:
        seen.append(float(optimizer.state[run.model.up.weight]["step"]))

    run.optimizer.register_load_state_dict_pre_hook(before)
    run.optimizer.register_load_state_dict_post_hook(after)
    run.optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert seen == [None, 1.0]


def test_a_layout_that_was_saved_is_the_one_that_goes_on() -> None:
    """A resumed run that sees less (no example) must not orthogonalize a fused matrix as one."""
    layout = Layout(sizes=(64, 64))
    model = net()
    muon = moonfx.convert_optimizer(AdamW(model.parameters()), model, roles={"up.weight": layout})
    again = moonfx.convert_optimizer(AdamW(model.parameters()), model)
    assert again.table[3].layout != layout
    again.load_state_dict(muon.state_dict())
    assert again.table[3].name == ON_MUON[0]
    assert again.table[3].layout == layout
