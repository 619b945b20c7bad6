"""Random weights that a seed alone decides, however a model is cut: each rank draws its own part."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ..config.argument_types import check_types
from ..models.allocate import check_device
from ..models.causal_lm import DeepseekLM
from ..quant.fp8_convert import fp8_layers
from .boxes import Box, allocate_parts, half_rows, local_box, local_tensor

__all__ = ["init_weights"]

_ROWS = 128  # that one seed draws: a rank draws little beyond its own rows, whatever their cut


@check_types
@torch.no_grad()
def init_weights(model: DeepseekLM, seed: int = 0, device: torch.device | str | None = None) -> DeepseekLM:
    """Draws all weights anew, in place: normal with `config.initializer_range`, norms one, biases zero.

    The values depend on the config and the seed alone: they are the same on every layout and every device, and the
    global random state is neither used nor changed. Parameters and buffers on the meta device get memory for this
    rank's part, so that a model can be built there, cut by `parallelize`, and begun without being whole anywhere.

    Args:
        seed: any integer; one seed and the next give unrelated values.
        device: of parameters on the meta device. Default: that of the model's meshes, the CPU without any.

    Returns:
        `model`.

    Raises:
        ValueError: the model has layers in FP8, or the device is not available.
    """
    if fp8_layers(model):
        raise ValueError("expected a model without FP8 layers, which are made by rounding weights, got one with")
    default = "cpu" if model.meshes is None else model.meshes.dense.device_type
    allocate_parts(model, check_device(default if device is None else device))
    base = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
    staged = model.meshes is not None and model.meshes.stages is not None
    whole = DeepseekLM(model.config, device="meta") if staged else model  # a stage does not know all parameters
    own, drawn = dict(model.named_parameters()), 0  # bands so far, of other ranks too: each has a seed of its own
    for name, each in whole.named_parameters():
        if each.ndim > 1:
            if name in own:
                _draw(own[name], base + drawn, model.config.initializer_range)
            drawn += each.shape[:-2].numel() * -(-each.shape[-2] // _ROWS)
    for module in model.modules():
        for name, vector in (*module._parameters.items(), *module._buffers.items()):
            if vector is not None and vector.ndim == 1:
                local_tensor(vector).fill_(float(name == "weight"))
    return model


def _draw(parameter: nn.Parameter, first_seed: int, std: float) -> None:
    """Fills this rank's part of a matrix, or of stacked ones."""
    local, box = local_tensor(parameter), local_box(parameter)
    if parameter.ndim == 2:
        local, box = local[None], ((0, 1), *box)
    bands = -(-parameter.shape[-2] // _ROWS)
    shape, half = parameter.shape[-2:], half_rows(parameter)
    for expert, matrix in zip(range(*box[0]), local, strict=True):
        seed, (rows, columns) = first_seed + expert * bands, box[1:]
        for number, part in enumerate(matrix.chunk(2) if half else [matrix]):
            first, end = (number * half + row // 2 for row in rows) if half else rows
            _draw_matrix(part, ((first, end), columns), shape, seed, std)


def _draw_matrix(matrix: Tensor, box: Box, shape: torch.Size, first_seed: int, std: float) -> None:
    (top, bottom), columns = box
    for band in range(top // _ROWS, -(-bottom // _ROWS)):
        first, end = band * _ROWS, min((band + 1) * _ROWS, shape[0])
        # The generator reads 32 bits of a seed.
        generator = torch.Generator("cpu").manual_seed((first_seed + band) % 2**32)
        values = torch.randn(end - first, shape[1], generator=generator, device="cpu") * std
        own = slice(max(first, top), min(end, bottom))
        matrix[own.start - top : own.stop - top] = values[own.start - first : own.stop - first, slice(*columns)]
