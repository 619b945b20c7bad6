"""One checkpoint in all formats and layouts, made tensor by tensor: the expected results of `convert`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_arch.config.deepseek_config import DeepseekConfig
from deepseek_arch.quant.fp8_blocks import dequantize_blocks, quantize_blocks
from support import checkpoint_files as files
from support import small_models

QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 12]}
LAYOUTS = ("fp8", "bf16", "fp8 stacked", "bf16 stacked")
_PLAIN = ("norm.weight", "gate.weight", "embed_tokens.weight", "head.weight", "eh_proj.weight", "bias", "inv_freq")

_made: dict[str, dict[str, dict[str, Tensor]]] = {}


def is_projection(name: str) -> bool:
    """Returns True if the published FP8 checkpoints store this tensor in FP8."""
    return not name.endswith(_PLAIN) and not name.endswith("_scale_inv")


def bfloat16(config: DeepseekConfig, seed: int = 0) -> dict[str, Tensor]:
    """Returns random published tensors in BF16, with routers' biases in float32."""
    return files.tensors(config, torch.bfloat16, seed)


def to_fp8(weights: dict[str, Tensor], block: tuple[int, int], scale_format: str | None = None) -> dict[str, Tensor]:
    """Quantizes the projections to codes and scales."""
    out = {}
    for name, weight in weights.items():
        out[name] = weight
        if is_projection(name):
            out[name], out[f"{name}_scale_inv"] = quantize_blocks(weight, block, scale_format)
    return out


def to_bf16(
    weights: dict[str, Tensor], block: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Dequantizes codes and scales."""
    return {
        name: dequantize_blocks(weight, weights[f"{name}_scale_inv"], block, dtype)
        if weight.dtype == torch.float8_e4m3fn
        else weight
        for name, weight in weights.items()
        if not name.endswith("_scale_inv")
    }


def stack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacks experts and their scales, each gate above its up."""
    pattern = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight(_scale_inv)?")
    out, experts = {}, {}
    for name, weight in weights.items():
        match = pattern.fullmatch(name)
        if match is None:
            out[name] = weight
        else:
            prefix, expert, kind, scale = match.groups()
            experts.setdefault((prefix, scale or ""), {}).setdefault(int(expert), {})[kind] = weight
    for (prefix, scale), parts in experts.items():
        ordered = [parts[expert] for expert in range(len(parts))]
        pairs = [torch.cat([_bytes(part["gate"]), _bytes(part["up"])]) for part in ordered]
        out[f"{prefix}.gate_up_proj{scale}"] = torch.stack(pairs).view(ordered[0]["gate"].dtype)
        downs = torch.stack([_bytes(part["down"]) for part in ordered])
        out[f"{prefix}.down_proj{scale}"] = downs.view(ordered[0]["down"].dtype)
    return out


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: some versions of torch cannot concatenate FP8."""
    return tensor.contiguous().view(torch.uint8)


def all_layouts(config: DeepseekConfig, scale_format: str | None = None) -> dict[str, dict[str, Tensor]]:
    """Returns the same model in every layout of `LAYOUTS`; the FP8 scales are those of random weights."""
    assert config.weight_block_size is not None
    key = json.dumps([config.to_dict(), scale_format], sort_keys=True)
    if key not in _made:
        fp8 = to_fp8(bfloat16(config), config.weight_block_size, scale_format)
        bf16 = to_bf16(fp8, config.weight_block_size)
        _made[key] = {"fp8": fp8, "bf16": bf16, "fp8 stacked": stack(fp8), "bf16 stacked": stack(bf16)}
    return {layout: {name: t.clone() for name, t in weights.items()} for layout, weights in _made[key].items()}


def small(**changes) -> DeepseekConfig:
    """Returns a V3 whose experts have 20 rows in blocks of 16 and 32 columns in blocks of 12, partial at both edges."""
    return small_models.config("v3", **{"dtype": "bfloat16", "quantization_config": QUANTIZATION} | changes)


def write(folder: Path, config: DeepseekConfig, layout: str, weights: dict[str, Tensor] | None = None, **how) -> Path:
    """Writes a checkpoint of `weights`, by default those of `all_layouts`, with the config of this layout."""
    weights = all_layouts(config)[layout] if weights is None else weights
    stored = config if layout.startswith("fp8") else config.replace(quantization_config=None)
    return files.write(folder, weights, stored, **how)


def into(layout: str) -> dict[str, Any]:
    """Returns the arguments of `convert` for this layout."""
    return {"format": layout.split()[0], "stacked": layout.endswith("stacked")}


def edit_config(folder: Path, **changes) -> dict[str, Any]:
    """Changes fields of config.json and returns all of them."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(config))
    return config
