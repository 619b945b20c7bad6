"""FP8 weights under activations of high precision, on a CPU: against torch's own cast, and against BF16 weights.

`python -m benchmarks fp8-weights` measures all of it. One part, an MoE block as large as V3's, is left out where less
than 20 GB are free.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import dequantize_blocks, fp8_weight_gemm, fp8_weight_grouped_gemm
from deepseek_kernels.gemm.fp8_weight_gemm.reference import Expansion

from ..core.isolated import ROOT, _status
from ..core.report import OURS, Report, Row, Samples, interleave, load_average

__all__ = ["PARTS", "Settings", "run"]

PARTS = ("token", "expansion", "rows", "moe")
CAST = "cast by torch, every time"  # weight.to(bfloat16), without scales: fast, if wrong, is its best case
BF16 = "BF16 weight"  # dequantized once and for all: twice the memory
TILES, WHOLE = "expansion inside the product", "dequantize_blocks to BF16"
BLOCK = (128, 128)
GIGA = 1e9

# An MoE layer of V3, its shared expert last.
EXPERTS, ACTIVE, HIDDEN, WIDTH = 256, 8, 7168, 2048
MOE_BYTES = 3 * (EXPERTS + 1) * HIDDEN * WIDTH
MOE_FREE = 20 * GIGA
TOKENS = 9  # one after the other; the first one does not count


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and how long to take.

    Attributes:
        shapes: [N, K] of the weights, all from V3: an expert's, both ways, a dense layer's, the compressed keys'.
        many: shape of the weight that is expanded, and that more rows than one are multiplied by.
        rows: how many rows.
        budget_s: seconds after which a contestant of one row is not run again.
    """

    threads: int = 2
    shapes: tuple[tuple[int, int], ...] = ((2048, 7168), (7168, 2048), (18432, 7168), (576, 7168))
    many: tuple[int, int] = (2048, 7168)
    rows: tuple[int, ...] = (128, 1024)
    rounds: int = 15
    budget_s: float = 20.0

    def __post_init__(self) -> None:
        sizes = [size for shape in (*self.shapes, self.many) for size in shape]
        if min(self.threads, self.rounds, *self.rows, *sizes) < 1:
            raise ValueError(f"expected positive sizes, got {self}")


# How many times better than the cast (the last one: the value itself).
GOALS = {"token": 5.0, "expansion": 4.0, "moe memory": 24.0}


def random_bytes(*shape: int) -> Tensor:
    """Codes without NaN. Large ones repeat: drawing 11 GB would take minutes, and nobody's speed depends on them."""
    codes = torch.empty(shape, dtype=torch.uint8)
    flat, period = codes.view(-1), min(codes.numel(), 1 << 26)
    own = torch.randint(0, 256, (period,), dtype=torch.uint8)
    own.masked_fill_(own & 0x7F == 0x7F, 0)
    for start in range(0, flat.numel(), period):
        part = flat[start : start + period]
        part.copy_(own[: part.numel()])
    return codes.view(torch.float8_e4m3fn)


