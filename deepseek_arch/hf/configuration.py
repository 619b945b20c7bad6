"""Config classes: transformers' own, under our class names, with a way to and from `DeepseekConfig`.

Three things differ from the native classes, all of them in memory only:

- The class name, because transformers finds the model class by it: a class called `DeepseekV3Config` would silently get
  the native model.
- `architectures` names our classes and `auto_map` is empty, because some trainers look the first architecture up in
  transformers before they ask any Auto class.
- `quantization_config.quant_method` is a name of ours, so that our FP8 reader is used and no other model's changes.

`to_dict`, and with it every saved file, has the published names back.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Glm4MoeLiteConfig,
    GlmMoeDsaConfig,
    PreTrainedConfig,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config.deepseek_config import ConfigError, DeepseekConfig, UnsupportedModelError
from ..config.locations import explain_missing_config
from .fp8_config import FP8_METHOD, PUBLISHED_METHOD

__all__ = [
    "CONFIG_CLASSES",
    "WHERE",
    "ArchConfig",
    "ArchDeepseekV2Config",
    "ArchDeepseekV3Config",
    "ArchDeepseekV32Config",
    "ArchGlm4MoeLiteConfig",
    "ArchGlmMoeDsaConfig",
    "ArchKimiK2Config",
    "as_arch_config",
    "core_config",
    "load_config",
]

# Arguments of `from_pretrained` that locate the files, needed for the config and for the weights ...
_CONFIGS = ("config.json", "adapter_config.json")  # the second names the folder of the first
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# ... and those that a config has fields for, although they are about the load.
_FOR_MODEL = ("dtype", "torch_dtype", "quantization_config")


_Config = TypeVar("_Config", bound=type)


class ArchConfig(PreTrainedConfig):
    """Fields and conversions of all our config classes; mixed in before the native class."""

    published_prefix: ClassVar[str]
    """Beginning of the family's published class names."""

    mtp_loss_weight: ClassVar[float] = 0.0
    """Weight of the MTP modules' loss in training; 0 leaves them out. An instance's own is saved with it."""

    indexer_stage: ClassVar[str | None] = None
    """Stage of the training of sparse attention's indexers: "dense" (the warm-up, which trains them alone), "sparse",
    or None. An instance's own is saved with it, as is `indexer_loss_weight`."""

    indexer_loss_weight: ClassVar[float] = 1.0
    """Weight of the indexers' loss in the sparse stage; it reaches them alone, and no other loss does (TRAPS G6)."""

    # Outputs that evaluation must not take for predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "aux_loss",
        "router_logits",
        "routing",
        "mtp_loss",
        "mtp_losses",
        "mtp_accuracy",
        "indexer_loss",
        "indexer_recall",
    ]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        names = self.architectures
        self.architectures = [_own_name(name, self.published_prefix) for name in names] if names else names
        self.auto_map: dict[str, str] = {}
        quantization = getattr(self, "quantization_config", None)
        if quantization is None or quantization == {}:  # transformers takes an empty one for a method it does not know
            self.__dict__.pop("quantization_config", None)
        elif not isinstance(quantization, dict | QuantizationConfigMixin):
            raise ConfigError(f"expected quantization_config to be a mapping from names, got {quantization!r}")
        elif isinstance(quantization, dict) and quantization.get("quant_method") == PUBLISHED_METHOD:
            self.quantization_config = {**quantization, "quant_method": FP8_METHOD}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`.

        Raises:
            ConfigError: a field has the wrong type.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except _FieldError as error:  # a change: what is wrong in the file has been said
            _explain(cls, {**config_dict, **{name: kwargs[name] for name in kwargs.keys() & config_dict.keys()}}, error)

    def to_dict(self) -> dict[str, Any]:
        """Returns the published `config.json` layout: its class names, and the rope fields in their older form too."""
        out = super().to_dict()
        out.pop("auto_map", None)
        if out.get("architectures"):
            out["architectures"] = [_published_name(name, self.published_prefix) for name in out["architectures"]]
        quantization = out.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == FP8_METHOD:
            out["quantization_config"] = {**quantization, "quant_method": PUBLISHED_METHOD}
        rope = dict(out.get("rope_parameters") or {})
        if rope:  # DeepSeek's own code and most serving engines read these two, not `rope_parameters`
            kind = rope.pop("rope_type", rope.pop("type", "default"))
            out["rope_theta"] = rope.pop("rope_theta")
            out["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
        return out

    def to_core(self) -> DeepseekConfig:
        """Returns the same model as a `DeepseekConfig`.

        Raises:
            ConfigError: the fields describe no model of this family.
        """
        return DeepseekConfig.from_dict(self.to_dict())


class _FieldError(ConfigError):
    """A field of the wrong type, in transformers' words."""


def _explain(cls: type[ArchConfig], fields: dict[str, Any], error: Exception) -> NoReturn:
    """Raises what `DeepseekConfig` says of the fields, as everywhere else, or what transformers says."""
    DeepseekConfig.from_dict({"model_type": cls.model_type, **fields})
    raise ConfigError(f"expected fields of a config, got one of a wrong type: {error}") from None


def _own_errors(cls: _Config) -> _Config:
    """Makes a class whose fields transformers checks raise ConfigError, when it is made and when a field is set."""
    make: Any = cls.__init__  # type: ignore[misc]
    assign: Any = cls.__setattr__

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            make(self, *args, **kwargs)
        except (StrictDataclassError, _FieldError) as error:
            _explain(type(self), type(self)().to_dict() | kwargs if kwargs else {}, error)

    @functools.wraps(assign)
    def __setattr__(self: Any, name: str, value: Any) -> None:
        try:
            assign(self, name, value)
        except StrictDataclassError as error:
            raise _FieldError(f"expected fields of a config, got one of a wrong type: {error}") from None

    cls.__init__, cls.__setattr__ = __init__, __setattr__  # type: ignore[method-assign, assignment, misc]
    return cls


def _expert_names(native: type[PreTrainedConfig]) -> dict[str, str]:
    return {**native.attribute_map, "num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}


@_own_errors
@strict
class ArchDeepseekV2Config(ArchConfig, DeepseekV2Config):
    """DeepSeek-V2, V2-Lite, V2.5."""

    model_type = "deepseek_v2"
    published_prefix = "DeepseekV2"
    attribute_map = _expert_names(DeepseekV2Config)

    output_router_logits: bool = False  # transformers 5.17 has no such field, and trainers look for it

    def validate_architecture(self) -> None:
        """Checks nothing: natively heads have to divide the hidden size, but their width is a field of its own."""


# Attention by heads; the native plan for V3 leaves it whole on every rank, those for the other families cut it so.
_ATTENTION_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",  # sums the rotated key's gradient (TRAPS S1)
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}


@_own_errors
@strict
class ArchDeepseekV3Config(ArchConfig, DeepseekV3Config):
    """DeepSeek-V3, V3.1, R1, Moonlight."""

    model_type = "deepseek_v3"
    published_prefix = "DeepseekV3"
    attribute_map = _expert_names(DeepseekV3Config)
    base_model_tp_plan = _ATTENTION_PLAN | DeepseekV3Config.base_model_tp_plan

    output_router_logits: bool = False
    # The native default is one MTP module, also for files that name none.
    num_mtp_layers: int = 0


@_own_errors
@strict
class ArchKimiK2Config(ArchDeepseekV3Config):
    """Kimi-K2: V3's fields and class names under a model type that transformers does not know."""

    model_type = "kimi_k2"


@_own_errors
@strict
class ArchGlm4MoeLiteConfig(ArchConfig, Glm4MoeLiteConfig):
    """GLM-4.7-Flash."""

    model_type = "glm4_moe_lite"
    published_prefix = "Glm4MoeLite"
    attribute_map = _expert_names(Glm4MoeLiteConfig)

    output_router_logits: bool = False


@_own_errors
@strict
class ArchDeepseekV32Config(ArchConfig, DeepseekV32Config):
    """DeepSeek-V3.2, V3.2-Exp, V3.2-Speciale."""

    model_type = "deepseek_v32"
    published_prefix = "DeepseekV32"
    attribute_map = _expert_names(DeepseekV32Config)

    output_router_logits: bool = False


@_own_errors
@strict
class ArchGlmMoeDsaConfig(ArchConfig, GlmMoeDsaConfig):
    """GLM-5."""

    model_type = "glm_moe_dsa"
    published_prefix = "GlmMoeDsa"
    attribute_map = _expert_names(GlmMoeDsaConfig)

    output_router_logits: bool = False


CONFIG_CLASSES: dict[str, type[ArchConfig]] = {
    cls.model_type: cls
    for cls in (
        ArchDeepseekV2Config,
        ArchDeepseekV3Config,
        ArchDeepseekV32Config,
        ArchKimiK2Config,
        ArchGlm4MoeLiteConfig,
        ArchGlmMoeDsaConfig,
    )
}


def config_class(model_type: str | None) -> type[ArchConfig]:
    """Returns our config class for a published model type.

    Raises:
        UnsupportedModelError: there is none.
    """
    if model_type in CONFIG_CLASSES:
        return CONFIG_CLASSES[model_type]
    raise UnsupportedModelError(f"expected model_type to be one of {', '.join(CONFIG_CLASSES)}, got {model_type!r}")


def as_arch_config(config: PreTrainedConfig | DeepseekConfig) -> ArchConfig:
    """Returns `config` itself if it is one of ours, else our class with the same fields.

    Args:
        config: one of ours, transformers' native class for the same family, or a `DeepseekConfig`.

    Raises:
        UnsupportedModelError: a family that cannot be built.
        ValueError: not a config.
    """
    if isinstance(config, ArchConfig):
        return config
    if not isinstance(config, PreTrainedConfig | DeepseekConfig):
        raise ValueError(f"expected a transformers config or a DeepseekConfig, got {type(config).__name__}")
    fields = config.to_dict()
    if isinstance(config, DeepseekConfig):  # has none where the native classes have defaults
        fields = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **fields}
    return config_class(config.model_type).from_dict(fields)


def core_config(config: ArchConfig) -> DeepseekConfig:
    """Returns `config.to_core()` in code that may be compiled: Dynamo calls this as it traces, and keeps the result."""
    return config.to_core()


# What `torch.compiler.assume_constant_result` sets; calling that would import the compiler with this module.
core_config._dynamo_marked_constant = True  # type: ignore[attr-defined]


def load_config(source: Any, **kwargs: Any) -> tuple[ArchConfig, dict[str, Any]]:
    """Reads the config of a checkpoint, and returns it with those of `kwargs` that are for the model's loading.

    Args:
        source: a folder or name, as for `PreTrainedConfig.from_pretrained`.
        kwargs: its keyword arguments (`revision`, `token`, ...), or changes of config fields.

    Raises:
        ConfigError: a folder without one; transformers would go on with an empty config.
    """
    where = {name: kwargs.pop(name) for name in WHERE if name in kwargs}
    for_model = {name: kwargs.pop(name) for name in _FOR_MODEL if name in kwargs}
    folder = Path(source, where.get("subfolder") or "") if isinstance(source, str | os.PathLike) else None
    if folder is not None and folder.is_dir() and not any((folder / name).exists() for name in _CONFIGS):
        raise ConfigError(explain_missing_config(folder))
    data, _ = PreTrainedConfig.get_config_dict(source, **where)
    own = config_class(data.get("model_type"))
    config, unused = own.from_pretrained(source, return_unused_kwargs=True, **where, **kwargs)
    return config, {**where, **for_model, **unused}


def _own_name(name: str, prefix: str) -> str:
    return "Deepseek" + name.removeprefix(prefix) if name.startswith(prefix) else name


def _published_name(name: str, prefix: str) -> str:
    if name.startswith("Deepseek") and not name.startswith("DeepseekV"):
        return prefix + name.removeprefix("Deepseek")
    return name
