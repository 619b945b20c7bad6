"""The product in PyTorch: tiles of the weight, decoded and multiplied one after the other.

Few rows of activations are multiplied by the scales themselves, once for each row of blocks; with more, the tiles are.
Products are float32, except for `FEW_ROWS` or more where the device multiplies 16-bit floats natively: there a tile is
rounded to the activations' dtype, as `dequantize_blocks` rounds it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import dispatch
from .expansion import Expansion

FEW_ROWS = 32


def multiply(expansion: Expansion, x: Tensor, weight: Tensor, scale: Tensor, out: Tensor) -> None:
    """`out` [M, outputs] = x [M, terms] times one dequantized weight, which `expansion` reads."""
    few = x.device.type == "cpu" and x.shape[0] < FEW_ROWS
    x = x.to(torch.float32 if few else _product_dtype(x))
    for tile in expansion.tiles:
        first, end = tile[0].first, tile[-1].end
        wide, factors = expansion.codes(weight, tile), expansion.factors(scale, tile)
        for band, factor in zip(tile, factors, strict=True):
            own = wide[band.first - first : band.end - first]  # [outputs of the band, terms]
            if few:
                out[:, band.first : band.end] = (x * factor) @ own.T
            else:
                own.mul_(factor)
        if not few:
            out[:, first:end] = x @ wide.to(x.dtype).T


def _product_dtype(x: Tensor) -> torch.dtype:
    if x.dtype == torch.float32 or x.device.type != "cpu":
        return x.dtype
    return x.dtype if dispatch.native_half_matmul() else torch.float32


def _groups(rows: int, ends: Tensor | None) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, end in enumerate([rows] if ends is None else ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


# A custom operator, because loops over tiles and experts are none of torch.compile's business: it sees one opaque node.
@torch.library.custom_op("deepseek_kernels::fp8_weight_gemm", mutates_args=())
def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    ends: Tensor | None,
    block_rows: int,
    block_columns: int,
    parts: int,
    transposed: bool,
) -> Tensor:
    """x [P, K] @ weight[e].T -> [P, N] for the rows of each expert e; `transposed`: x [P, N] @ weight[e] -> [P, K].

    Without `ends`, all rows are the first expert's.
    """
    out = x.new_zeros(x.shape[0], weight.shape[2 if transposed else 1])
    if not x.shape[0]:
        return out
    expansion = Expansion(weight.shape[1:], (block_rows, block_columns), parts, x.device, transposed)
    # Autocast reaches into custom operators, and would round the float32 products below.
    with torch.autocast(x.device.type, enabled=False):
        for expert, rows in _groups(x.shape[0], ends):
            multiply(expansion, x[rows], weight[expert], scale[expert], out[rows])
    return out


@product.register_fake
def _(x, weight, scale, ends, block_rows, block_columns, parts, transposed):
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


def _setup(ctx, inputs, output):
    _, *tensors, ctx.block_rows, ctx.block_columns, ctx.parts, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    nothing = (None,) * 7  # codes and scales have no gradient
    if not ctx.needs_input_grad[0]:
        return None, *nothing
    # Linear in x, so its derivative is the product with the weights the other way round.
    return product(grad, *ctx.saved_tensors, ctx.block_rows, ctx.block_columns, ctx.parts, not ctx.transposed), *nothing


product.register_autograd(_differentiate, setup_context=_setup)
