"""Settings of the command `model`, and the goals of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import deepseek_arch as da

from .contestants import DTYPES, comparable

__all__ = ["GOALS", "PARTS", "Settings"]

PARTS = ("decode", "prefill", "kept", "batches", "fp32", "small", "compiled", "train", "load")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Model, parts and limits of the benchmark.

    Raises:
        ValueError: an unknown dtype or part, a size that is not positive, or a file of llama.cpp without the other.
    """

    preset: Annotated[str, "a preset name, a config.json or a checkpoint folder"] = "deepseek-v2-lite"
    layers: Annotated[int, "decoder layers to keep"] = 4
    dtype: Annotated[str, "bf16 or fp32"] = "bf16"
    threads: Annotated[int, "of every contestant"] = 2
    only: Annotated[tuple[str, ...], "parts to measure"] = PARTS
    contexts: Annotated[tuple[int, ...], "cached tokens to decode at; the first one also in FP8 and fp32"] = (
        512,
        8192,
        32768,
    )
    prompts: Annotated[tuple[int, ...], "prompt lengths to prefill"] = (2048,)
    batches: Annotated[tuple[int, ...], "rows of a decode step, at the first context"] = (1, 8, 32)
    batch_layers: Annotated[int, "decoder layers of the model whose batches grow"] = 2
    fp32_prompt: Annotated[int, "prompt length to prefill in fp32"] = 1024
    presets: Annotated[tuple[str, ...], "small models that generate, in fp32"] = ("tiny", "mini")
    small_batches: Annotated[tuple[int, ...], "their prompts"] = (1, 8, 64)
    compiled_batches: Annotated[tuple[int, ...], "prompts of small models with compiled steps"] = (1, 8)
    new_tokens: Annotated[int, "tokens that a small model generates for each prompt"] = 32
    sequence: Annotated[int, "tokens of the training step"] = 2048
    loads: Annotated[int, "times that each contestant loads the checkpoint"] = 3
    budget_s: Annotated[float, "seconds after which a slow contestant of one row is not run again"] = 30.0
    limit_s: Annotated[float, "seconds that one run of transformers, or a row of another program, may take"] = 180.0
    ceiling_size: Annotated[int, "rows of the matrices by which the machine's ceilings are measured"] = 2048
    deepseek_inference: Annotated[str, "folder `inference` of DeepSeek-V3's repository: a contestant too"] = ""
    llama_bench: Annotated[str, "llama.cpp's program `llama-bench`: a contestant too, with --gguf"] = ""
    gguf: Annotated[str, "its file, which `python -m benchmarks gguf` writes with the same preset and layers"] = ""
    gguf_q8: Annotated[str, "the same in Q8_0, beside weights kept in FP8"] = ""
    llama_contexts: Annotated[tuple[int, ...], "contexts that it has to compute first, at the speed of its prefill"] = (
        512,
    )
    profile: Annotated[bool, "also show which operators take our model's time"] = False
    out: Annotated[str, "report file (default: in benchmarks/results)"] = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"expected dtype {' or '.join(DTYPES)}, got {self.dtype!r}")
        sizes = (self.threads, self.layers, self.batch_layers, self.sequence, self.loads, self.fp32_prompt)
        sizes += (self.new_tokens, self.ceiling_size, *self.contexts, *self.prompts, *self.batches, *self.small_batches)
        sizes += self.compiled_batches
        if min(sizes) < 1 or not self.contexts:
            raise ValueError(f"expected positive sizes, got {self}")
        if not self.only or not set(self.only) <= set(PARTS):
            raise ValueError(f"expected parts among {', '.join(PARTS)}, got {', '.join(self.only) or 'none'}")
        if bool(self.llama_bench) != bool(self.gguf or self.gguf_q8):
            raise ValueError("expected --llama-bench with --gguf or --gguf-q8, got one without the other")

    def config(self, layers: int | None = None, dtype: str | None = None) -> da.DeepseekConfig:
        """Returns the config of the measured model, or of one with other layers or another dtype."""
        full = comparable(da.DeepseekConfig.from_pretrained(self.preset))
        name = str(DTYPES[dtype or self.dtype]).removeprefix("torch.")
        return full.replace(num_hidden_layers=layers or self.layers, dtype=name)

    def runs(self, part: str) -> bool:
        """Returns True for a part to measure; "fp32" is nothing of its own where it is the dtype of all."""
        return part in self.only and not (part == "fp32" and self.dtype == "fp32")

    def is_reference(self) -> bool:
        """Returns True for the model and threads for which `GOALS` were set."""
        return (self.preset, self.layers, self.dtype, self.threads) == ("deepseek-v2-lite", 4, "bf16", 2)


# Times better than the row's baseline (the last one: the value itself), for the reference settings on a CPU with
# products of bfloat16.
GOALS = {
    "decode at 512": 2.5,
    "decode at 8192": 20,
    "decode at 32768": 50,
    "FP8 kept, decode at 512": 1.5,
    "8 rows, 2 layers, decode at 512": 5,
    "32 rows, 2 layers, decode at 512": 12,
    "prefill 2048": 1.8,
    "fp32, prefill 1024": 1.3,
    "tiny generates, 1 prompts": 1.2,
    "tiny generates, 8 prompts": 1.5,
    "tiny generates, 64 prompts": 2,
    "mini generates, 1 prompts": 1.2,
    "mini generates, 8 prompts": 1.5,
    "mini generates, 64 prompts": 2,
    "training step 2048": 1.3,
    "training step 2048, memory at peak": 1.25,
    "loading": 1,
    "loading, peak memory": 1.15,
}
