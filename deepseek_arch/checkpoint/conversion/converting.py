"""Published FP8, BF16, and stacked checkpoints, each into each other, in a stream: `convert`."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...config.deepseek_config import DeepseekConfig
from ...quant.fp8_blocks import block_grid, dequantize_blocks
from ..files.progress import progress
from ..files.reader import DTYPES, ShardError, TensorReader, memory_of
from ..files.resumable_writer import ResumableWriter
from ..load_plan import CheckpointError
from ..saving import _companions
from .plan import BAND_BYTES, ConversionPlan, plan_conversion
from .quantizer import Quantizer
from .steps import TensorStep

__all__ = ["ConversionReport", "convert"]

# Takes the name of a new tensor, bytes of it, and where in it they start: writes them, or compares them.
Put = Callable[[str, Tensor, int], None]


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did.

    Attributes:
        files: the shards, their index and config.json, and companions such as a tokenizer.
        tensors, nbytes: in the new files.
        copied, dequantized, quantized: how many tensors of the published layout, scales included.
        continued: shards that an earlier, interrupted conversion had finished.
        verified: whether every byte was read back and compared.
    """

    path: Path
    config: DeepseekConfig
    files: tuple[Path, ...]
    tensors: int
    nbytes: int
    bytes_read: int
    copied: int
    dequantized: int
    quantized: int
    continued: int
    verified: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything but the config, as JSON can hold it."""
        fields = {name: value for name, value in vars(self).items() if name != "config"}
        return fields | {"path": str(self.path), "files": [str(file) for file in self.files]}

    def __str__(self) -> str:
        parts = [f"{self.tensors:,} tensors, {self.nbytes:,} bytes in {len(self.files)} files at {self.path}"]
        for count, what in (
            (self.copied, "copied"),
            (self.dequantized, "dequantized"),
            (self.quantized, "quantized"),
            (self.continued, "files continued from before"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        if self.verified:
            parts.append("verified")
        return ", ".join(parts) + f", in {self.seconds:.1f} s"


def convert(
    path: str | Path,
    out: str | Path,
    format: str = "bf16",
    stacked: bool | None = None,
    max_shard_size: int | str = "5GB",
    scale_format: str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    resume: bool = True,
    verify: bool = False,
) -> ConversionReport:
    """Writes a checkpoint as another one of the same model: FP8 or not, experts single or stacked.

    Multi-token-prediction layers, their copies of the embedding and the head, a tokenizer and other small files come
    along. config.json changes in `quantization_config` and `torch_dtype` only. A checkpoint that is in `out` already is
    replaced when the new one is complete.

    What the bytes are:
    - Router, router bias, norms, embedding, head, eh_proj and everything that is in the wanted format already keep
      theirs. FP8 codes and scales keep them where the format stays "fp8", also into a stack and out of it.
    - FP8 to BF16 is `float32(code) * scale`, rounded once to `dtype`. A code that means NaN stays NaN.
    - BF16 to FP8 is `fp8.quantize_blocks`, the published rule.
    - FP8 to BF16 and back: with power-of-two scales ("ue8m0") the same model, bit for bit: every product is exact in
      bfloat16. With float32 scales the same codes, and scales that are off by bfloat16's rounding, 2^-8 at most. Both
      hold where the scales are those that `quantize_blocks` chooses and no weight is subnormal. (Same model, not same
      bytes: a block of power-of-two scale whose largest code is 224 comes back as twice the codes, half the scale.)

    The work is a stream: beside the headers, each of `torch.get_num_threads()` threads holds a few bands of a tensor
    (`plan_conversion(...).memory_needed`), no more, however large the checkpoint. Files are finished one after the
    other in a hidden folder in `out`, and stay there if the process dies or fails: the same call goes on after the
    last of them. Only then does the checkpoint appear, config.json last.

    Args:
        format: "fp8" or "bf16", which is anything that is not FP8: a float32 checkpoint stays one.
        stacked: experts of a layer in one tensor, as transformers 5 holds them (see `stacking`); None as they are.
        max_shard_size: bytes, or "5GB", "200MB" and so on; a larger tensor, such as a stack, gets a file of its own.
        scale_format: of new FP8 scales: "ue8m0" for powers of two. None: what config.json says, or float32.
        dtype: of what was FP8: bfloat16, float16 or float32.
        resume: go on from what an interrupted conversion left; False starts afresh.
        verify: read all files back from the disk and compare them with a second conversion, byte for byte, before the
            checkpoint appears.

    Raises:
        CheckpointError: the checkpoint is not what its config says, as for `load`; or what was written is not what was
            read back: a second call writes the files anew in which that was found.
        ValueError: an argument is wrong; `out` is the checkpoint itself, or holds an interrupted conversion of another
            checkpoint or with other arguments, or another process is converting to it; a weight that would become FP8,
            or a scale, is not finite (its name is given).
        OSError: the disk is full, or a file cannot be read or written.
    """
    started = time.perf_counter()
    plan = plan_conversion(path, out, format, stacked, max_shard_size, scale_format, dtype)
    for message in plan.source.warnings:
        warnings.warn(f"{plan.source.folder}: {message}", stacklevel=2)
    with ResumableWriter(plan.out, plan.shards, plan.manifest, resume) as writer, _Workers(plan) as workers:
        continued = len(writer.names) - len(writer.unfinished)
        _write(plan, writer, workers)
        if verify:
            _verify(plan, writer, workers)
        files = writer.commit(plan.config, _companions(plan.source.folder))
    return ConversionReport(
        path=plan.out,
        config=DeepseekConfig.from_pretrained(plan.out),
        files=tuple(files),
        tensors=sum(map(len, plan.shards)),
        nbytes=plan.bytes_written,
        bytes_read=plan.bytes_read,
        copied=plan.actions["copy"],
        dequantized=plan.actions["dequantize"],
        quantized=plan.actions["quantize"],
        continued=continued,
        verified=verify,
        seconds=time.perf_counter() - started,
    )


def _write(plan: ConversionPlan, writer: ResumableWriter, workers: _Workers) -> None:
    """Converts the files that are still to be written."""
    unfinished = set(writer.unfinished)
    left = [(name, pieces) for name, pieces in zip(plan.names, plan.pieces, strict=True) if name in unfinished]
    total = sum(piece.bytes_read for _, pieces in left for piece in pieces)
    with progress(f"converting {plan.source.folder.name}", total) as bar:
        for name, pieces in left:
            writer.start(name)
            workers.run(pieces, writer.put, bar)
            writer.finish(name)
    writer.settle()


def _verify(plan: ConversionPlan, writer: ResumableWriter, workers: _Workers) -> None:
    """Converts everything again and compares it with what the files hold."""
    found: dict[str, set[str]] = {}

    def compare(name: str, tensor: Tensor, first_byte: int) -> None:
        expected = tensor.reshape(-1).view(torch.uint8)
        if not torch.equal(writer.get(name, expected.numel(), first_byte), expected):
            different.add(name)

    with progress(f"verifying {plan.out.name}", plan.bytes_read) as bar:
        for shard, pieces in zip(plan.names, plan.pieces, strict=True):
            different: set[str] = set()
            if writer.is_sound(shard):
                workers.run(pieces, compare, bar)
            else:
                different.add("its header")
            if different:
                found[shard] = different
    if found:
        for shard in found:
            writer.reject(shard)
        lines = [f"{name} in {shard}" for shard, names in found.items() for name in sorted(names)]
        raise CheckpointError(plan.out, {"tensors read back otherwise than written": lines})


# A piece, and what is done of it at a time: rows, or bytes of what is copied.
Band = tuple[TensorStep, int, int]


class _Workers:
    """Threads that read, convert and put bands, each with operators of one thread. A context manager."""

    def __init__(self, plan: ConversionPlan) -> None:
        self._plan = plan
        self._own = threading.local()
        self._files = contextlib.ExitStack()
        self._torch_threads = torch.get_num_threads()

    def __enter__(self) -> _Workers:
        self._pool = ThreadPoolExecutor(self._torch_threads, initializer=self._start_thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.close()
        torch.set_num_threads(self._torch_threads)

    def _start_thread(self) -> None:
        torch.set_num_threads(1)
        self._own.converter = _Converter(self._plan, self._files)

    def run(self, pieces: list[TensorStep], put: Put, bar: tqdm) -> None:
        """Puts all bands of `pieces`; raises what the first to fail raises, when none is at work any more."""
        bands = [band for piece in pieces for band in _bands(piece, self._plan.block_size[0])]
        tasks = [self._pool.submit(lambda band=band: self._own.converter.process(*band, put)) for band in bands]
        try:
            for task in as_completed(tasks):
                bar.update(task.result())
        except BaseException:
            for task in tasks:
                task.cancel()
            wait(tasks)
            raise


def _bands(piece: TensorStep, block_rows: int) -> Iterator[Band]:
    """Cuts a piece into bands of about `BAND_BYTES`, conversions at whole rows of blocks."""
    if piece.action == "copy":
        extent, step = piece.source.nbytes, BAND_BYTES
    else:
        extent, columns = piece.source.shape
        wider = max(DTYPES[piece.source.dtype].itemsize, piece.to.tensor.itemsize)
        step = max(1, BAND_BYTES // (columns * wider) // block_rows) * block_rows
    for first in range(0, extent, step):
        yield piece, first, min(first + step, extent)


class _Converter:
    """What one thread converts with: open files, and memory for a band before and after."""

    def __init__(self, plan: ConversionPlan, files: contextlib.ExitStack) -> None:
        self._plan = plan
        self._quantizer = Quantizer(plan.block_size, plan.scale_format)
        self._weights, self._scales = files.enter_context(TensorReader()), files.enter_context(TensorReader())
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def process(self, piece: TensorStep, first: int, last: int, put: Put) -> int:
        """Reads, converts and puts a band; returns the bytes read."""
        before = self._weights.bytes_read + self._scales.bytes_read
        try:
            getattr(self, f"_{piece.action}")(piece, first, last, put)
        except ShardError as error:
            raise CheckpointError(self._plan.source.folder, {"shards": [str(error)]}) from None
        except ValueError as error:
            raise ValueError(f"{piece.name}: {error}") from None
        return self._weights.bytes_read + self._scales.bytes_read - before

    def _result(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory that the next band overwrites."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._memory.nbytes < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return self._memory[:nbytes].view(dtype).view(shape)

    def _copy(self, piece: TensorStep, first: int, last: int, put: Put) -> None:
        copied = self._result(torch.uint8, last - first)
        self._weights.read_into(piece.source, memory_of(copied), first)
        put(piece.to.tensor.name, copied, piece.to.first + first)

    def _dequantize(self, piece: TensorStep, first: int, last: int, put: Put) -> None:
        assert piece.scale is not None
        block_rows, columns = self._plan.block_size[0], piece.source.shape[1]
        codes = self._weights.rows(piece.source, first, last)
        scale = self._scales.rows(piece.scale, first // block_rows, -(-last // block_rows))
        wide = self._result(DTYPES[piece.to.tensor.dtype], last - first, columns)
        dequantize_blocks(codes, scale, self._plan.block_size, out=wide)
        put(piece.to.tensor.name, wide, piece.to.first + first * columns * wide.itemsize)

    def _quantize(self, piece: TensorStep, first: int, last: int, put: Put) -> None:
        assert piece.scale_to is not None
        block_rows, columns = self._plan.block_size[0], piece.source.shape[1]
        weight = self._weights.rows(piece.source, first, last)
        if weight.dtype == torch.float64:
            weight = weight.float()
        codes = self._result(torch.float8_e4m3fn, last - first, columns)
        scale = torch.empty(block_grid(weight.shape, self._plan.block_size), device="cpu")
        self._quantizer.quantize(weight, codes, scale)
        put(piece.to.tensor.name, codes, piece.to.first + first * columns)
        put(piece.scale_to.tensor.name, scale, piece.scale_to.first + first // block_rows * scale[0].nbytes)
