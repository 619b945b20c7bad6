"""FP8 weights under activations of high precision, on a CPU, against torch's own cast and against BF16 weights.

One part, an MoE block as large as V3's, is left out if less than 20 GB of memory are free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import dequantize_blocks, fp8_weight_gemm, fp8_weight_grouped_gemm
from deepseek_kernels.gemm.fp8_weight_gemm.reference import Expansion

from ..core.machine import available_memory, load_average
from ..core.report import OURS, RESULTS, Report, Row, Samples
from ..core.tables import print_progress, show_and_save
from ..core.timing import interleave
from ..core.workers import run_isolated

__all__ = ["PARTS", "Settings", "main", "moe_block", "run"]

PARTS = ("token", "expansion", "rows", "moe")
CAST = "cast by torch, every time"  # weight.to(bfloat16) without the scales: a wrong result, in the least time
BF16 = "BF16 weight"  # dequantized in advance: twice the memory
TILES, WHOLE = "expansion inside the product", "dequantize_blocks to BF16"
BLOCK = (128, 128)
GIGA = 1e9

# An MoE layer of V3, its shared expert last.
EXPERTS, ACTIVE, HIDDEN, WIDTH = 256, 8, 7168, 2048
MOE_BYTES = 3 * (EXPERTS + 1) * HIDDEN * WIDTH
MOE_FREE = 20 * GIGA
TOKENS = 9  # one after the other; the first is the warm-up


# An expert's weights, a dense layer's, and that of the compressed keys.
SHAPES = ((2048, 7168), (7168, 2048), (18432, 7168), (576, 7168))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Weights and limits of the benchmark; shapes are [N, K], all of them V3's.

    Raises:
        ValueError: an unknown part, or a size that is not positive.
    """

    threads: Annotated[int, "threads of every contestant"] = 2
    only: Annotated[tuple[str, ...], "parts to measure"] = PARTS
    shapes: Annotated[tuple[tuple[int, int], ...], "weights for one token"] = SHAPES
    many: Annotated[tuple[int, int], "weight that is expanded, and that many rows are multiplied by"] = (2048, 7168)
    rows: Annotated[tuple[int, ...], "how many rows"] = (128, 1024)
    rounds: Annotated[int, "runs of each contestant, at most"] = 15
    budget_s: Annotated[float, "seconds after which a contestant of one row is not run again"] = 20.0
    out: Annotated[str, "report file (default: in benchmarks/results)"] = ""

    def __post_init__(self) -> None:
        sizes = [size for shape in (*self.shapes, self.many) for size in shape]
        if min(self.threads, self.rounds, *self.rows, *sizes) < 1:
            raise ValueError(f"expected positive sizes, got {self}")
        if not self.only or not set(self.only) <= set(PARTS):
            raise ValueError(f"expected parts among {', '.join(PARTS)}, got {', '.join(self.only) or 'none'}")


# Times better than the cast (the last one: the value itself).
GOALS = {"token": 5.0, "expansion": 4.0, "moe memory": 24.0}


def random_bytes(*shape: int) -> Tensor:
    """Random FP8 codes without NaN. Large tensors repeat a part: drawing 11 GB takes minutes, and speed is the same."""
    codes = torch.empty(shape, dtype=torch.uint8)
    flat, period = codes.view(-1), min(codes.numel(), 1 << 26)
    noise = torch.randint(0, 256, (period,), dtype=torch.uint8)
    noise.masked_fill_(noise & 0x7F == 0x7F, 0)
    for start in range(0, flat.numel(), period):
        part = flat[start : start + period]
        part.copy_(noise[: part.numel()])
    return codes.view(torch.float8_e4m3fn)


