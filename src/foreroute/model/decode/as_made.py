"""Whether modules are still what they were when a graph took over what they compute."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

# What is None, such as the experts' way to the engine, may be set later.
_SETTINGS = (bool, int, float, str)


class AsMade:
    """Tells whether `modules` still have their submodules, parameters, settings and forwards, and no hooks.

    A graph that computes in their place asks at each step: someone may have replaced a projection, turned a router's
    weight, set its top-k, or hung a hook on it.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        every = [*modules]
        self._made: list[tuple[dict[str, Any], str, Any]] = []
        for one in every:
            tables: tuple[dict[str, Any], ...] = (one._modules, one._parameters, one._buffers)
            self._made += [(table, name, value) for table in tables for name, value in table.items()]
            own = vars(one)
            # Names that begin with _ are what modules note for themselves.
            self._made += [(own, name, own[name]) for name in own if type(own[name]) in _SETTINGS and name[0] != "_"]
            self._made.append((own, "forward", own.get("forward")))
        self._hooks: list[dict[Any, Any]] = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._hooks += [hooks for one in every for hooks in (one._forward_hooks, one._forward_pre_hooks)]

    def __call__(self) -> bool:
        """Whether nothing was changed, and no hook is registered."""
        for table, name, value in self._made:
            if table.get(name) is not value:
                return False
        return not any(self._hooks)
