"""Registration of our classes with transformers' Auto classes, and its reverse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.import_utils import _LazyModule

from .causal_lm import DeepseekForCausalLM
from .classifiers import DeepseekForSequenceClassification, DeepseekForTokenClassification
from .configuration import CONFIG_CLASSES, config_class
from .main_model import DeepseekModel

__all__ = ["register", "registered", "unregister"]

_MODEL_CLASSES = (
    (AutoModel, DeepseekModel),
    (AutoModelForCausalLM, DeepseekForCausalLM),
    (AutoModelForSequenceClassification, DeepseekForSequenceClassification),
    (AutoModelForTokenClassification, DeepseekForTokenClassification),
)
_ABSENT = object()


class _ModuleAttributes(dict[str, Any]):
    """Attributes of `transformers`, as a table.

    They are set on the module's class: transformers runs itself a second time when it is imported, and who imported it
    earlier holds another module object than `sys.modules` does.
    """

    def get(self, key: str, default: Any = None) -> Any:
        return vars(_LazyModule).get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(_LazyModule, key, value)

    def pop(self, key: str, default: Any = None) -> Any:
        if key in vars(_LazyModule):
            delattr(_LazyModule, key)


_ATTRIBUTES = _ModuleAttributes()
# Entries of transformers' tables from before: (table, key) -> value or _ABSENT. Empty while not registered.
_before: dict[tuple[int, Any], tuple[dict[Any, Any], Any]] = {}


def register(*model_types: str) -> None:
    """Makes `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and the classifiers' Auto classes give our classes.

    The classes are attributes of `transformers` as well, for all that looks `config.architectures` up there.
    Classes imported by name, transformers' own among them, are not changed. Repeating the call changes nothing.

    Args:
        model_types: families (default: deepseek_v2, deepseek_v3, deepseek_v32, kimi_k2, glm4_moe_lite, glm_moe_dsa).

    Raises:
        UnsupportedModelError: a family that these modules cannot compute.
    """
    classes = {model_type: config_class(model_type) for model_type in model_types or CONFIG_CLASSES}
    for model_type, own in classes.items():
        _put(CONFIG_MAPPING._extra_content, model_type, own)
        for auto, model in _MODEL_CLASSES:
            _put(auto._model_mapping._extra_content, own, model)
    for _, model in _MODEL_CLASSES:  # `transformers serve` and TRL look for the name of the architecture there
        _put(_ATTRIBUTES, model.__name__, model)


def unregister() -> None:
    """Undoes `register`: the Auto classes give the classes that they gave before."""
    for (_, key), (table, value) in reversed(_before.items()):
        if value is _ABSENT:
            table.pop(key, None)
        else:
            table[key] = value
    _before.clear()


@contextmanager
def registered(*model_types: str) -> Iterator[None]:
    """Registers within a `with` block; a registration from before it stays."""
    held = dict(_before)
    register(*model_types)
    try:
        yield
    finally:
        if not held:
            unregister()


def _put(table: dict[Any, Any], key: Any, value: Any) -> None:
    # The tables behind transformers' public `register`, which cannot be undone and refuses its own model types.
    if table.get(key) is not value:
        _before.setdefault((id(table), key), (table, table.get(key, _ABSENT)))
        table[key] = value
