"""Tables in which transformers and PEFT look models up by class name or model type, with entries for ours.

A class that is missing there is not refused but treated as something else: Trainer smooths labels without shifting
them, pipelines and `transformers serve` call the class unsupported, PEFT drops adapters of single experts.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import conversion_mapping
from transformers.models.auto import modeling_auto as names

from .key_mapping import loading_conversions

__all__ = ["add_class_name", "add_model_type"]

_TABLES: dict[str, Any] = {
    "Model": names.MODEL_MAPPING_NAMES,
    "ForCausalLM": names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": names.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


def add_class_name(head: str, name: str) -> None:
    """Enters a class in the names of its head's classes, under a key that is no model type: no config leads to it.

    Args:
        head: "Model" for the main model alone, "ForCausalLM", "ForSequenceClassification" or "ForTokenClassification".
        name: of the class.
    """
    _TABLES[head][f"deepseek_arch.{name}"] = name


def add_model_type(model_type: str, like: str) -> None:
    """Makes PEFT convert adapters of single experts for a model type that transformers does not know.

    Args:
        model_type: the new one; one that transformers knows by itself is left alone.
        like: a model type with the same names of tensors.
    """
    tables: list[Any] = [conversion_mapping, sys.modules.get("peft.utils.transformers_weight_conversion")]
    for module in tables:  # PEFT copies transformers' table when it is imported
        patterns = getattr(module, "_MODEL_TO_CONVERSION_PATTERN", None)
        if patterns is not None and like in patterns:
            patterns.setdefault(model_type, patterns[like])
    if conversion_mapping.get_checkpoint_conversion_mapping(model_type) is None:
        conversion_mapping.register_checkpoint_conversion_mapping(model_type, loading_conversions(causal_lm=False))


add_model_type("kimi_k2", "deepseek_v3")
