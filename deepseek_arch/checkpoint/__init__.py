"""Published safetensors files to models and back.

`load` reads a checkpoint into a model, `save` writes one, `slice_checkpoint` copies part of one, `convert` writes one
in another format or layout, `inspect_checkpoint` says what is in one. All of them start from `load_plan`, which
compares the headers of the files with what the config implies.
"""

from .conversion.converting import ConversionReport, convert
from .conversion.plan import ConversionPlan, plan_conversion
from .inspection import CheckpointReport, inspect_checkpoint
from .loading import LoadReport, load
from .problems import CheckpointError
from .saving import SaveReport, save
from .slicing import slice_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointReport",
    "ConversionPlan",
    "ConversionReport",
    "LoadReport",
    "SaveReport",
    "convert",
    "inspect_checkpoint",
    "load",
    "plan_conversion",
    "save",
    "slice_checkpoint",
]
