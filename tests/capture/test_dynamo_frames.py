"""What Dynamo compiles at the moment: whose code, which piece of it, and why it was broken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from moonfx.capture import dynamo_frames as frames


class Seen:
    """A backend that notes what is known while each graph is compiled."""

    def __init__(self) -> None:
        self.notes: list[dict[str, Any]] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        self.notes.append(
            {
                "owner": frames.owner(),
                "frame": frames.compiled_frame(),
                "piece": frames.is_piece(gm),
                "last": frames.is_last_piece_of_step(gm),
                "after": frames.break_after(gm),
                "helper": frames.is_called_by_broken_step(),
                "gradients": frames.returns_gradients(gm),
            }
        )
        return gm.forward

    def of(self, name: str) -> list[Any]:
        return [note[name] for note in self.notes]


@pytest.fixture
def seen() -> Seen:
    torch._dynamo.utils.counters.clear()
    return Seen()


def test_nothing_is_known_where_nothing_is_compiled() -> None:
    assert frames.compiled_frame() is None


class Whole(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_whole_graph_is_no_piece_and_belongs_to_its_module(seen: Seen) -> None:
    model = Whole(3, 3)
    compiled = torch.compile(model, backend=seen, dynamic=False)
    compiled(torch.ones(2, 3))
    compiled(torch.ones(4, 3))
    assert seen.of("owner") == [model, model]
    assert (seen.of("piece"), seen.of("after")) == ([False, False], [None, None])
    assert seen.of("gradients") == [True, True]
    first, again = seen.of("frame")
    assert first == again, "the same code, compiled anew"


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1


def test_the_pieces_of_a_broken_function_know_where_it_was_broken(seen: Seen) -> None:
    torch.compile(Broken(), backend=seen)(torch.ones(2))
    assert seen.of("piece") == [True, True]
    first, second = seen.of("after")
    assert first.startswith("test_dynamo_frames.py:")
    assert second is None
    assert len(frames.graph_breaks()) == 1
    one, other = seen.of("frame")
    assert one != other
    assert seen.of("last") == [False, False], "of no optimizer"


class Steps(torch.optim.Optimizer):
    def __init__(self, parameters: list[nn.Parameter], breaks: bool) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.breaks = breaks

    def step(self) -> None:  # type: ignore[override]
        (p,) = self.param_groups[0]["params"]
        p.data.mul_(0.9)
        if self.breaks:
            torch._dynamo.graph_break()
            p.data.sub_(1)


@pytest.mark.parametrize("breaks", [False, True])
def test_a_step_belongs_to_its_optimizer_and_its_last_piece_is_known(
    breaks: bool, seen: Seen
) -> None:
    optimizer = Steps([nn.Parameter(torch.ones(2))], breaks)
    torch.compile(optimizer.step, backend=seen)()
    assert seen.of("owner") == [optimizer] * (1 + breaks)
    assert seen.of("last") == ([False, True] if breaks else [False])
    assert not seen.of("helper")[0], "it is the step itself"


def test_zeros_stand_for_the_results_of_a_graph_without_running_it(seen: Seen) -> None:
    torch.compile(lambda x: (x @ x, x[0].double()), backend=seen)(torch.ones(3, 3))
    made = frames.empty_results(seen.graphs[0])
    assert made is not None
    product, row = made("never read")
    assert (product.shape, product.dtype) == ((3, 3), torch.float32)
    assert (row.shape, row.dtype) == ((3,), torch.float64)


def test_a_shape_that_depends_on_the_input_has_no_such_zeros(seen: Seen) -> None:
    torch.compile(lambda x: x * 2, backend=seen, dynamic=True)(torch.ones(5))
    assert frames.empty_results(seen.graphs[0]) is None
