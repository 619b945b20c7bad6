"""The two models that are compared: ours, and the native one of transformers on the same tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import deepseek_arch as da

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "DTYPES",
    "PARITY",
    "allowed_difference",
    "check_same_logits",
    "comparable",
    "logit_differences",
    "native_config",
    "native_twin",
    "random_ids",
    "random_model",
]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARITY = 1e-4  # relative difference of float32 logits that the package allows; measured ones are near 1e-6
STEPS = 8  # tokens decoded one by one in the check
# A prime number of values, so that no two rows of a weight are the same.
_NOISE = 4_194_301


def random_model(config: da.DeepseekConfig, dtype: torch.dtype, seed: int = 0) -> da.DeepseekLM:
    """Returns our model with normal weights and norms of one.

    One block of noise is repeated: drawing billions of values takes minutes.
    """
    with torch.device("meta"):
        model = da.DeepseekLM(config, dtype=dtype)
    model.to_empty(device="cpu")
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(seed)).mul_(config.initializer_range).to(dtype)
    for name, tensor in model.state_dict().items():
        flat = tensor.flatten()
        if name.endswith("norm.weight"):
            flat.fill_(1)
        elif name.endswith(("e_score_correction_bias", "norm.bias")):
            flat.fill_(0)
        else:
            for start in range(0, flat.numel(), _NOISE):
                part = flat[start : start + _NOISE]
                part.copy_(noise[: part.numel()])
    model.tie_weights()
    return model.eval()


def comparable(config: da.DeepseekConfig) -> da.DeepseekConfig:
    """Returns the config without what transformers' model does not compute: MTP layers and quantized weights."""
    data = config.replace(num_nextn_predict_layers=0).to_dict()
    data.pop("quantization_config", None)
    return da.DeepseekConfig.from_dict(data)


def native_config(config: da.DeepseekConfig) -> Any:
    """Returns the config object of transformers for `config`.

    Raises:
        ValueError: transformers does not know the model type.
    """
    from transformers import AutoConfig

    data = config.to_dict()
    for name in ("auto_map", "quantization_config"):
        data.pop(name, None)
    return AutoConfig.for_model(data.pop("model_type"), **data)


def native_twin(model: da.DeepseekLM) -> PreTrainedModel:
    """Returns the native model of transformers with the same config on the tensors of `model`, nothing copied.

    Raises:
        ValueError: their tensors have other names or shapes.
    """
    import transformers

    config = native_config(model.config)
    native_class = getattr(transformers, type(config).__name__.removesuffix("Config") + "ForCausalLM")
    with torch.device("meta"):
        twin = native_class(config)
    try:
        twin.load_state_dict(model.state_dict(), assign=True)
    except RuntimeError as error:
        raise ValueError(f"expected {native_class.__name__} to have our tensors: {error}") from error
    # Buffers that are not in the state dict are still on the meta device.
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config)
    ours = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        assert parameter.data_ptr() == ours[name].data_ptr(), f"{name} was copied"
    return twin.eval()


@torch.inference_mode()
def check_same_logits(model: da.DeepseekLM, twin: PreTrainedModel, tokens: int = 48) -> float:
    """Runs one prompt through both, then a few tokens one by one through their caches, and compares.

    The median over positions counts, because a router that rounds to the other side of a near tie moves single
    positions by more.

    Returns:
        the relative difference of the logits.

    Raises:
        ValueError: the difference is larger than rounding explains: timing would compare different computations.
    """
    ids = random_ids(model.config.vocab_size, tokens, seed=1)
    prompt = tokens - STEPS
    cache = model.new_cache(1)
    ours = [model(ids[:, :prompt], cache=cache).logits]
    theirs = [twin(ids[:, :prompt], use_cache=True)]
    for position in range(prompt, tokens):
        token = ids[:, position : position + 1]
        ours.append(model(token, cache=cache).logits)
        theirs.append(twin(token, past_key_values=theirs[0].past_key_values))
    differences = logit_differences(torch.cat(ours, dim=1), torch.cat([one.logits for one in theirs], dim=1))
    difference = max(float(differences[:prompt].median()), float(differences[prompt:].median()))
    allowed = allowed_difference(model)
    if not difference <= allowed:
        raise ValueError(
            f"expected the logits of both models to agree to {allowed:.2g} ({model.dtype}), got {difference:.2g}: "
            "refusing to time different computations"
        )
    return difference


def allowed_difference(model: da.DeepseekLM) -> float:
    """Returns the relative difference of logits that rounding explains.

    In 16 bits, every layer rounds about fourteen times (products, norms, residuals), each time by half an epsilon at
    most; independent roundings add up as the square root of their number. In float32, whose products accumulate in the
    same precision, the bound is the package's policy.
    """
    roundings = 14 * model.config.num_hidden_layers + 2
    return PARITY if model.dtype == torch.float32 else torch.finfo(model.dtype).eps / 2 * roundings**0.5


def logit_differences(a: Tensor, b: Tensor) -> Tensor:
    """Returns the difference at each position, relative to its vector of logits."""
    a, b = a.double(), b.double()
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).flatten()


def random_ids(vocab_size: int, tokens: int, seed: int, rows: int = 1) -> Tensor:
    """Returns random token ids [rows, tokens]."""
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))
