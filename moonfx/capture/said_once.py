"""What a model logs once and never again, so that it does not break the model's graph.

    logger.warning_once("`sdpa` attention does not support `output_attentions=True`")

transformers says this in each layer. Dynamo breaks the graph at any call of a logger that it is not
told to ignore: then each layer is compiled by itself, and which one it is cannot be told.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

from torch._dynamo.exc import Unsupported


class SaidOnce(set[Callable[..., Any]]):
    """Methods of loggers that Dynamo ignores: those given, and those that say a thing once.

    The latter say it when Dynamo asks for them, as the call would. Where that fails, because what
    is said is no constant, the graph breaks as ever.
    """

    def __contains__(self, method: object) -> bool:
        if super().__contains__(method):
            return True
        name = str(getattr(method, "__name__", ""))
        logs = isinstance(getattr(method, "__self__", None), logging.Logger)
        if not (logs and name.endswith("_once") and callable(method)):
            return False
        call = sys._getframe(1).f_locals  # of Dynamo's, which reads the call
        try:
            args = [x.as_python_constant() for x in call["args"]]
            kwargs = {key: x.as_python_constant() for key, x in call["kwargs"].items()}
        except (KeyError, AttributeError, NotImplementedError, Unsupported):
            return False
        method(*args, **kwargs)
        return True
