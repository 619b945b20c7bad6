"""Threads that convert: each reads, converts and puts one band of a tensor after the other."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait

import torch
from torch import Tensor
from tqdm import tqdm

from ...quant.fp8_blocks import block_grid, dequantize_blocks
from ..files.reader import DTYPES, ShardError, TensorReader, memory_of
from ..finite_values import NonFinite
from ..problems import CheckpointError, Problem, ProblemKind
from .plan import BAND_BYTES, ConversionPlan
from .quantizer import Quantizer
from .steps import TensorStep

__all__ = ["Put", "Workers"]

# Takes the name of a new tensor, bytes of it, and where in it they start: writes them, or compares them.
Put = Callable[[str, Tensor, int], None]
# A step, and what is done of it at a time: from and to a row, or a byte of what is copied.
Band = tuple[TensorStep, int, int]


class Workers:
    """Threads that read, convert and put bands, each with operators of one thread. A context manager."""

    def __init__(self, plan: ConversionPlan) -> None:
        self._plan = plan
        self.not_finite = NonFinite()
        self._own = threading.local()
        self._files = contextlib.ExitStack()
        self._torch_threads = torch.get_num_threads()

    def __enter__(self) -> Workers:
        self._pool = ThreadPoolExecutor(self._torch_threads, initializer=self._start_thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.close()
        torch.set_num_threads(self._torch_threads)

    def _start_thread(self) -> None:
        torch.set_num_threads(1)
        self._own.converter = _Converter(self._plan, self._files, self.not_finite)

    def run(self, steps: list[TensorStep], put: Put, bar: tqdm) -> None:
        """Puts all bands of `steps`; raises what the first to fail raises, when none is at work any more."""
        bands = [band for step in steps for band in _bands(step, self._plan.block_size[0])]
        tasks = [self._pool.submit(self._process, band, put) for band in bands]
        try:
            for task in as_completed(tasks):
                bar.update(task.result())
        except BaseException:
            for task in tasks:
                task.cancel()
            wait(tasks)
            raise

    def _process(self, band: Band, put: Put) -> int:
        return self._own.converter.process(*band, put)


def _bands(step: TensorStep, block_rows: int) -> Iterator[Band]:
    """Cuts a step into bands of about `BAND_BYTES`, conversions at whole rows of blocks."""
    if step.action == "copy":
        extent, size = step.source.nbytes, BAND_BYTES
    else:
        extent, columns = step.source.shape
        itemsize = max(DTYPES[step.source.dtype].itemsize, step.to.tensor.itemsize)
        size = max(1, BAND_BYTES // (columns * itemsize) // block_rows) * block_rows
    for first in range(0, extent, size):
        yield step, first, min(first + size, extent)


class _Converter:
    """Open files of one thread, and its memory for a band before and after."""

    def __init__(self, plan: ConversionPlan, files: contextlib.ExitStack, not_finite: NonFinite) -> None:
        self._plan = plan
        self._not_finite = not_finite
        self._quantizer = Quantizer(plan.block_size, plan.scale_format)
        self._weights, self._scales = files.enter_context(TensorReader()), files.enter_context(TensorReader())
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def process(self, step: TensorStep, first: int, last: int, put: Put) -> int:
        """Reads, converts and puts a band; returns the bytes read."""
        before = self._weights.bytes_read + self._scales.bytes_read
        try:
            getattr(self, f"_{step.action}")(step, first, last, put)
        except ShardError as error:
            self._plan.source.check_unchanged()
            raise CheckpointError(self._plan.source.folder, [Problem(ProblemKind.SHARDS, str(error))]) from None
        except ValueError as error:
            raise ValueError(f"{step.name}: {error}") from None
        return self._weights.bytes_read + self._scales.bytes_read - before

    def _result(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Returns memory that the next band overwrites."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._memory.nbytes < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return self._memory[:nbytes].view(dtype).view(shape)

    def _copy(self, step: TensorStep, first: int, last: int, put: Put) -> None:
        copied = self._result(torch.uint8, last - first)
        self._weights.read_into(step.source, memory_of(copied), first)
        itemsize = DTYPES[step.source.dtype].itemsize
        if first % itemsize == 0 and (last - first) % itemsize == 0:
            self._not_finite.check(step.name, copied.view(DTYPES[step.source.dtype]))
        put(step.to.tensor.name, copied, step.to.first + first)

    def _dequantize(self, step: TensorStep, first: int, last: int, put: Put) -> None:
        assert step.scale is not None
        block_rows, columns = self._plan.block_size[0], step.source.shape[1]
        codes = self._weights.rows(step.source, first, last)
        scale = self._scales.rows(step.scale, first // block_rows, -(-last // block_rows))
        wide = self._result(DTYPES[step.to.tensor.dtype], last - first, columns)
        dequantize_blocks(codes, scale, self._plan.block_size, out=wide)
        self._not_finite.check(step.name, wide)
        put(step.to.tensor.name, wide, step.to.first + first * columns * wide.itemsize)

    def _quantize(self, step: TensorStep, first: int, last: int, put: Put) -> None:
        assert step.scale_to is not None
        block_rows, columns = self._plan.block_size[0], step.source.shape[1]
        weight = self._weights.rows(step.source, first, last)
        if weight.dtype == torch.float64:
            weight = weight.float()
        codes = self._result(torch.float8_e4m3fn, last - first, columns)
        scale = torch.empty(block_grid(weight.shape, self._plan.block_size), device="cpu")
        self._quantizer.quantize(weight, codes, scale)
        put(step.to.tensor.name, codes, step.to.first + first * columns)
        put(step.scale_to.tensor.name, scale, step.scale_to.first + first // block_rows * scale[0].nbytes)
