"""Published FP8, BF16, and stacked checkpoints, each into each other, in a stream: `convert`."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.argument_types import check_types
from ...config.deepseek_config import DeepseekConfig
from ..files.companions import companions
from ..files.progress import progress
from ..files.resumable_writer import ResumableWriter
from ..problems import CheckpointError, Problem, ProblemKind
from .plan import ConversionPlan, plan_conversion
from .workers import Workers

__all__ = ["ConversionReport", "convert"]


@dataclass(frozen=True)
class ConversionReport:
    """Outcome of `convert`.

    Attributes:
        files: the shards, their index and config.json, and companions such as a tokenizer.
        tensors, nbytes: in the new files.
        copied, dequantized, quantized: how many tensors of the published layout, scales included.
        continued: number of shards that an earlier, interrupted conversion had finished.
        verified: True if every byte was read back and compared.
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


@check_types
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

    MTP modules, their copies of the embedding and the head, a tokenizer and other small files come
    along. config.json changes in `quantization_config` and `torch_dtype` only. A checkpoint that is in `out` already is
    replaced when the new one is complete.

    What the bytes are:
    - Router, router bias, norms, embedding, head, eh_proj and everything that is in the new format already keep
      theirs. FP8 codes and scales keep them where the format stays "fp8", also into a stack and out of it.
    - FP8 to BF16 is `float32(code) * scale`, rounded once to `dtype`. A code that means NaN stays NaN.
    - BF16 to FP8 is `fp8_blocks.quantize_blocks`, the published rule.
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
        stacked: experts of a layer in one tensor, as transformers 5 holds them (see `load_plan`); None as they are.
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
        warnings.warn(f"{plan.source.folder}: {message}", stacklevel=3)  # past the decorator
    with ResumableWriter(plan.out, plan.shards, plan.manifest, resume) as writer, Workers(plan) as workers:
        continued = len(writer.names) - len(writer.unfinished)
        _write(plan, writer, workers)
        if verify:
            _verify(plan, writer, workers)
        plan.source.check_unchanged()
        files = writer.commit(plan.config, companions(plan.source.folder))
    for message in workers.not_finite.warnings:
        warnings.warn(f"{plan.source.folder}: {message}", stacklevel=3)  # past the decorator
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


def _write(plan: ConversionPlan, writer: ResumableWriter, workers: Workers) -> None:
    """Converts the files that are still to be written."""
    unfinished = set(writer.unfinished)
    left = [(name, steps) for name, steps in zip(plan.names, plan.steps, strict=True) if name in unfinished]
    total = sum(step.bytes_read for _, steps in left for step in steps)
    with progress(f"converting {plan.source.folder.name}", total) as bar:
        for name, steps in left:
            writer.start(name)
            workers.run(steps, writer.put, bar)
            writer.finish(name)
    writer.settle()


def _verify(plan: ConversionPlan, writer: ResumableWriter, workers: Workers) -> None:
    """Converts everything again and compares it with what the files hold."""
    mismatches: dict[str, set[str]] = {}

    def compare(name: str, tensor: Tensor, first_byte: int) -> None:
        expected = tensor.reshape(-1).view(torch.uint8)
        if not torch.equal(writer.get(name, expected.numel(), first_byte), expected):
            different.add(name)

    with progress(f"verifying {plan.out.name}", plan.bytes_read) as bar:
        for shard, steps in zip(plan.names, plan.steps, strict=True):
            different: set[str] = set()
            if writer.is_sound(shard):
                workers.run(steps, compare, bar)
            else:
                different.add("its header")
            if different:
                mismatches[shard] = different
    if mismatches:
        for shard in mismatches:
            writer.reject(shard)
        details = [f"{name} in {shard}" for shard, names in mismatches.items() for name in sorted(names)]
        raise CheckpointError(plan.out, [Problem(ProblemKind.WRITTEN_OTHERWISE, detail) for detail in details])