def random_scale(*shape: int) -> Tensor:
    """Random scales of codes of `shape`, under which the weights are as large as a fresh layer's."""
    *experts, rows, columns = shape
    return torch.rand(*experts, -(-rows // BLOCK[0]), -(-columns // BLOCK[1])) * 2e-4


def check(weight: Tensor, scale: Tensor) -> float:
    """Compares our product with the dequantized weight's before anything is timed.

    Returns:
        the largest difference, relative to the largest result.

    Raises:
        ValueError: the difference is more than float32 sums explain.
    """
    x = torch.randn(2, weight.shape[1])
    expected = F.linear(x, dequantize_blocks(weight, scale, BLOCK, torch.float32))
    error = float((fp8_weight_gemm(x, weight, scale) - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise ValueError(f"expected the product with the dequantized weight, got a relative difference of {error:.2g}")
    return error


def measure(settings: Settings, actions: dict[str, Callable[[], object]]) -> dict[str, Samples]:
    """Times the actions, in milliseconds."""
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
    """Expands a whole weight to BF16, or tile by tile into float32 buffers, as the product does it."""
    shape = settings.many
    weight, scale, plain = random_bytes(*shape), random_scale(*shape), torch.empty(shape, dtype=torch.bfloat16)

    def tiles() -> None:
        reader = Expansion(shape, BLOCK, 1, weight.device)
        for tile in reader.tiles:
            reader.codes(weight, tile)

    whole = partial(dequantize_blocks, weight, scale, BLOCK, out=plain)
    actions = {OURS: tiles if what == TILES else whole, CAST: lambda: weight.to(torch.bfloat16)}
    speed = {name: s.map(lambda ms: weight.numel() / ms / 1e6) for name, s in measure(settings, actions).items()}
    return Row(f"{what}, {list(shape)}", "G codes/s", "higher", speed, CAST, GOALS["expansion"])


# ------------------------------------------------------------------ an MoE block of V3, in a process of its own


def moe_block() -> Callable[[], Tensor]:
    """Returns the computation of one random token by 8 of 256 experts and the shared expert, with random weights."""
    shapes = {"gate_up": (EXPERTS + 1, 2 * WIDTH, HIDDEN), "down": (EXPERTS + 1, HIDDEN, WIDTH)}
    codes = {name: random_bytes(*shape) for name, shape in shapes.items()}
    scales = {name: random_scale(*shape) for name, shape in shapes.items()}
    router = torch.randn(EXPERTS, HIDDEN)

    def token() -> Tensor:
        x = torch.randn(1, HIDDEN, dtype=torch.bfloat16)
        weights, experts = (x.float() @ router.T).sigmoid()[0].topk(ACTIVE)
        ends = F.one_hot(torch.cat([experts, torch.tensor([EXPERTS])]), EXPERTS + 1).sum(0).cumsum(0)
        gate, up = fp8_weight_grouped_gemm(
            x.expand(ACTIVE + 1, HIDDEN), codes["gate_up"], scales["gate_up"], ends, parts=2
        ).chunk(2, -1)
        down = fp8_weight_grouped_gemm(F.silu(gate) * up, codes["down"], scales["down"], ends)
        share = torch.cat([weights[experts.argsort()], torch.ones(1)])
        y = (down.float() * share[:, None]).sum(0)
        if not y.isfinite().all():
            raise ValueError(f"expected finite results, got {y}")
        return y

    return token


def moe(settings: Settings) -> Iterator[Row]:
    """Time of a token through the block, and memory of its process; no rows without enough free memory."""
    if available_memory() < MOE_FREE:
        return
    task = {"task": "MoE block", "threads": settings.threads, "repeats": TOKENS}
    tokens = run_isolated("benchmarks.models.isolated_tasks", task)
    note = f"{ACTIVE} of {EXPERTS} experts and the shared one, {MOE_BYTES / GIGA:.1f} GB of codes"
    times = Samples(tuple(1e3 * token["seconds"] for token in tokens[1:]))
    yield Row("MoE block of V3, one token", "ms", "lower", {OURS: times}, note=note)
    memory = {
        OURS: Samples((tokens[-1]["peak"] / GIGA,)),
        "before the first token": Samples((tokens[0]["before"] / GIGA,)),
    }
    yield Row("MoE block of V3, memory", "GB", "lower", memory, goal=GOALS["moe memory"], note=note)


# ------------------------------------------------------------------ all of it

_MEASURES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "token": lambda settings: (one_token(settings, shape) for shape in settings.shapes),
    "expansion": lambda settings: (expansion(settings, what) for what in (TILES, WHOLE)),
    "rows": lambda settings: (many_rows(settings, rows) for rows in settings.rows),
    "moe": moe,
}


def run(settings: Settings, *, on_row: Callable[[Row], None] = lambda row: None) -> Report:
    """Measures the parts `settings.only`.

    Args:
        on_row: called with each row as it comes.

    Raises:
        ValueError: our product is not the dequantized weight's.
    """
    torch.set_num_threads(settings.threads)
    notes, rows = [f"load average before: {load_average()}"], []
    for part in settings.only:
        before = len(rows)
        for row in _MEASURES[part](settings):
            rows.append(row)
            on_row(row)
        if len(rows) == before:
            notes.append(f"{part}: left out, it needs {MOE_FREE / GIGA:.0f} GB of free memory")
    return Report("fp8-weights", asdict(settings), tuple(rows), tuple(notes))


def main(settings: Settings) -> int:
    """Runs the command `fp8-weights`."""
    show_and_save(run(settings, on_row=print_progress), settings.out or RESULTS / "fp8-weights.json")
    return 0
