"""convert_optimizer: an AdamW becomes Muon, and training goes on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from moonfx.optim import checks
from moonfx.optim.coefficients import per_step
from moonfx.optim.facts import Fact
from moonfx.optim.muon import Classify, Muon
from moonfx.optim.roles.by_name import unwrapped
from moonfx.optim.roles.classify import Classifier, classify
from moonfx.optim.roles.table import RoleRow
from moonfx.optim.settings import MUON, Settings
from moonfx.optim.state.adamw import Source, read_adamw
from moonfx.optim.state.handover import muon_state, second_moment
from moonfx.optim.step.gaussian_rms import noise_rms
from moonfx.optim.target_rms import targets
from moonfx.policy import check_flag


def convert_optimizer(
    adamw: Optimizer,
    model: nn.Module | None = None,
    *,
    example: tuple[Any, ...] | dict[str, Any] | None = None,
    rms: float | str = 0.2,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: str | Sequence[Any] = "muon",
    exact_rms: bool = True,
    roles: Mapping[Any, Any] | None = None,
    decay: str | None = None,
    momentum_dtype: str | None = None,
    compile: bool | None = None,
) -> Muon:
    """AdamW becomes Muon, mid-run if need be: same groups, learning rate, decay and schedule.

        optimizer = moonfx.convert_optimizer(optimizer, model, example=(tokens,))

    Hidden matrices W [A, B] then move by lr * rms * sqrt(max(A, B)) * NewtonSchulz(momentum)
    (Jordan 2024, kellerjordan.github.io/posts/muon), which has the size that AdamW's updates have
    (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv 2502.16982, eq. 4): so the learning
    rate, weight decay and schedule tuned for AdamW go on. Embeddings, heads, norms, biases and all
    else stay with AdamW, stepped by the class that adamw has.

    The groups are adamw's own dicts: schedulers made before go on driving them, and those made
    after drive the Muon. First moments become the momentum, step counters stay; the second moments
    of what goes to Muon are dropped, which halves its state. adamw is as it was until the Muon's
    first step, which frees its state and retires it. moonfx.to_adamw(optimizer) goes back.

    Checkpoints: to resume, make the AdamW, convert it and load the Muon's state_dict, which goes on
    bit for bit; an AdamW's state_dict is converted, with a warning that says so. An AdamW takes
    a Muon's state_dict without a word and fails at its next step (KeyError: 'exp_avg'): save
    moonfx.to_adamw's state_dict for it.

    No promise for fine-tuning: three papers report that a model pretrained with AdamW and
    fine-tuned with Muon ends equal or worse than with AdamW (arXiv 2502.16982, tables 6 and 7;
    2605.06654; 2605.10468, less so with LoRA). Compare on your own validation set.

    Args:
        adamw: torch.optim.AdamW or Adam with any flag but amsgrad and differentiable; the 8-bit,
            4-bit and fp8 ones of torchao.optim; or an optimizer with the same groups and states
            (bitsandbytes, Apex). With or without states. Not a wrapper: convert, then wrap.
        model: whose parameters they are. Without it roles come from names and shapes alone, and a
            warning says so: they show neither tied weights nor which matrix makes the logits.
        example: inputs of model, a tuple of positional or a dict of keyword ones. The model is
            traced with them, not run, and roles follow from how it uses each parameter.
        rms: root mean square of an update at learning rate 1: a number (Moonlight's is 0.2);
            "betas", that of AdamW on pure noise, sqrt((1 - beta1)/(1 + beta1)); or "measured",
            each parameter's own by its AdamW state, which must then exist.
        momentum: mu of the average of gradients, in [0, 1). A scheduler that cycles AdamW's first
            beta, as OneCycleLR does, cycles it too.
        nesterov: whether the newest gradient counts twice, mu * average + (1 - mu) * gradient.
        steps: of the Newton-Schulz iteration, at least 1.
        coefficients: a name in moonfx.optim.coefficients.COEFFICIENTS ("muon", "quintic",
            "polar_express", "deepseek_v4", "cubic"), one triple (a, b, c) or one per step.
        exact_rms: True scales each update by its own RMS, so that the RMS asked for is obtained
            from any momentum. False scales by the RMS that Gaussian matrices get with these
            coefficients (Moonlight's rule, corrected): momenta of low rank then move less, on
            SmolLM2 by up to 0.6 times what was asked.
        roles: the user's word, {parameter name | "re:<regex>" | predicate(name, parameter):
            "muon" | "adamw" | a role's name | moonfx.optim.matrices.Layout}, before all else. A
            parameter without a name is "" to a predicate.
        decay: "decoupled", W (1 - lr wd); "cautious", only where that moves with the update; or
            "coupled", wd W into the gradient. None: as adamw does it, coupled for Adam.
        momentum_dtype: "int8" keeps the momentum as torchao's 8-bit state; None in exp_avg's
            dtype, or as int8 where adamw's own states are quantized.
        compile: True compiles the step, one graph per device and dtype; False does not; None
            where it is faster.

    Returns:
        A moonfx.Muon, a torch.optim.Optimizer. moonfx.roles(it) says what went where and why,
        moonfx.update_rms(it) how large each update is.

    Raises:
        TypeError: if adamw is no optimizer, a wrapper, a moonfx.Muon already, or of another kind
            (SGD, LBFGS, Lion, ...); if an argument is of the wrong type.
        ValueError: if adamw has no parameters, amsgrad or differentiable; if a group has a key
            that a Muon's groups need; if a state holds NaN; if a parameter is sparse, has a sparse
            gradient, is a lazy module's or not the model's, or is complex and would go to Muon; if
            no parameter goes to Muon; if an argument is out of range. adamw is untouched after any
            error.
    """
    if isinstance(adamw, Muon):
        raise TypeError(
            "adamw is a moonfx.Muon already; moonfx.to_adamw(optimizer) goes back to AdamW"
        )
    source = read_adamw(adamw)
    checks.check_groups(source)
    checks.check_settings(rms, momentum, decay, momentum_dtype, compile)
    check_flag("nesterov", nesterov)
    check_flag("exact_rms", exact_rms)
    triples = per_step(coefficients, steps)
    checks.check_rms(source, rms)
    names = _names(source, model)
    checks.check_parameters(source, names, model)
    checks.check_states(source, names)
    parameters: list[Any] = [p for _, p in source.members()]
    rows = classify(parameters, source.names(), model, example, roles)
    rows = [row if row.name else dataclasses.replace(row, name=n) for row, n in zip(rows, names)]
    checks.check_some_muon(rows)
    if momentum_dtype is None and source.low_bit() and checks.has_torchao():
        momentum_dtype = "int8"
    b1, _ = source.betas(source.groups[0])
    return _made(
        source,
        rows,
        Settings(
            momentum=float(momentum),
            nesterov=nesterov,
            coefficients=triples,
            exact_rms=exact_rms,
            decay=decay or ("coupled" if source.coupled(source.groups[0]) else "decoupled"),
            rms=noise_rms(b1) if isinstance(rms, str) else float(rms),
            momentum_dtype=momentum_dtype,
            compile=compile,
        ),
        targets(rms, source, rows),
        [decay or ("coupled" if source.coupled(g) else "decoupled") for g in source.groups],
        Classifier(model, example, roles),
    )


def _made(
    source: Source,
    rows: list[RoleRow],
    settings: Settings,
    target_rms: list[float | None],
    decays: list[str],
    classify_later: Classify,
) -> Muon:
    """The Muon. From here on nothing is refused."""
    states: dict[Tensor, dict[str, Any]] = {}
    facts: dict[Tensor, Fact] = {}
    for row, target, (group, p) in zip(rows, target_rms, source.members(), strict=True):
        state, ratio = source.state(p), None
        if state and row.optimizer == MUON:
            ratio = second_moment(state, group, settings.momentum)
            state = muon_state(p, state, group, settings.momentum_dtype)
        if state:
            states[p] = state
        facts[p] = Fact(row, target, ratio)
    muon = Muon(source.optimizer, facts, settings, state=states, classify=classify_later)
    for group, decay in zip(muon.param_groups, decays, strict=True):
        group["decay"] = decay
    return muon


def _names(source: Source, model: nn.Module | None) -> list[str]:
    """What errors and tables call each parameter."""
    known: dict[int, str] = {}
    if isinstance(model, nn.Module):
        known = {id(p): unwrapped(name) for name, p in model.named_parameters()}
    members = zip(source.members(), source.names(), source.places(), strict=True)
    return [known.get(id(p)) or unwrapped(name) or place for (_, p), name, place in members]
