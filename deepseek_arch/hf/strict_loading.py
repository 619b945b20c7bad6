"""`from_pretrained` that reads our configs and raises for whatever the checkpoint leaves undefined."""

from __future__ import annotations

import copy
import re
import warnings
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import FineGrainedFP8Config, PreTrainedModel

from ..moe.moe import Router
from ..quant.fp8_convert import fp8_layers
from .configuration import as_arch_config, load_config
from .key_mapping import mtp_key_mapping
from .quantizer import FP8_METHOD, DeepseekFP8Config

__all__ = ["StrictLoading"]

_OWN_HEAD = ("score.",)  # what a classifier adds to a language model's checkpoint
_MISMATCHED = "of another shape"
_OWN_PREFIX = re.compile(r"^mtp\.(\d+)\.")
_PREDICTION_LAYER = re.compile(r"(?:^|\.)(layers\.\d+\.)eh_proj\.weight$")


class StrictLoading:
    """Mixed into our models before `PreTrainedModel`."""

    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012  stray in Kimi's and old V2 files
    reads_prediction_layers = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`, except that a checkpoint must define every weight.

        What is FP8 in the files stays FP8, byte for byte, on every device; `dtype` is that of everything else. A
        classifier's own head may be missing. A folder without the prediction layers that its config speaks of loads
        without them, with a warning.

        Args:
            config: a config of ours, transformers' own for the same family, a `DeepseekConfig`, or where to read one.
            quantization_config: (in `kwargs`) for an FP8 checkpoint, `FineGrainedFP8Config(dequantize=True)` or
                `DeepseekFP8Config(dequantize=True)` for ordinary weights in `dtype`, exact but for that rounding.

        Raises:
            ValueError: tensors are missing, have other shapes than the config says (unless
                `ignore_mismatched_sizes`), or cannot be converted; the message names them.
            UnsupportedModelError: a model that cannot be built (sparse attention, another architecture).
        """
        if config is None or isinstance(config, str | PathLike):
            config, kwargs = load_config(config or pretrained_model_name_or_path, **kwargs)
        config = as_arch_config(config)
        config = _with_quantization_argument(config, kwargs)
        if cls.reads_prediction_layers:
            key_mapping = {**mtp_key_mapping(config.to_core()), **(key_mapping or {})}
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            ignore_mismatched_sizes=True,  # they are reported below, with everything else
            output_loading_info=True,
            key_mapping=key_mapping,
            **kwargs,
        )
        # With an adapter in the folder, `info` is about the adapter: what the model itself lacks was noted before.
        problems = model.__dict__.pop("_load_problems", None)
        if problems is None:
            problems = _problems(**info)
        if ignore_mismatched_sizes:
            problems.pop(_MISMATCHED, None)
        if problems:
            raise ValueError(
                f"expected a checkpoint that defines every weight, got {pretrained_model_name_or_path} with "
                + "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items())
            )
        _keep_router_biases_wide(model)
        model.set_saving_conversions()
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers calls this for adapters too, after it made them and before it casts what it reads to them."""
        _widen_adapters(model)
        return PreTrainedModel._load_pretrained_model(model, *args, **kwargs)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.add_adapter`."""
        super().add_adapter(*args, **kwargs)  # type: ignore[misc]
        _widen_adapters(self)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """transformers calls this between the load and its report."""
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        self._drop_absent_prediction_layers(loading_info.missing_keys)
        layers = {match[1] for key in loading_info.unexpected_keys if (match := _PREDICTION_LAYER.search(key))}
        for key in list(loading_info.unexpected_keys):
            if any(f".{layer}" in f".{key}" for layer in layers):  # not asked for: the trunk alone, or switched off
                loading_info.unexpected_keys.discard(key)
        self._load_problems = _problems(
            loading_info.missing_keys,
            loading_info.unexpected_keys,
            loading_info.mismatched_keys,
            loading_info.conversion_errors,
            first_prediction_layer=self.config.num_hidden_layers,  # type: ignore[attr-defined]
        )
        # Reported with the rest; the load report would raise on them, without a word about which they are.
        loading_info.conversion_errors.clear()

    def _drop_absent_prediction_layers(self, missing: set[str]) -> None:
        """Removes trailing prediction layers of which the checkpoint has nothing."""
        layers: nn.ModuleList = getattr(self, "mtp", None) or nn.ModuleList()
        kept = len(layers)
        while kept and {f"mtp.{kept - 1}.{name}" for name in layers[kept - 1].state_dict()} <= missing:
            kept -= 1
        if kept == len(layers):
            return
        warnings.warn(
            f"the config speaks of {len(layers)} multi-token-prediction layers, the checkpoint has {kept}: loaded "
            f"without the others",
            stacklevel=2,
        )
        for key in [key for key in missing if any(key.startswith(f"mtp.{k}.") for k in range(kept, len(layers)))]:
            missing.discard(key)
        del layers[kept:]
        self.config.num_nextn_predict_layers = kept  # type: ignore[attr-defined]


def _problems(
    missing_keys: Any = (),
    unexpected_keys: Any = (),
    mismatched_keys: Any = (),
    conversion_errors: dict[str, str] | None = None,
    first_prediction_layer: int = 0,
    **other: Any,
) -> dict[str, list[str]]:
    """What leaves a weight undefined, by kind, under published names."""

    def published(key: str) -> str:
        return _OWN_PREFIX.sub(lambda match: f"model.layers.{first_prediction_layer + int(match[1])}.", key)

    errors = conversion_errors or {}
    # transformers writes a traceback, the message, and what it was doing; here the message is enough.
    reasons = {key: text.split("\nError")[0].strip().splitlines()[-1] for key, text in errors.items()}
    found = {
        "missing": [published(key) for key in missing_keys if key not in errors and not key.startswith(_OWN_HEAD)],
        _MISMATCHED: [f"{published(key)} {list(got)} instead of {list(want)}" for key, got, want in mismatched_keys],
        "that cannot be converted": [
            published(key) + ": " + reason.removeprefix(f"{key}: ") for key, reason in reasons.items()
        ],
        "FP8 scales without an FP8 quantization_config": [
            published(key) for key in unexpected_keys if key.endswith("weight_scale_inv")
        ],
    }
    return {what: sorted(names) for what, names in found.items() if names}


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _with_quantization_argument(config: Any, kwargs: dict[str, Any]) -> Any:
    """Whether to dequantize FP8, moved from the argument to the config, where our quantizer looks for it.

    transformers would refuse its own class beside ours, and ignore what an instance of ours says.
    """
    argument, own = kwargs.get("quantization_config"), getattr(config, "quantization_config", None)
    if isinstance(own, DeepseekFP8Config):
        own = {**own.to_dict(), "quant_method": FP8_METHOD}
    fp8 = isinstance(own, dict) and own.get("quant_method") == FP8_METHOD
    if not fp8 or not isinstance(argument, FineGrainedFP8Config | DeepseekFP8Config):
        return config
    del kwargs["quantization_config"]
    config = copy.deepcopy(config)
    config.quantization_config = {**own, "dequantize": argument.dequantize}
    return config


def _widen_adapters(model: Any) -> None:
    """PEFT makes adapters of expert parameters in the parameters' dtype, which for codes is no dtype to compute in."""
    held = {id(t) for layer in fp8_layers(model).values() for name in layer.held for t in layer.pair(name)}
    for parameter in model.parameters():
        if parameter.dtype == torch.float8_e4m3fn and id(parameter) not in held:
            parameter.data = parameter.data.to(model.dtype)


def _keep_router_biases_wide(model: nn.Module) -> None:
    """Selection biases are float32 whatever they were stored in (TRAPS C2)."""
    for module in model.modules():
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            bias = module.e_score_correction_bias
            if bias.shape != (module.num_experts,):
                raise ValueError(f"expected e_score_correction_bias [{module.num_experts}], got {list(bias.shape)}")
            if bias.dtype != torch.float32:
                module.e_score_correction_bias = bias.float()
