"""Schedulers, and the training loops that others wrote, drive a converted optimizer as any other.

Each is compared with the same loop by hand, or with the AdamW that it was. Warnings are errors.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, lr_scheduler

import moonfx
from tests.support.optim.nets import VOCABULARY, Net, loss, net, tokens, train
from tests.support.optim.sources import SAM

pytestmark = pytest.mark.filterwarnings("error")

Scheduler = Any


def sequential(optimizer: Optimizer) -> Scheduler:
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[2])


def chained(optimizer: Optimizer) -> Scheduler:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def plateau(optimizer: Optimizer) -> Scheduler:
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


SCHEDULERS: list[tuple[str, Callable[[Optimizer], Scheduler]]] = [
    ("LambdaLR", lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t))),
    ("CosineAnnealingLR", lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6)),
    ("OneCycleLR", lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12)),
    ("CyclicLR", lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2)),
    ("SequentialLR", sequential),
    ("ChainedScheduler", chained),
    ("ReduceLROnPlateau", plateau),
]


def advance(scheduler: Scheduler) -> None:
    # A metric that never improves: each call after the first lowers the rate.
    scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("before", [0, 2], ids=["first step after", "mid-run"])
@pytest.mark.parametrize("make", [s[1] for s in SCHEDULERS], ids=[s[0] for s in SCHEDULERS])
def test_schedulers_drive_on_to_muon_and_back_as_if_nothing_had_happened(
    make, before, tensor_lr
) -> None:
    def adamw(model: nn.Module) -> AdamW:
        return AdamW(model.parameters(), lr=torch.tensor(0.1) if tensor_lr else 0.1)

    model, other = net(), net()
    optimizer: Optimizer
    optimizer, reference = adamw(model), adamw(other)
    scheduler, expected = make(optimizer), make(reference)
    for step in range(before + 6):
        if step == before:
            optimizer = moonfx.convert_optimizer(optimizer, model)
        if step == before + 3:
            assert isinstance(optimizer, moonfx.Muon)
            optimizer = moonfx.to_adamw(optimizer)
        for m, o, s in ((model, optimizer, scheduler), (other, reference, expected)):
            train(m, o, range(step, step + 1))
            advance(s)
        for group, wanted in zip(optimizer.param_groups, reference.param_groups, strict=True):
            assert group["lr"] == wanted["lr"]
            assert group["betas"] == wanted["betas"]
            cycled = isinstance(s, lr_scheduler.OneCycleLR | lr_scheduler.CyclicLR)
            assert cycled or group.get("momentum", 0.95) == 0.95


CYCLES: list[tuple[str, Callable[[Optimizer], Scheduler], bool]] = [
    # name, the scheduler, whether it cycles momentum
    *((name, make, True) for name, make in SCHEDULERS if name in ("OneCycleLR", "CyclicLR")),
    ("OneCycleLR of rates alone",
     lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12, cycle_momentum=False), False),
    ("StepLR", lambda o: lr_scheduler.StepLR(o, 2), False),
]  # fmt: skip


@pytest.mark.parametrize("on_muon", [False, True], ids=["of the AdamW", "of the Muon"])
@pytest.mark.parametrize(("make", "cycles"), [c[1:] for c in CYCLES], ids=[c[0] for c in CYCLES])
def test_muons_momentum_follows_the_beta1_that_a_scheduler_cycles(make, cycles, on_muon) -> None:
    model = net()
    optimizer: Any = AdamW(model.parameters(), lr=0.1)
    if not on_muon:
        scheduler = make(optimizer)
    optimizer = moonfx.convert_optimizer(optimizer, model, momentum=0.97)
    if on_muon:
        scheduler = make(optimizer)
    seen, wanted = [], []
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        seen.append(optimizer.param_groups[0]["momentum"])
        wanted.append(optimizer.param_groups[0]["betas"][0])
        if step == 2:  # also one that was saved between a scheduler and a step
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        advance(scheduler)
    # It is as it was given until the scheduler changes beta1.
    assert seen[1:] == (wanted[1:] if cycles else [0.97] * 3)


def test_a_wrapper_steps_the_muon_that_is_put_in_its_optimizers_place() -> None:
    model, plain = net(), net()
    sam = SAM(model.parameters(), AdamW, lr=0.01)
    sam.base_optimizer = moonfx.convert_optimizer(sam.base_optimizer, model)
    muon = moonfx.convert_optimizer(AdamW(plain.parameters(), lr=0.01), plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    sam.base_optimizer.step()
    muon.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters()))


def test_a_group_added_to_the_muon_is_driven_and_comes_back() -> None:
    model = net()
    adamw = AdamW([p for n, p in model.named_parameters() if n != "down.weight"], lr=0.1)
    scheduler = lr_scheduler.StepLR(adamw, 1, 0.5)
    muon = moonfx.convert_optimizer(adamw, model)
    muon.add_param_group({"params": [model.down.weight], "lr": 0.2, "initial_lr": 0.2})
    assert [row.name for row in muon.table][-1] == "down.weight"
    assert muon.on_muon(model.down.weight)
    train(model, muon, range(2))
    scheduler.step()
    assert [g["lr"] for g in muon.param_groups] == [0.05, 0.1]
    back = moonfx.to_adamw(muon)
    assert back.param_groups[0].keys() - {"initial_lr"} == back.param_groups[1].keys() - {
        "initial_lr"
    }
    train(model, back, range(2, 3))


def test_a_copy_of_optimizer_and_scheduler_together_goes_on_alone() -> None:
    model = net()
    adamw = AdamW(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(adamw, 1, 0.5)
    muon = moonfx.convert_optimizer(adamw, model)
    train(model, muon, range(2))
    scheduler.step()
    model2, muon2, scheduler2 = copy.deepcopy((model, muon, scheduler))
    train(model2, muon2, range(2, 4))
    scheduler2.step()
    assert muon2.param_groups[0]["lr"] == 0.025
    assert muon.param_groups[0]["lr"] == 0.05
    train(model, muon, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), model2.parameters()))
    moonfx.to_adamw(muon2)


def test_a_scaler_accumulation_and_clipping_step_as_the_whole_batch_does() -> None:
    def run(parts: int, scaler: torch.amp.GradScaler | None) -> Net:
        model = net()
        adamw = AdamW(model.parameters(), lr=0.01)
        muon = moonfx.convert_optimizer(adamw, model)
        for step in range(3):
            for _ in range(parts):
                value = loss(model, step) / parts
                (scaler.scale(value) if scaler else value).backward()
            if scaler:
                scaler.unscale_(muon)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if scaler:
                scaler.step(muon)
                scaler.update()
            else:
                muon.step()
            muon.zero_grad()
        return model

    whole = run(1, None)
    scaled = run(4, torch.amp.GradScaler("cpu", init_scale=1024.0))
    for p, q in zip(whole.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)  # Newton-Schulz in bfloat16


# --- Hugging Face ---------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = tokens(index)[0]
        return {"input_ids": row, "labels": row}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture
def quiet() -> Iterator[None]:
    """The libraries' own deprecations are not this project's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(moonfx|lr_scheduler|optimizer.step).*")
        yield


