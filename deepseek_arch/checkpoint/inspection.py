"""A checkpoint's tensors and what would become of them, for people and programs; nothing is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.argument_types import check_types
from ..config.deepseek_config import DeepseekConfig
from .files.reader import TensorInfo
from .load_plan import plan_load
from .problems import by_kind

__all__ = ["CheckpointReport", "inspect_checkpoint"]


@dataclass(frozen=True)
class CheckpointReport:
    """Findings of `inspect_checkpoint`.

    Attributes:
        tensors: every tensor, in file order: name, dtype as in the file, shape, shard, bytes.
        loads: names that would be loaded; dequantized: number of FP8 ones, which `load` keeps or dequantizes.
        aliases: second copies of the embedding and head, which `load` compares with the main model's.
        problems: by kind, as far as headers can tell; values (scales that are not finite, repeated embeddings that
            differ) are looked at by `load`.
    """

    path: Path
    config: DeepseekConfig
    tensors: tuple[TensorInfo, ...]
    loads: tuple[str, ...]
    dequantized: int
    aliases: tuple[str, ...]
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]
    problems: dict[str, list[str]]

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def shards(self) -> dict[str, int]:
        """Tensor bytes by shard name."""
        return dict(_sums((info.file.name, info.nbytes) for info in self.tensors))

    @property
    def dtypes(self) -> dict[str, tuple[int, int]]:
        """dtype -> (tensors, bytes)."""
        counts = Counter(info.dtype for info in self.tensors)
        sizes = _sums((info.dtype, info.nbytes) for info in self.tensors)
        return {dtype: (counts[dtype], sizes[dtype]) for dtype in sorted(counts)}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON can hold it."""
        return {
            "path": str(self.path),
            "model_type": self.config.model_type,
            "ok": self.ok,
            "bytes": self.nbytes,
            "shards": self.shards,
            "dtypes": {name: {"tensors": n, "bytes": size} for name, (n, size) in self.dtypes.items()},
            "tensors": [
                {"name": i.name, "dtype": i.dtype, "shape": list(i.shape), "shard": i.file.name, "bytes": i.nbytes}
                for i in self.tensors
            ],
            "loads": list(self.loads),
            "dequantized": self.dequantized,
            "aliases": list(self.aliases),
            "skipped": list(self.skipped),
            "warnings": list(self.warnings),
            "problems": {kind: list(details) for kind, details in self.problems.items()},
        }


def _sums(pairs: Iterable[tuple[str, int]]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for key, value in pairs:
        sums[key] += value
    return sums


@check_types
def inspect_checkpoint(path: str | Path) -> CheckpointReport:
    """Lists the tensors of a checkpoint and everything that would keep it from loading, from config and headers alone.

    Raises:
        ValueError: `path` is no checkpoint folder, or its config describes no supported model. Everything else that
            is wrong is in the report's `problems`.
    """
    plan = plan_load(path, open_all=True)
    plan.warnings += [f"{experts} are FP8: only fp8='dequantize' loads them" for experts in plan.mixed_experts]
    return CheckpointReport(
        path=plan.folder,
        config=plan.subset.source,
        tensors=tuple(plan.tensors),
        loads=tuple(slot.name for slot in plan.slots),
        dequantized=len(plan.scales),
        aliases=tuple(slot.name for slot in plan.repeats),
        skipped=tuple(plan.skipped),
        warnings=tuple(plan.warnings),
        problems=by_kind(plan.problems),
    )
