"""Checkpoints of V3.2 and GLM-5: worked examples of other implementations, and all ways of reading and writing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deepseek_arch as da
from deepseek_arch.attention.key_selection import KeySelection
from deepseek_arch.checkpoint import convert, inspect_checkpoint, slice_checkpoint
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.layout.published_tensors import published_tensors
from deepseek_kernels.attention.packed_latents import unpack
from support import checkpoint_files as files
from support import oracle, small_models
from support.small_models import SPARSE_KINDS, error

DATA = Path(__file__).parents[1] / "data"
EXAMPLES = ["v32_example", "v32_example_fp8"]


@pytest.fixture(params=EXAMPLES)
def example(request) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = DATA / request.param
    return folder / "checkpoint", load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("fp8", ["keep", "dequantize"])
def test_examples_of_two_implementations(example, fp8):
    folder, expected = example
    lm, selection = da.load(folder, dtype=torch.float32, fp8=fp8), KeySelection(record=True)
    ids = expected["input_ids"]
    assert ids.shape[1] > lm.config.index_topk  # TRAPS G4
    with torch.no_grad():
        whole = lm(ids, selection=selection).logits
        cache = lm.new_cache(2)
        chunked = torch.cat([lm(part, cache=cache).logits for part in ids.split([13, 20, 1, 1, 5], 1)], 1)
    for name in ("official", "transformers"):
        want = expected[f"{name}.logits"]
        for got in (whole, chunked):
            assert error(got, want) < 1e-4
            assert torch.equal(got.argmax(-1), want.argmax(-1))
        for layer in range(2):
            for row in range(2):
                for token, keys in enumerate(expected[f"{name}.topk.{layer}"][row].tolist()):
                    own = selection.ids[layer][row, token].tolist()
                    assert {k for k in own if k >= 0} == {k for k in keys if k <= token}


def test_examples_in_deepseeks_own_precision(example):
    """Codes and scales of indexer and latents are those of DeepSeek's code; all else is float32 on both sides."""
    folder, expected = example
    lm, ids = _simulating(folder), expected["input_ids"]
    want = expected["official_fp8sim.logits"]
    assert error(want, expected["official.logits"]) > 0.1  # FP8 selects other keys
    with torch.no_grad():
        assert error(lm(ids).logits, want) < 1e-4
        plain, packed = lm.new_cache(2), lm.new_cache(2, format="fp8")
        out = torch.cat([lm(part, cache=plain).logits for part in ids.split([13, 20, 1, 1, 5], 1)], 1)
        lm(ids, cache=packed)
    # Sums in another order may round a value to the next code, after which the rows behind it differ in that code.
    rows = (out - want).abs().amax(-1) / want.abs().max()
    assert (rows < 1e-4).float().mean() > 0.9
    # A cache in FP8 holds the same codes: latents are rounded once. (Rotated keys are in bfloat16 there.)
    latents = unpack(packed._buffers[0][:, :40], lm.config.kv_lora_rank, torch.float32)[0]
    assert torch.equal(latents[:, :13], plain._buffers[0][:, :13, : lm.config.kv_lora_rank])
    assert plain.index_format == packed.index_format == "fp8"
    first = [cache._index_keys.buffer(0, 0)[:, :13] for cache in (plain, packed)]
    assert torch.equal(*first)


def _simulating(folder: Path) -> da.DeepseekLM:
    lm = da.load(folder, dtype=torch.float32, fp8="dequantize")
    made = da.DeepseekLM(lm.config.replace(simulate_fp8=True), dtype=torch.float32)
    made.load_state_dict(lm.state_dict())
    return made.eval()