def trainer_of(folder: Any, steps: int) -> Any:
    from transformers import Trainer, TrainingArguments

    model = llama()
    adamw = AdamW(model.parameters(), lr=0.01)
    schedule = lr_scheduler.LambdaLR(adamw, lambda t: 1 / (1 + t))
    muon = moonfx.convert_optimizer(adamw, model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    return Trainer(model, arguments, train_dataset=Texts(), optimizers=(muon, schedule)), muon


@pytest.mark.usefixtures("quiet")
def test_hugging_faces_trainer_trains_saves_and_resumes_bit_for_bit(tmp_path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    pytest.importorskip("transformers", reason="needs transformers")
    trainer, muon = trainer_of(tmp_path / "whole", 4)
    trainer.train()
    assert muon.param_groups[0]["lr"] == pytest.approx(0.01 / 5)
    assert sum(row.optimizer == "muon" for row in moonfx.roles(muon).rows) == 7
    resumed, again = trainer_of(tmp_path / "resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, p), q in zip(
        trainer.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
    assert again.param_groups[0]["lr"] == muon.param_groups[0]["lr"]


@pytest.mark.usefixtures("quiet")
def test_accelerate_prepares_steps_accumulates_and_clips(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

    def by_hand() -> Net:
        model = net()
        adamw = AdamW(model.parameters(), lr=0.01)
        schedule = lr_scheduler.StepLR(adamw, 1, 0.5)
        muon = moonfx.convert_optimizer(adamw, model)
        for step in range(4):
            (loss(model, step) / 2).backward()
            if step % 2:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                muon.step()
                schedule.step()
                muon.zero_grad()
        return model

    model = net()
    adamw = AdamW(model.parameters(), lr=0.01)
    schedule = lr_scheduler.StepLR(adamw, 1, 0.5)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    muon = moonfx.convert_optimizer(adamw, model)
    prepared, optimizer, scheduler = accelerator.prepare(model, muon, schedule)
    for step in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(loss(prepared, step))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert muon.param_groups[0]["lr"] == 0.0025
    for p, q in zip(model.parameters(), by_hand().parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.usefixtures("quiet")
def test_what_accelerate_wraps_is_converted_inside_its_wrapper() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model, other = net(), net()
    wrapper = accelerate.Accelerator(cpu=True).prepare(AdamW(model.parameters(), lr=0.01))
    adamw = AdamW(other.parameters(), lr=0.01)
    for step in range(4):
        if step == 2:  # as the error of convert_optimizer(wrapper) says
            wrapper.optimizer = moonfx.convert_optimizer(wrapper.optimizer, model)
            adamw = moonfx.convert_optimizer(adamw, other)
        train(model, wrapper, range(step, step + 1))
        train(other, adamw, range(step, step + 1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


# --- Lightning ------------------------------------------------------------------------------------


def test_lightnings_protocol_is_that_of_an_optimizer() -> None:
    """What it relies on: the class, step(closure), toggled gradients, zero_grad, state_dict."""
    model = net()
    muon = moonfx.convert_optimizer(AdamW(model.parameters(), lr=0.01), model)
    assert isinstance(muon, Optimizer)

    def closure() -> Tensor:
        muon.zero_grad(set_to_none=True)
        value = loss(model, 0)
        value.backward()
        return value

    expected, _ = loss(model, 0).detach(), model.zero_grad()
    assert torch.equal(muon.step(closure=closure).detach(), expected)
    # Two optimizers over one model: the other's parameters are frozen for a while.
    frozen = model.down.weight.detach().clone()
    model.down.weight.requires_grad_(False)
    muon.step(closure=closure)
    assert torch.equal(model.down.weight, frozen)
    model.down.weight.requires_grad_(True)
    muon.step(closure=closure)
    assert not torch.equal(model.down.weight, frozen)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("automatic", [True, False])
def test_lightning_trains_saves_and_resumes_bit_for_bit(automatic, tmp_path) -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="needs pytorch_lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic
            self.net = net()

        def training_step(self, batch: Any, index: int) -> Tensor | None:
            value = loss(self.net, index)
            if automatic:
                return value
            optimizer = self.optimizers()
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(value)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.lr_schedulers().step()
            return None

        def configure_optimizers(self) -> Any:
            adamw = AdamW(self.net.parameters(), lr=0.01)
            muon = moonfx.convert_optimizer(adamw, self.net)
            schedule = lr_scheduler.StepLR(muon, 1, 0.5)  # Lightning asks for its own optimizer's
            return [muon], [{"scheduler": schedule, "interval": "step"}]

    def fit(steps: int, **options: Any) -> Any:
        module = Module()
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader([0] * 8), **options)
        return trainer, module

    whole, module = fit(4)
    first, _ = fit(2)
    first.save_checkpoint(tmp_path / "checkpoint")
    _, resumed = fit(4, ckpt_path=tmp_path / "checkpoint")
    assert whole.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 / 16)
    for p, q in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
