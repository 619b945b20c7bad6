"""FP8 weights expanded a tile at a time, into buffers that every tile uses again: no fresh pages, and mostly in cache.

The buffers take 6 bytes for each code of a tile, and a tile has at most an eighth of the codes: less memory than they.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Codes of a tile for each thread of a CPU: 2 MB of integers and 4 MB of floats. With smaller tiles, starting all the
# operations costs more than a nearer cache saves (measured from 2^14 to 2^22). A GPU starts them more slowly.
TILE = 1 << 20
GPU_TILE = 1 << 24
SMALL = 1 << 16  # a weight this small is one tile
UNIT = 256.0  # decoded codes are this much too small: it is the scales that are multiplied, where it costs nothing

_NAN = 0x7F  # with either sign


class Band(NamedTuple):
    """Consecutive rows that share one row of scales: number `scales`."""

    scales: int
    first: int
    end: int


def bands(rows: int, block: int, parts: int) -> Iterator[Band]:
    """The rows of a weight in blocks; each of its `parts` stacked matrices starts a grid of its own."""
    height = rows // parts
    down = -(-height // block)
    for part in range(parts):
        for number in range(down):
            first = part * height + number * block
            yield Band(part * down + number, first, min(first + block, (part + 1) * height))


def tiles(rows: int, block: int, parts: int, most: int) -> Iterator[list[Band]]:
    """The same rows in order, in tiles of at most `most`; a band that is longer is cut."""
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
    """[rows] int64: the row of scales that each row of a weight belongs to."""
    height = max(rows // parts, 1)
    row = torch.arange(rows, device=device)
    return row // height * -(-height // block) + row % height // block


def decode_into(codes: Tensor, half: Tensor, wide: Tensor) -> None:
    """`wide` float32 = float8_e4m3fn `codes` divided by `UNIT`, exactly; `half` int16 is scratch. All [r, c].

    The bits s eeee mmm of a code, put at the same places of a float16 (s 0eeee mmm0000000), are the same number but for
    the exponent bias, 15 instead of 7: a factor 2^8. Subnormals follow the same rule; only NaN, all ones, does not.
    """
    signed = codes.view(torch.int8)
    half.copy_(signed).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))  # the sign fills the upper byte
    wide.copy_(half.view(torch.float16))
    if codes.device.type != "cpu" or _holds_nan(codes):  # to look first pays off on a CPU only
        wide.masked_fill_((signed & _NAN) == _NAN, torch.nan)


def _holds_nan(codes: Tensor) -> bool:
    """Whether there are NaN codes: 0x7f is the largest signed byte, 0xff the largest unsigned one."""
    if not codes.numel():
        return False
    return codes.view(torch.int8).amax().item() == 127 or codes.view(torch.uint8).amax().item() == 255


def tile_size(codes: int, device: torch.device) -> int:
    """How many codes of a weight to decode at a time; with more than 8 threads, they share the tile of 8."""
    most = GPU_TILE if device.type == "cuda" else TILE * min(torch.get_num_threads(), 8)
    return min(most, max(codes // 8, SMALL))


class Expansion:
    """How each weight of a stack is read: in tiles of rows for `x @ W.T`, or of columns (`transposed`) for `x @ W`.

    Below, an output is what one column of the result is made for, a term what a product sums over.

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
        """The tile's codes, up to a power of two that `factors` knows, float32 [outputs, terms].

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
        """What to multiply those by: a row for each band of the tile, [bands, terms] float32."""
        own = (scale.T if self.transposed else scale)[tile[0].scales : tile[-1].scales + 1]
        return (own if self.native else own * UNIT).index_select(1, self.terms)
