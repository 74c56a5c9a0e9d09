"""Which writes into a tensor are read: those into the state of a cache are not, in one call.

state.copy_(h[..., -3:])         nothing reads the state any more: h is kept, and not used
out[..., :8] = a                 out is read as a whole: a and what is beside it belong together
y = out @ w
"""

from collections.abc import Iterator

from moonfx.passes.parameters.dataflow import WRITES, DataFlow, FlowValue, base_of


def is_read(flow: DataFlow, write: FlowValue) -> bool:
    """Whether the call computes something of a tensor after a write into it.

    What the call gives back is not computed of any more. Code that was not traced may compute.
    """
    after = flow.place[write]
    known = {write}
    waiting = [write, base_of(write.args[0])]
    while waiting:
        value = waiting.pop()
        if value.escapes:
            return True
        for user in value.users:
            if user in known or _is_target(user, value) or flow.place[user] < flow.place[value]:
                continue
            known.add(user)
            if _is_view(user):
                waiting.append(user)
            elif flow.place[user] > after:
                return True
    return False


def _is_target(user: FlowValue, value: FlowValue) -> bool:
    """Whether a value is only written into by one of its users."""
    return user.target in WRITES and value not in list(_given(user))


def _given(write: FlowValue) -> Iterator[FlowValue]:
    return (x for x in write.args[1:] if isinstance(x, FlowValue))


def _is_view(value: FlowValue) -> bool:
    return getattr(value.target, "is_view", False)
