"""The product in PyTorch: tiles of the weight, decoded and multiplied one after the other.

Tiles are decoded into buffers that every tile uses again: no fresh pages, and mostly in cache. The buffers take 6 bytes
for each FP8 value of a tile, and a tile has at most an eighth of the weight's: less memory than the weight itself.

Few rows of activations are multiplied by the scales themselves, once for each row of blocks; with more, the tiles are.
Products are float32, except for `FEW_ROWS` or more where the device multiplies 16-bit floats natively: there a tile is
rounded to the activations' dtype, as `dequantize_blocks` rounds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from ...common import float32_products
from ...common.autograd import transformed, transformed_product
from ...common.host import cdiv

__all__ = ["FEW_ROWS", "Expansion", "decode_into", "multiply", "product"]

FEW_ROWS = 32
# FP8 values of a tile for each thread of a CPU: 2 MB of integers and 4 MB of floats. With smaller tiles, starting all
# the operations costs more than a nearer cache saves (measured from 2^14 to 2^22). A GPU starts them more slowly.
TILE = 1 << 20
GPU_TILE = 1 << 24
SMALL = 1 << 16  # a weight this small is one tile
UNIT = 256.0  # decoded values are this much too small: the scales are multiplied instead, which costs nothing

_NAN = 0x7F  # with either sign


class Band(NamedTuple):
    """Consecutive rows that share one row of scales: number `scales`."""

    scales: int
    first: int
    end: int


def bands(rows: int, block: int, parts: int) -> Iterator[Band]:
    """Yields the rows of a weight in blocks; each of its `parts` stacked matrices starts a grid of its own."""
    height = rows // parts
    down = cdiv(height, block)
    for part in range(parts):
        for number in range(down):
            first = part * height + number * block
            yield Band(part * down + number, first, min(first + block, (part + 1) * height))


def tiles(rows: int, block: int, parts: int, most: int) -> Iterator[list[Band]]:
    """Yields the same rows in order, in tiles of at most `most`; a longer band is cut."""
    tile: list[Band] = []
    for band in bands(rows, block, parts):
        for first in range(band.first, band.end, most):
            piece = Band(band.scales, first, min(first + most, band.end))
            if tile and piece.end - tile[0].first > most:
                yield tile
                tile = []
            tile.append(piece)
    if tile:
        yield tile


def scale_rows(rows: int, block: int, parts: int, device: torch.device) -> Tensor:
    """Returns [rows] int64: the row of scales that each row of a weight belongs to."""
    height = max(rows // parts, 1)
    row = torch.arange(rows, device=device)
    return row // height * cdiv(height, block) + row % height // block


def decode_into(codes: Tensor, half: Tensor, wide: Tensor) -> None:
    """Does `wide` float32 = float8_e4m3fn `codes` divided by `UNIT`, exactly; `half` int16 is scratch. All [r, c].

    As `common.fp8.decode`, without its last multiplication and without new memory.
    """
    signed = codes.view(torch.int8)
    half.copy_(signed).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))  # the sign fills the upper byte
    wide.copy_(half.view(torch.float16))
    if codes.device.type != "cpu" or _holds_nan(codes):  # looking first pays off on a CPU only
        wide.masked_fill_((signed & _NAN) == _NAN, torch.nan)


def _holds_nan(codes: Tensor) -> bool:
    """Tells if there are NaNs: 0x7f is the largest signed byte, 0xff the largest unsigned one."""
    if not codes.numel():
        return False
    return codes.view(torch.int8).amax().item() == 127 or codes.view(torch.uint8).amax().item() == 255


def tile_size(codes: int, device: torch.device) -> int:
    """Returns the number of values of a weight to decode at a time; more than 8 threads share the tile of 8."""
    most = GPU_TILE if device.type == "cuda" else TILE * min(torch.get_num_threads(), 8)
    return min(most, max(codes // 8, SMALL))


class Expansion:
    """Reads the weights of a stack in tiles: of rows for `x @ W.T`, or of columns (`transposed`) for `x @ W`.

    Below, outputs are the columns of the result, terms the products that a sum has.

    Attributes:
        tiles: the outputs, in bands that share one row of (transposed) scales.
        terms: [terms] int64, the column of (transposed) scales that each term belongs to.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        block_size: tuple[int, int],
        parts: int,
        device: torch.device,
        transposed: bool = False,
    ) -> None:
        rows, columns = (shape[0], block_size[0], parts), (shape[1], block_size[1], 1)
        outputs, terms = (columns, rows) if transposed else (rows, columns)
        most = max(1, tile_size(shape[0] * shape[1], device) // max(1, terms[0]))
        self.transposed = transposed
        self.tiles = list(tiles(*outputs, most))
        self.terms = scale_rows(*terms, device)
        self.native = device.type == "cuda"  # converts e4m3 in one kernel, whatever its age; other devices may not
        size = min(most, outputs[0]) * terms[0]
        self._wide = torch.empty(size, dtype=torch.float32, device=device)
        self._half = torch.empty(0 if self.native else size, dtype=torch.int16, device=device)

    def codes(self, weight: Tensor, tile: list[Band]) -> Tensor:
        """Returns the tile's values, up to a power of two that `factors` contains, float32 [outputs, terms].

        The next call overwrites them.
        """
        outputs = slice(tile[0].first, tile[-1].end)
        codes = weight[:, outputs] if self.transposed else weight[outputs]
        wide = self._wide[: codes.numel()].view(codes.shape)
        if self.native:
            wide.copy_(codes)
        else:
            decode_into(codes, self._half[: codes.numel()].view(codes.shape), wide)
        return wide.T if self.transposed else wide

    def factors(self, scale: Tensor, tile: list[Band]) -> Tensor:
        """Returns the factors of those values: a row for each band of the tile, [bands, terms] float32."""
        own = (scale.T if self.transposed else scale)[tile[0].scales : tile[-1].scales + 1]
        return (own if self.native else own * UNIT).index_select(1, self.terms)


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
            out[:, first:end] = float32_products.product(x, wide.to(x.dtype))


def _product_dtype(x: Tensor) -> torch.dtype:
    if x.dtype == torch.float32 or x.device.type != "cpu":
        return x.dtype
    return x.dtype if dispatch.native_half_matmul(x.dtype) else torch.float32


def _groups(rows: int, ends: Tensor | None) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, end in enumerate([rows] if ends is None else ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


# A custom operator, because loops over tiles and experts depend on data: torch.compile sees one opaque node.
@torch.library.custom_op("deepseek_kernels::fp8_weight_gemm", mutates_args=())
def _product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    ends: Tensor | None,
    block_rows: int,
    block_columns: int,
    parts: int,
    transposed: bool,
) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[2 if transposed else 1])
    if not x.shape[0]:
        return out
    expansion = Expansion((weight.shape[1], weight.shape[2]), (block_rows, block_columns), parts, x.device, transposed)
    # Autocast reaches into custom operators, and would round the float32 products below.
    with torch.autocast(x.device.type, enabled=False):
        for expert, rows in _groups(x.shape[0], ends):
            multiply(expansion, x[rows], weight[expert], scale[expert], out[rows])
    return out


@_product.register_fake
def _(x, weight, scale, ends, block_rows, block_columns, parts, transposed):
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


def _setup(ctx, inputs, output):
    _, *tensors, ctx.block_rows, ctx.block_columns, ctx.parts, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    nothing = (None,) * 7  # codes and scales have no gradient
    if not ctx.needs_input_grad[0]:
        return None, *nothing
    weight, scale, ends = ctx.saved_tensors
    given = _input_gradient(grad, weight, scale, ends, ctx.block_rows, ctx.block_columns, ctx.parts, ctx.transposed)
    return given, *nothing


_product.register_autograd(_differentiate, setup_context=_setup)


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

    Without `ends`, all rows are the first expert's. Differentiable in x, in both modes.
    """
    operands = x, weight, scale, ends, block_rows, block_columns, parts, transposed
    return transformed_product(_product, _input_gradient, None, *operands) if transformed() else _product(*operands)


def _input_gradient(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    ends: Tensor | None,
    block_rows: int,
    block_columns: int,
    parts: int,
    transposed: bool,
) -> Tensor:
    """Linear in x, so its derivative is the product with the weights the other way round."""
    return product(grad, weight, scale, ends, block_rows, block_columns, parts, not transposed)
