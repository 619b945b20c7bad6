"""Mutated checkpoint folders: each loads as what its files say, or is refused by an error that says what is wrong.

Seeded. Some hundred cases run with every test run, ten thousand with `-m fuzz`.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import random
import re
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.checkpoint import inspect_checkpoint, load
from support import checkpoint_files as files
from support import layouts
from support.checkpoint_mutations import MUTATIONS
from support.peak_memory import PeakMemory

LONGEST = 2.0  # seconds of one thread
LARGEST = 200 * 2**20  # bytes at the peak of one case
BASES = ("fp8", "bf16", "fp8 stacked", "without index")
_STACK = re.compile(r"(.*\.experts)\.(gate_up|down)_proj(_scale_inv)?")


def reference(folder: Path, shards: list[str]) -> dict[str, Tensor]:
    """Every published tensor as float32, read and dequantized by other code: safetensors, plain products."""
    index = json.loads((folder / files.INDEX).read_text())["weight_map"] if (folder / files.INDEX).exists() else {}
    stored: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in load_file(str(folder / shard)).items():
            if index.get(name, shard) == shard or name not in stored:
                stored[name] = tensor
    single: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        match = _STACK.fullmatch(name)
        if match is None:
            single[name] = tensor
            continue
        kinds = ("gate", "up") if match[2] == "gate_up" else ("down",)
        for expert in range(len(tensor)):
            for kind, part in zip(kinds, tensor[expert].chunk(len(kinds)), strict=True):
                single[f"{match[1]}.{expert}.{kind}_proj.weight{match[3] or ''}"] = part
    config = json.loads((folder / "config.json").read_text())
    rows, columns = (config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    out = {}
    for name, tensor in single.items():
        scale = single.get(f"{name}_scale_inv")
        if tensor.dtype == torch.float8_e4m3fn and scale is not None:
            wide = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            out[name] = tensor.float() * wide[: tensor.shape[0], : tensor.shape[1]]
        else:
            out[name] = tensor.float()
    return out


def use(folder: Path) -> bool:
    """Loads a folder and compares every parameter with the files; returns False if it is refused as it should be."""
    started = time.thread_time()
    try:
        model = load(folder, fp8="dequantize", dtype="float32")
    except (ValueError, OSError) as error:
        assert len(str(error)) < 20_000, "the message is many pages long"
        assert time.thread_time() - started < LONGEST
        return False
    load(folder)(torch.tensor([[1, 2]]))
    assert time.thread_time() - started < LONGEST
    assert inspect_checkpoint(folder).ok
    state = model.state_dict()
    expected = files.expected_state(model.config, reference(folder, model.load_report.shards))
    for name, tensor in state.items():
        assert torch.equal(tensor.nan_to_num(123.0), expected[name].nan_to_num(123.0)), name
    finite = all(tensor.isfinite().all() for tensor in state.values())
    assert finite or any("not finite" in warning for warning in model.load_report.warnings)
    return True


def use_otherwise(folder: Path) -> None:
    """The other readers refuse what they cannot use by the same errors, in the same time."""
    for function in (
        lambda: inspect_checkpoint(folder).to_dict(),
        lambda: load(folder, layers=[0, 1], experts=4, mtp=False),
        lambda: da.slice_checkpoint(folder, folder / "slice", layers=[0], mtp=False),
        lambda: da.convert(folder, folder / "converted", stacked=True),
    ):
        started = time.thread_time()
        with contextlib.suppress(ValueError, OSError):
            function()
        assert time.thread_time() - started < LONGEST


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root, config = tmp_path_factory.mktemp("bases"), layouts.small(num_nextn_predict_layers=1)
    made = {layout: layouts.write(root / layout, config, layout) for layout in BASES[:3]}
    made[BASES[3]] = layouts.write(root / BASES[3], config, "bf16", index=False)
    for folder in made.values():  # imports everything, which no case shall count as its memory
        assert use(folder)
    use_otherwise(Path(shutil.copytree(made["fp8"], root / "copy")))  # it writes into its folder
    return made


def run(bases: dict[str, Path], folder: Path, cases: int, seed: int) -> None:
    rng, loaded = random.Random(seed), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(cases):
            base, mutation = rng.choice(BASES), MUTATIONS[number % len(MUTATIONS)]
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(bases[base], folder)
            mutation(folder, rng)
            memory = PeakMemory()
            try:
                loaded += use(folder)
                if number % 10 == 0:
                    use_otherwise(folder)
                assert memory.beyond() < LARGEST
            except BaseException as error:
                error.add_note(f"seed {seed}, case {number}: {mutation.__name__} of {base}")
                raise
    # Mutations that never fail, or always, would try nothing.
    assert 0.1 * cases < loaded < 0.7 * cases


def test_the_memory_of_a_case_is_its_own():
    """A peak before it neither counts nor hides its own. Mappings: what is allocated may lie in what was given back."""
    use_memory(300 * 2**20)
    memory = PeakMemory()
    use_memory(40 * 2**20)
    assert 36 * 2**20 < memory.beyond() < 100 * 2**20 or not memory.known


def use_memory(size: int) -> None:
    with mmap.mmap(-1, size) as mapping:
        for start in range(0, size, mmap.PAGESIZE):
            mapping[start] = 1


def test_mutated_folders(bases, tmp_path):
    run(bases, tmp_path / "folder", 96, seed=0)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(1, 21))
def test_many_mutated_folders(bases, tmp_path, seed):
    run(bases, tmp_path / "folder", 500, seed)
