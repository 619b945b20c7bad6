"""Whether a module does what its class says, and nobody listens: only then may its work be done without calling it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _module

__all__ = ["is_plain_module"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def is_plain_module(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether `module` is exactly of one of these classes, without hooks, offloading or a `forward` of its own."""
    if type(module) not in kinds or "forward" in vars(module) or hasattr(module, "_hf_hook"):
        return False
    return not any(getattr(module, name) for name in _HOOKS) and not any(
        getattr(_module, name, None) for name in _GLOBAL_HOOKS
    )
