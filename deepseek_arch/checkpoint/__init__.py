"""Published safetensors files to models and back.

`load` reads a checkpoint into a model, `save` writes one, `slice_checkpoint` copies part of one, `inspect_checkpoint`
says what is in one. All of them start from `plan`, which compares
the headers of the files with what the config implies.
"""

from .inspection import CheckpointReport, inspect_checkpoint
from .loading import LoadReport, load
from .plan import CheckpointError
from .saving import SaveReport, save, slice_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointReport",
    "LoadReport",
    "SaveReport",
    "inspect_checkpoint",
    "load",
    "save",
    "slice_checkpoint",
]