def test_saved_as_published(example, tmp_path):
    """Names, dtypes, shapes and bytes; norms in float32 also from a model in bfloat16."""
    folder, _ = example
    stored = load_file(folder / "model-00001-of-000001.safetensors")
    format = "fp8" if "fp8" in folder.parent.name else "bf16"
    da.save(da.load(folder), tmp_path / "same", format=format)
    again = files.read(tmp_path / "same")
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert again[name].dtype == tensor.dtype, name
        kept = tensor.bfloat16().float() if tensor.dtype == torch.float32 and "norm" in name else tensor
        assert torch.equal(again[name].view(torch.uint8), kept.view(torch.uint8)), name
    report = inspect_checkpoint(tmp_path / "same")
    assert report.ok and not report.warnings


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_conversions_both_ways(kind, tmp_path):
    config = small_models.config(kind, num_nextn_predict_layers=1)
    write_checkpoint(tmp_path / "fp8", config)
    write_checkpoint(tmp_path / "bf16", config, "bf16")
    for format in ("fp8", "bf16"):
        written = config.replace(quantization_config={"quant_method": "fp8"} if format == "fp8" else None)
        listed = {t.name: (t.dtype, t.shape) for t in published_tensors(written)}
        report = inspect_checkpoint(tmp_path / format)
        assert report.ok
        assert {i.name: (i.dtype, i.shape) for i in report.tensors} == listed
    convert(tmp_path / "fp8", tmp_path / "there", "bf16")
    back, want = files.read(tmp_path / "there"), files.read(tmp_path / "bf16")
    assert back.keys() == want.keys()
    for name, tensor in want.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    convert(tmp_path / "bf16", tmp_path / "again", "fp8")
    assert {n: t.dtype for n, t in files.read(tmp_path / "again").items()} == {
        n: t.dtype for n, t in files.read(tmp_path / "fp8").items()
    }
    kept, plain = da.load(tmp_path / "fp8"), da.load(tmp_path / "bf16")
    ids = small_models.tokens(config, 2, 20)
    assert kept.mtp[0].self_attn.indexer.wq_b.weight.dtype == torch.float8_e4m3fn
    with torch.no_grad():
        assert torch.isfinite(kept(ids).logits).all() and torch.isfinite(plain(ids).logits).all()


@pytest.mark.parametrize(("kind", "layers"), [("v32", [0, 2]), ("glm-5", [0, 1]), ("glm-5", [2])])
def test_slices_equal_the_layers_alone(kind, layers, tmp_path):
    config = small_models.config(kind, num_nextn_predict_layers=1)
    weights = files.tensors(config)
    files.write(tmp_path / "whole", weights, config)
    slice_checkpoint(tmp_path / "whole", tmp_path / "part", layers=layers)
    lm, part = da.load(tmp_path / "whole", layers=layers), da.load(tmp_path / "part")
    stored, ids = files.read(tmp_path / "part"), small_models.tokens(config, 1, 20)
    with torch.no_grad():
        got = part(ids).logits
        assert torch.equal(lm(ids).logits, got)
    assert error(got[0], oracle.run(part.config, stored, ids[0].tolist()).logits) < 1e-4


def test_what_load_refuses_is_not_ok(tmp_path):
    config = small_models.config("glm-5")
    weights = files.tensors(config)
    absent = {n: w for n, w in weights.items() if n != "model.layers.2.self_attn.indexer.k_norm.bias"}
    surplus = weights | {"model.layers.1.self_attn.indexer.wk.weight": torch.zeros(16, 32)}  # of a layer that shares
    turned = weights | {"model.layers.0.self_attn.indexer.wk.weight": torch.zeros(32, 16)}
    for name, tensors in {"absent": absent, "surplus": surplus, "turned": turned}.items():
        folder = files.write(tmp_path / name, tensors, config)
        assert not inspect_checkpoint(folder).ok, name
        with pytest.raises(da.CheckpointError, match="indexer"):
            da.load(folder)
    folder = files.write(tmp_path / "whole", weights, config)
    with pytest.raises(ValueError, match="whose selection of keys layer 1 shares"):
        da.load(folder, layers=[1, 2])
    shutil.rmtree(folder)


def test_memory_plan_counts_the_indexer():
    from deepseek_arch.cli.memory_plan import plan_memory

    plan = plan_memory(da.DeepseekConfig.from_pretrained("deepseek-v3.2"), 131072)
    assert plan.indexer_cache_bytes_per_token == 132 * 61
    lm = da.DeepseekLM(small_models.config("v32"))
    cache = lm.new_cache(1, format="fp8")
    assert cache.bytes_per_token == 3 * (24 + 4 + 16 + 16 + 4)
