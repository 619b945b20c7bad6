"""`from_pretrained` that reads our configs and raises for every weight that the checkpoint leaves undefined."""

from __future__ import annotations

import copy
import re
import warnings
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import FineGrainedFP8Config, PreTrainedConfig, PreTrainedModel

from ..moe.moe import Router
from ..quant.fp8_convert import fp8_layers
from .configuration import WHERE, as_arch_config, load_config
from .finite_logits import warn_of_values
from .fp8_config import FP8_METHOD, DeepseekFP8Config
from .key_mapping import mtp_key_mapping
from .local_folder import check_unchanged, pinned_files, settle_files
from .other_quantizers import check_conversion, has_other_quantizer, restore_linears

__all__ = ["StrictLoading"]

_OWN_HEAD = ("score.",)  # what a classifier adds to a language model's checkpoint
_MISMATCHED = "of another shape"
_OWN_PREFIX = re.compile(r"^mtp\.(\d+)\.")
_MTP_MODULE = re.compile(r"(?:^|\.)(layers\.\d+\.)eh_proj\.weight$")


class MismatchedShapesError(ValueError, RuntimeError):
    """A checkpoint's tensors have other shapes than the config says; transformers raises RuntimeError there."""


class StrictLoading:
    """Loading that fails rather than leaving weights random; mixed in before `PreTrainedModel`."""

    reads_mtp_modules = False

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

        Tensors that are FP8 in the files stay FP8, byte for byte, on every device; `dtype` is that of all others. A
        classifier's own head may be missing. A folder without the MTP modules that its config names loads without
        them, with a warning; so does one of more layers than `num_hidden_layers` here says, of which the first are
        read. Files without FP8 tensors are an ordinary checkpoint, whatever their config says.

        Args:
            config: a config of ours, transformers' own for the same family, a `DeepseekConfig`, or a folder with one.
            quantization_config: (in `kwargs`) for an FP8 checkpoint, `FineGrainedFP8Config(dequantize=True)` or
                `DeepseekFP8Config(dequantize=True)` for ordinary weights in `dtype`, exact but for that rounding.

        Raises:
            ValueError: a GGUF file; or tensors are missing, have other shapes than the config says (unless
                `ignore_mismatched_sizes`), or cannot be converted; the message names them.
            UnsupportedModelError: a model that cannot be built (another architecture).
            CheckpointError: files changed while they were read (another process saves to the folder).

        Warns:
            UserWarning: tensors have NaN or infinity; the message names them.
        """
        if kwargs.get("gguf_file") is not None:
            raise ValueError(
                f"expected a folder of safetensors files, got gguf_file={kwargs['gguf_file']!r}: transformers reads no "
                "GGUF of this architecture (deepseek2); load the checkpoint that it was made from"
            )
        pins = pinned_files(pretrained_model_name_or_path, kwargs)
        try:
            model, info = cls._read_files(
                pretrained_model_name_or_path,
                *model_args,
                config=config,
                key_mapping=key_mapping,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                **kwargs,
            )
        except Exception:
            check_unchanged(pins)  # which explains any error
            raise
        check_unchanged(pins)
        return (model, info) if output_loading_info else model

    @classmethod
    def _read_files(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any,
        key_mapping: dict[str, str] | None,
        ignore_mismatched_sizes: bool,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        if config is None or isinstance(config, str | PathLike):
            config, kwargs = load_config(config or pretrained_model_name_or_path, **kwargs)
        config = as_arch_config(config)
        config = settle_files(config, pretrained_model_name_or_path, kwargs)
        config = _with_first_layers(config, pretrained_model_name_or_path, kwargs)
        config = _with_quantization_argument(config, kwargs)
        if cls.reads_mtp_modules:
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
        # With an adapter in the folder, `info` is about the adapter: problems of the model itself were noted before.
        problems = model.__dict__.pop("_load_problems", None)
        if problems is None:
            problems = _problems(**info)
        if ignore_mismatched_sizes:
            problems.pop(_MISMATCHED, None)
        if problems:
            error = MismatchedShapesError if _MISMATCHED in problems else ValueError
            raise error(
                f"expected a checkpoint that defines every weight, got {pretrained_model_name_or_path} with "
                + "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items())
            )
        model.config.__dict__.pop("transformers_weights", None)  # about the files, not the model
        if has_other_quantizer(model.config):
            restore_linears(model)
            check_conversion(model, model.quantization_method)
        _keep_router_biases_wide(model)
        _forget_quantization(model)
        model.set_saving_conversions()
        warn_of_values(model, pretrained_model_name_or_path)
        return model, info

    @staticmethod
    def _load_pretrained_model(model: Any, *args: Any, **kwargs: Any) -> Any:
        """Widens adapters: transformers calls this for them too, before it casts to their dtype."""
        _widen_adapters(model)
        return PreTrainedModel._load_pretrained_model(model, *args, **kwargs)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.add_adapter`."""
        super().add_adapter(*args, **kwargs)  # type: ignore[misc]
        _widen_adapters(self)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Notes the problems of a load; transformers calls this between the load and its report."""
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        self._drop_absent_mtp_modules(loading_info.missing_keys)
        layers = {match[1] for key in loading_info.unexpected_keys if (match := _MTP_MODULE.search(key))}
        for key in list(loading_info.unexpected_keys):
            if any(f".{layer}" in f".{key}" for layer in layers):  # of no use to the main model alone, or switched off
                loading_info.unexpected_keys.discard(key)
        self._load_problems = _problems(
            loading_info.missing_keys,
            loading_info.unexpected_keys,
            loading_info.mismatched_keys,
            loading_info.conversion_errors,
            first_mtp_layer=self.config.num_hidden_layers,  # type: ignore[attr-defined]
        )
        # Reported with the rest; the load report would raise on them without naming them.
        loading_info.conversion_errors.clear()

    def _drop_absent_mtp_modules(self, missing: set[str]) -> None:
        """Removes trailing MTP modules of which the checkpoint has no tensor."""
        layers: nn.ModuleList = getattr(self, "mtp", None) or nn.ModuleList()
        kept = len(layers)
        while kept and {f"mtp.{kept - 1}.{name}" for name in layers[kept - 1].state_dict()} <= missing:
            kept -= 1
        if kept == len(layers):
            return
        warnings.warn(
            f"the config names {len(layers)} multi-token-prediction modules, the checkpoint has {kept}: loaded "
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
    first_mtp_layer: int = 0,
    **other: Any,
) -> dict[str, list[str]]:
    """Returns the published names of weights left undefined, by kind of problem."""

    def published(key: str) -> str:
        return _OWN_PREFIX.sub(lambda match: f"model.layers.{first_mtp_layer + int(match[1])}.", key)

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


def _with_first_layers(config: Any, folder: Any, kwargs: dict[str, Any]) -> Any:
    """Leaves out MTP modules where `config` asks for fewer decoder layers than the folder's own config has.

    They stand behind the folder's last layer, and are trained on its output.

    Raises:
        ValueError: `config` asks for more layers than the folder has; MTP modules would be taken for them.
    """
    if folder is None:
        return config
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    stored, _ = PreTrainedConfig.get_config_dict(folder, **where)
    layers = stored.get("num_hidden_layers")
    if isinstance(layers, int) and config.num_hidden_layers > layers:
        raise ValueError(
            f"expected at most {layers} layers, which the checkpoint has, got num_hidden_layers "
            f"{config.num_hidden_layers}"
        )
    if not isinstance(layers, int) or config.num_hidden_layers == layers or not config.num_nextn_predict_layers:
        return config
    warnings.warn(
        f"the first {config.num_hidden_layers} of {layers} layers are loaded, without the multi-token-prediction "
        "modules, which continue the last one",
        stacklevel=3,
    )
    config = copy.deepcopy(config)
    config.num_nextn_predict_layers = 0
    return config


def _forget_quantization(model: Any) -> None:
    """Makes a model without FP8 tensors an ordinary one, though its checkpoint's config says that it is quantized."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if isinstance(getattr(quantizer, "quantization_config", None), DeepseekFP8Config) and not fp8_layers(model):
        quantizer.remove_quantization_config(model)


def _with_quantization_argument(config: Any, kwargs: dict[str, Any]) -> Any:
    """Moves `dequantize` of the argument to the config, where our quantizer looks for it.

    transformers would refuse its own class beside ours, and ignore an instance of ours.
    """
    argument = kwargs.get("quantization_config")
    own: Any = getattr(config, "quantization_config", None)
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
    """Casts adapters out of FP8: PEFT makes those of expert parameters in the parameters' dtype."""
    held = {id(t) for layer in fp8_layers(model).values() for name in layer.quantized_params for t in layer.pair(name)}
    for parameter in model.parameters():
        if parameter.dtype == torch.float8_e4m3fn and id(parameter) not in held:
            parameter.data = parameter.data.to(model.dtype)


def _keep_router_biases_wide(model: nn.Module) -> None:
    """Casts selection biases to float32, whatever they were stored in (TRAPS C2)."""
    for module in model.modules():
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            bias = module.e_score_correction_bias
            if bias.shape != (module.num_experts,):
                raise ValueError(f"expected e_score_correction_bias [{module.num_experts}], got {list(bias.shape)}")
            if bias.dtype != torch.float32:
                module.e_score_correction_bias = bias.float()