def random_scale(*shape: int) -> Tensor:
    """For codes of `shape`, so that the weights are as large as a fresh layer's."""
    *experts, rows, columns = shape
    return torch.rand(*experts, -(-rows // BLOCK[0]), -(-columns // BLOCK[1])) * 2e-4


def check(weight: Tensor, scale: Tensor) -> float:
    """Numbers only after the result is right.

    Returns:
        The largest difference from the dequantized weight's product, relative to the largest result.

    Raises:
        ValueError: it is more than float32 sums explain.
    """
    x = torch.randn(2, weight.shape[1])
    expected = F.linear(x, dequantize_blocks(weight, scale, BLOCK, torch.float32))
    found = float((fp8_weight_gemm(x, weight, scale) - expected).abs().max() / expected.abs().max())
    if not found < 1e-4:
        raise ValueError(f"expected the product with the dequantized weight, got a relative difference of {found:.2g}")
    return found


def measure(settings: Settings, actions: dict[str, Callable[[], object]]) -> dict[str, Samples]:
    seconds = interleave(actions, rounds=settings.rounds, budget_s=settings.budget_s)
    return {name: samples.map(lambda s: s * 1e3) for name, samples in seconds.items()}


def one_token(settings: Settings, shape: tuple[int, int]) -> Row:
    weight, scale, x = random_bytes(*shape), random_scale(*shape), torch.randn(1, shape[1], dtype=torch.bfloat16)
    check(weight, scale)
    plain = dequantize_blocks(weight, scale)
    actions = {
        OURS: lambda: fp8_weight_gemm(x, weight, scale),
        CAST: lambda: weight.to(torch.bfloat16) @ x[0],
        BF16: lambda: F.linear(x, plain),
    }
    return Row(f"one token, {list(shape)}", "ms", "lower", measure(settings, actions), CAST, GOALS["token"])


def many_rows(settings: Settings, rows: int) -> Row:
    weight, scale = random_bytes(*settings.many), random_scale(*settings.many)
    plain, x = dequantize_blocks(weight, scale), torch.randn(rows, settings.many[1], dtype=torch.bfloat16)
    actions = {
        OURS: lambda: fp8_weight_gemm(x, weight, scale),
        CAST: lambda: F.linear(x, weight.to(torch.bfloat16)),
        BF16: lambda: F.linear(x, plain),
    }
    return Row(f"{rows} rows, {list(settings.many)}", "ms", "lower", measure(settings, actions), CAST)


def expansion(settings: Settings, what: str) -> Row:
    """Of a whole weight into a BF16 one, or tile by tile into float32 buffers, as the product does it."""
    shape = settings.many
    weight, scale, plain = random_bytes(*shape), random_scale(*shape), torch.empty(shape, dtype=torch.bfloat16)

    def tiles() -> None:
        reader = Expansion(shape, BLOCK, 1, weight.device)
        for tile in reader.tiles:
            reader.codes(weight, tile)

    whole = partial(dequantize_blocks, weight, scale, BLOCK, out=plain)
    actions = {OURS: tiles if what == TILES else whole, CAST: lambda: weight.to(torch.bfloat16)}
    speed = {who: s.map(lambda ms: weight.numel() / ms / 1e6) for who, s in measure(settings, actions).items()}
    return Row(f"{what}, {list(shape)}", "G codes/s", "higher", speed, CAST, GOALS["expansion"])


# ------------------------------------------------------------------ an MoE block of V3, in a process of its own


def moe_block(threads: int) -> dict[str, object]:
    """Seconds of each token through 8 of 256 experts and the shared one, and the process's memory at most."""
    torch.set_num_threads(threads)
    shapes = {"gate_up": (EXPERTS + 1, 2 * WIDTH, HIDDEN), "down": (EXPERTS + 1, HIDDEN, WIDTH)}
    codes = {name: random_bytes(*shape) for name, shape in shapes.items()}
    scales = {name: random_scale(*shape) for name, shape in shapes.items()}
    router = torch.randn(EXPERTS, HIDDEN)
    before, seconds = _status("VmRSS"), []
    for _ in range(TOKENS):
        x = torch.randn(1, HIDDEN, dtype=torch.bfloat16)
        start = time.perf_counter()
        weights, experts = (x.float() @ router.T).sigmoid()[0].topk(ACTIVE)
        ends = F.one_hot(torch.cat([experts, torch.tensor([EXPERTS])]), EXPERTS + 1).sum(0).cumsum(0)
        gate, up = fp8_weight_grouped_gemm(
            x.expand(ACTIVE + 1, HIDDEN), codes["gate_up"], scales["gate_up"], ends, parts=2
        ).chunk(2, -1)
        down = fp8_weight_grouped_gemm(F.silu(gate) * up, codes["down"], scales["down"], ends)
        share = torch.cat([weights[experts.argsort()], torch.ones(1)])
        y = (down.float() * share[:, None]).sum(0)
        seconds.append(time.perf_counter() - start)
        if not y.isfinite().all():
            raise ValueError(f"expected finite results, got {y}")
    return {"seconds": seconds[1:], "before": before, "peak": _status("VmHWM")}


def moe(settings: Settings) -> Iterator[Row]:
    if free_bytes() < MOE_FREE:
        return
    command = [sys.executable, "-m", "benchmarks.models.fp8_weights", json.dumps({"threads": settings.threads})]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"the MoE block failed with status {done.returncode}: {done.stderr.decode()[-2000:]}")
    found = json.loads(done.stdout)
    note = f"{ACTIVE} of {EXPERTS} experts and the shared one, {MOE_BYTES / GIGA:.1f} GB of codes"
    times = Samples(tuple(s * 1e3 for s in found["seconds"]))
    yield Row("MoE block of V3, one token", "ms", "lower", {OURS: times}, note=note)
    memory = {
        OURS: Samples((found["peak"] / GIGA,)),
        "before the first token": Samples((found["before"] / GIGA,)),
    }
    yield Row("MoE block of V3, memory", "GB", "lower", memory, goal=GOALS["moe memory"], note=note)


def free_bytes() -> float:
    """Memory that a new process can have without swapping; 0 where the system does not say."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return 0
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------ all of it

_MEASURES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "token": lambda settings: (one_token(settings, shape) for shape in settings.shapes),
    "expansion": lambda settings: (expansion(settings, what) for what in (TILES, WHOLE)),
    "rows": lambda settings: (many_rows(settings, rows) for rows in settings.rows),
    "moe": moe,
}


def run(
    settings: Settings, parts: tuple[str, ...] = PARTS, *, on_row: Callable[[Row], None] = lambda row: None
) -> Report:
    """Measures `parts`.

    Args:
        on_row: called with each row as it comes.

    Raises:
        ValueError: a part is unknown, or our product is not the dequantized weight's.
    """
    unknown = set(parts) - set(PARTS)
    if unknown or not parts:
        raise ValueError(f"expected parts among {', '.join(PARTS)}, got {', '.join(sorted(unknown)) or 'none'}")
    torch.set_num_threads(settings.threads)
    notes, rows = [f"load average before: {load_average()}"], []
    for part in parts:
        found = 0
        for row in _MEASURES[part](settings):
            rows.append(row)
            on_row(row)
            found += 1
        if not found:
            notes.append(f"{part}: left out, it needs {MOE_FREE / GIGA:.0f} GB of free memory")
    return Report("fp8-weights", asdict(settings), tuple(rows), tuple(notes))


if __name__ == "__main__":  # the process of the MoE block
    print(json.dumps(moe_block(**json.loads(sys.argv[1]))))
