"""Checkpoint folders for tests, written with the safetensors library alone, independently of the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_arch.config.deepseek_config import DeepseekConfig
from deepseek_arch.quant.fp8_blocks import quantize_blocks
from support import published

INDEX = "model.safetensors.index.json"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 12]}


def tensors(config: DeepseekConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Returns random weights under published names, with the repeated embeddings and heads of the MTP modules."""
    out = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
        for name, tensor in published.random_weights(config, seed).items()
    }
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}."
        out[prefix + "embed_tokens.weight"] = out["model.embed_tokens.weight"].clone()
        out[prefix + "shared_head.head.weight"] = out[head].clone()
    return out


def expected_state(config: DeepseekConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict of a `DeepseekLM` after loading `weights`."""
    repeated = ("shared_head.head.weight", "embed_tokens.weight")
    unique = {n: t for n, t in weights.items() if not (n.startswith("model.layers.") and n.endswith(repeated))}
    return published.stack(unique, config)


def write(
    folder: Path,
    weights: dict[str, Tensor],
    config: DeepseekConfig | dict,
    shards: int = 3,
    index: bool = True,
    pattern: str = "model-{:05d}-of-{:06d}.safetensors",
) -> Path:
    """Writes the tensors to `shards` files in turn, so that neighbours are never in the same file.

    The index's total_size is not the number of bytes, but two per element, as in the index of the published V3.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = config if isinstance(config, dict) else config.to_dict()
    (folder / "config.json").write_text(json.dumps(data))
    files = [pattern.format(i + 1, shards) for i in range(shards)]
    dealt: dict[str, dict[str, Tensor]] = {file: {} for file in files}
    for i, (name, tensor) in enumerate(weights.items()):
        dealt[files[i % shards]][name] = tensor.contiguous()
    for file, content in dealt.items():
        save_file(content, str(folder / file), metadata={"format": "pt"})
    if index:
        weight_map = {name: file for file, content in dealt.items() for name in content}
        elements = sum(tensor.numel() for tensor in weights.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 2 * elements}, "weight_map": weight_map}))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """Reads all tensors of a folder, by the index if there is one, and checks that it names their files."""
    if not (folder / INDEX).exists():
        return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(str(file)).items()}
    out = {}
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for file in sorted(set(weight_map.values())):
        with safe_open(str(folder / file), "pt") as shard:
            names = {name for name, of in weight_map.items() if of == file}
            assert names == set(shard.keys())
            out |= {name: shard.get_tensor(name) for name in names}
    return out


def edit(folder: Path, change) -> None:
    """Rewrites the folder's tensors after `change(tensors)`, in the same number of shards."""
    weights = read(folder)
    config = json.loads((folder / "config.json").read_text())
    shards = len(list(folder.glob("*.safetensors")))
    index = (folder / INDEX).exists()
    change(weights)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    write(folder, weights, config, shards, index)


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Asserts the same names, dtypes, shapes and bytes."""
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, (name, got[name].dtype, tensor.dtype)
        assert got[name].shape == tensor.shape, (name, got[name].shape, tensor.shape)
        same = torch.equal(got[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        assert same, f"{name} differs"


def named(config: DeepseekConfig) -> DeepseekConfig:
    """Returns the config as it is read back: with the architecture that `to_dict` fills in."""
    return DeepseekConfig.from_dict(config.to_dict())


def in_fp8(weights: dict, config, scale=lambda scale: scale) -> dict:
    """Returns the published FP8 layout of float32 weights: projections become codes beside their scales."""
    block = config.weight_block_size
    out = {}
    for name, weight in weights.items():
        plain = ("norm.weight", "gate.weight", "embed_tokens.weight", "head.weight", "eh_proj.weight", "bias")
        if name.endswith(plain):
            out[name] = weight if name.endswith("bias") else weight.bfloat16()
        else:
            codes, factors = quantize_blocks(weight, block)
            out[name], out[f"{name}_scale_inv"] = codes, scale(factors)
    return out
