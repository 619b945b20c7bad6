"""DeepSeek's own inference code as a contestant, from a folder that the user provides.

This repository has none of it: `--deepseek-inference` names the folder `inference` of the repository
github.com/deepseek-ai/DeepSeek-V3, whose model.py runs V2-Lite, V2 and V3. It runs in a process of its own, because it
sets globals and takes the module name `kernel`; on our weights under its names, nothing copied; and it is timed only if
its logits equal ours.

Its attention stays "absorb" and its caches are those that it allocates itself, as published.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import deepseek_arch as da

from ..core.report import Samples
from ..core.timing import interleave
from ..core.workers import Worker, work
from .contestants import DTYPES, allowed_difference, logit_differences, random_ids, random_model
from .deepseek_layout import arguments, renamed

__all__ = ["CHECKED", "NAME", "DeepseekInference"]

NAME = "DeepSeek's code"
CHECKED = 48  # tokens whose logits are compared
_LOAD_S = 900.0  # to draw billions of weights and to compare logits, on a slow disk and processor


# ------------------------------------------------------------------ the process that compares


class DeepseekInference:
    """The contestant as the benchmark uses it.

    Raises:
        ValueError: the folder has no model.py, the code does not run this config, or its logits are not ours.
    """

    def __init__(self, folder: str | Path, config: da.DeepseekConfig, dtype: str, threads: int, room: int) -> None:
        folder = Path(folder).resolve()
        if not (folder / "model.py").is_file():
            raise ValueError(f"expected DeepSeek's inference code, a folder with model.py, got {folder}")
        arguments(config, room)
        self._about = {"folder": str(folder), "config": config.to_dict(), "dtype": dtype, "threads": threads}
        self._about["room"] = room
        self._worker = Worker("benchmarks.models.deepseek_inference", Path(os.devnull))
        result = self._worker.perform({"do": "load", **self._about}, _LOAD_S)
        if "error" in result:
            self.close()
            raise ValueError(f"expected DeepSeek's inference code to run, got {result['error']}")
        self.notes = tuple(result["notes"])

    def decode(self, context: int, steps: int, warmup: int, budget_s: float, limit_s: float) -> Samples | str:
        """Times each of `steps` tokens on a cache of `context`, in seconds; or returns why it cannot."""
        return self._time({"do": "decode", "context": context, "rounds": steps, "warmup": warmup}, budget_s, limit_s)

    def prefill(self, tokens: int, rounds: int, budget_s: float, limit_s: float) -> Samples | str:
        """Times each prompt of `tokens`, in seconds; or returns why it cannot."""
        return self._time({"do": "prefill", "tokens": tokens, "rounds": rounds, "warmup": 1}, budget_s, limit_s)

    def _time(self, task: dict[str, Any], budget_s: float, limit_s: float) -> Samples | str:
        result = self._worker.perform({**task, "budget_s": budget_s, **self._about}, limit_s)
        return Samples(tuple(result["seconds"])) if "seconds" in result else f"{NAME}: {result['error']}"

    def close(self) -> None:
        """Ends the process, which frees its memory."""
        self._worker.stop()


# ------------------------------------------------------------------ the process that has its modules

_LOADED: dict[str, Any] = {}


def perform(task: dict[str, Any]) -> dict[str, Any]:
    """Performs one task of `DeepseekInference`; loads the model first if an earlier process ended."""
    torch.set_num_threads(task["threads"])
    if not _LOADED:
        _LOADED.update(_load(task))
    theirs, dtype = _LOADED["model"], DTYPES[task["dtype"]]
    if task["do"] == "load":
        return {"notes": _LOADED["notes"]}
    with _default_dtype(dtype):
        if task["do"] == "decode":
            turns = iter(range(task["context"], task["context"] + task["rounds"] + task["warmup"]))
            _fill(theirs, task["context"])
            token = torch.tensor([[1]])
            action = lambda: theirs(token, next(turns))  # noqa: E731
        else:
            ids = random_ids(theirs.embed.vocab_size, task["tokens"], seed=3)
            action = lambda: theirs(ids, 0)  # noqa: E731
        seconds = interleave({NAME: action}, rounds=task["rounds"], warmup=task["warmup"], budget_s=task["budget_s"])
    return {"seconds": seconds[NAME].values}


def _load(task: dict[str, Any]) -> dict[str, Any]:
    """Returns its model on our weights, after a comparison of the logits of both."""
    config, dtype = da.DeepseekConfig.from_dict(task["config"]), DTYPES[task["dtype"]]
    folder = Path(task["folder"])
    stub = _import_kernel(folder)
    module = _import_file("model", folder / "model.py")
    ours = random_model(config, dtype)
    with _default_dtype(dtype):
        theirs = module.Transformer(module.ModelArgs(**arguments(config, task["room"]))).eval()
    theirs.load_state_dict(renamed(ours.state_dict(), with_bias=config.hidden_size == 7168), assign=True)
    difference = _check(ours, theirs, dtype)
    digest = hashlib.sha256((folder / "model.py").read_bytes()).hexdigest()[:12]
    attention = getattr(module, "attn_impl", "unknown")
    note = (
        f"{NAME}: model.py with SHA-256 {digest}..., attention {attention!r}, in its own process after the others; its "
        f"last logits differ from ours by {difference:.2g} (relative, {task['dtype']})"
    )
    return {"model": theirs, "notes": [note, *stub]}


def _check(ours: da.DeepseekLM, theirs: Any, dtype: torch.dtype) -> float:
    """Returns the median difference of last logits, of prompts and of tokens after them: it computes no others.

    Raises:
        ValueError: the difference is larger than rounding explains.
    """
    ids = random_ids(ours.config.vocab_size, CHECKED, seed=1)
    with torch.inference_mode():
        right = ours(ids).logits[0]
        with _default_dtype(dtype):
            prompts = [(end, theirs(ids[:, :end], 0)[0]) for end in range(5, 41, 5)]  # the last one fills the cache
            steps = [(end, theirs(ids[:, end - 1 : end], end - 1)[0]) for end in range(41, CHECKED + 1)]
    medians = []
    for pairs in (prompts, steps):
        expected = torch.stack([right[end - 1] for end, _ in pairs])
        medians.append(float(logit_differences(torch.stack([logits for _, logits in pairs]), expected).median()))
    if not max(medians) <= allowed_difference(ours):
        raise ValueError(
            f"expected logits within {allowed_difference(ours):.2g} of ours, got {max(medians):.2g}: refusing to time "
            "different computations"
        )
    return max(medians)


def _fill(theirs: Any, context: int) -> None:
    """Fills its caches with random latents, as those of the other contestants."""
    generator = torch.Generator().manual_seed(2)
    for layer in theirs.layers:
        for cache in (layer.attn.kv_cache, layer.attn.pe_cache):
            cache[:, :context] = torch.randn(1, context, cache.shape[-1], generator=generator, dtype=torch.float32)


def _import_kernel(folder: Path) -> Sequence[str]:
    """Imports its module `kernel`, which its model imports; a stand-in if that fails.

    Only FP8 weights need its functions. Returns a note if it is the stand-in.
    """
    try:
        _import_file("kernel", folder / "kernel.py")
    except Exception as error:  # Triton may raise anything on a machine without a GPU
        stub = types.ModuleType("kernel")
        for name in ("act_quant", "weight_dequant", "fp8_gemm"):
            setattr(stub, name, _missing)
        sys.modules["kernel"] = stub
        return [f"{NAME}: its FP8 kernels, not needed here, do not import ({type(error).__name__})"]
    return ()


def _missing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("expected weights in 16 or 32 bits; the FP8 kernels did not import")


def _import_file(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets torch's default dtype, in which its model creates norms, caches and masks."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    work(perform)
