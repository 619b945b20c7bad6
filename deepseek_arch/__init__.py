"""DeepSeek-family models in PyTorch: latent attention, mixture of experts, multi-token prediction, checkpoints.

    import deepseek_arch as da

    model = da.load("path/to/checkpoint")
    tokens = da.generate(model, input_ids)

Names are imported when first used, so that the command line starts without PyTorch. `deepseek_arch.hf`, the
transformers integration, is imported explicitly.
"""

from __future__ import annotations

import importlib
import re
from importlib import resources
from typing import Any

__version__ = "0.1.0"


def _public_names() -> dict[str, dict[str, str]]:
    """Reads `__init__.pyi`: the module of each public name, by the comment that heads its group."""
    groups: dict[str, dict[str, str]] = {}
    stub = resources.files(__name__).joinpath("__init__.pyi").read_text(encoding="utf-8")
    for heading, module, name in re.findall(r"^(?:# (.+)|from (\S+) import (\w+) as \3)$", stub, re.MULTILINE):
        if heading:
            groups[heading] = {}
        else:
            groups[next(reversed(groups))][name] = module
    return groups


_GROUPS = _public_names()
_MODULE_OF = {name: module for group in _GROUPS.values() for name, module in group.items()}
__all__ = sorted({*_MODULE_OF, "__version__"})
__doc__ += "\n" + "\n".join(f"{heading}:\n    {', '.join(group)}\n" for heading, group in _GROUPS.items())


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
