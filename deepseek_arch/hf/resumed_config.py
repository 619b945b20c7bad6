"""A reader of transformers that fails on YaRN as the published files write it, mended for our model types.

`Trainer` reads the config of the checkpoint that it resumes from as `PreTrainedConfig`, the base class, which stops at
`rope_theta` beside a `rope_scaling` of YaRN because it has no `max_position_embeddings` yet. Saved files keep both for
DeepSeek's own code and serving engines, which would compute another model without them.
"""

from __future__ import annotations

import os

from transformers import PreTrainedConfig

from .configuration import CONFIG_CLASSES

__all__ = ["read_older_rope_fields"]

_original = vars(PreTrainedConfig)["from_json_file"].__func__


def _from_json_file(cls: type[PreTrainedConfig], json_file: str | os.PathLike[str]) -> PreTrainedConfig:
    if cls is PreTrainedConfig:
        fields = cls._dict_from_json_file(json_file)
        scaling, theta = fields.get("rope_scaling") or {}, fields.get("rope_theta")
        if fields.get("model_type") in CONFIG_CLASSES and isinstance(scaling, dict) and theta is not None:
            kind = scaling.get("rope_type") or scaling.get("type") or "default"
            newer = {**scaling, "rope_type": kind, "rope_theta": theta}
            kept = {name: fields[name] for name in fields if name not in ("rope_scaling", "rope_theta")}
            return cls(**{"rope_parameters": newer, **kept})
    config: PreTrainedConfig = _original(cls, json_file)
    return config


def read_older_rope_fields() -> None:
    """Makes `PreTrainedConfig.from_json_file` read published files with YaRN; no other class's reading changes."""
    PreTrainedConfig.from_json_file = classmethod(_from_json_file)  # type: ignore[assignment,method-assign]


read_older_rope_fields()
