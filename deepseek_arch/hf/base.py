"""Base class of the model classes: initialization, published files, casts of FP8 models.

The containers are thin: embedding, layers, norm and head are the core's modules, and so is every number computed.
What is added is what transformers asks of a model: its caches and masks, recorded outputs, gradient checkpointing per
layer, attention weights under `attn_implementation="eager"`, and a load that fails rather than leaving weights random.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from ..attention.lightning_indexer import LightningIndexer
from ..checkpoint.files.staging import replacing_files
from ..config.deepseek_config import DeepseekConfig
from ..moe.adapter_state import biases_in_adapters
from ..moe.moe import Experts, Router
from ..quant.fp8_base import FP8Layer
from ..quant.fp8_convert import fp8_layers
from ..quant.fp8_experts import FP8Experts
from .adapter_targets import keep_linear_targets
from .attention import AttentionWeights
from .configuration import ArchConfig, ArchDeepseekV3Config, as_arch_config
from .fp8_cuts import StoredInFP8, check_cuts, check_version
from .head_cuts import check_heads
from .key_mapping import saving_conversions
from .layers import DeepseekDecoderLayer
from .other_quantizers import has_other_quantizer, make_linears_plain
from .state_dict_hooks import accept_published_names, report_lost_adapters
from .strict_loading import StrictLoading

__all__ = ["DeepseekPreTrainedModel"]


class DeepseekPreTrainedModel(StrictLoading, PreTrainedModel):
    """Base class of the model classes.

    `from_pretrained` reads published folders (BF16 or FP8, which stays FP8 unless asked otherwise), folders that
    transformers saved, and `save_pretrained` writes the published names, FP8 weights byte for byte. No registration is
    needed for these classes themselves.
    """

    config: ArchConfig
    stored_in_fp8: StoredInFP8 | None = None
    config_class = ArchDeepseekV3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekDecoderLayer", "DeepseekMTPLayer"]  # noqa: RUF012  transformers reads a list
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepseekDecoderLayer,
        "attentions": OutputRecorder(AttentionWeights, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012  stray in Kimi's and old V2 files

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        super().__init__(as_arch_config(config))

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
        """As transformers, which calls this before it reads weights, and checks the cuts of heads and of FP8 weights.

        Raises:
            ValueError: on every rank, if a cut lies inside a head or a block, or transformers cuts codes without their
                scales.
        """
        if model.stored_in_fp8 is not None:
            check_version(distributed_config)
        model = super().maybe_distribute_model(model, distributed_config, mesh)
        check_heads(model, model.config.to_core())
        if model.stored_in_fp8 is not None:
            check_cuts(model, model.stored_in_fp8)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        # Only through transformers' functions, which leave alone what has been loaded.
        if isinstance(module, FP8Layer):
            return  # codes are never drawn
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    @classmethod
    def is_custom_code(cls) -> bool:
        """As `PreTrainedModel.is_custom_code`; PEFT has it asked right before it converts an adapter's targets."""
        keep_linear_targets()
        custom: bool = super().is_custom_code()
        return custom

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`: a folder in the published layout, replaced all at once as by `save`.

        With several processes in a group, or `push_to_hub`, files are written where they belong one by one, as
        transformers does. With a `variant`, the weights of other variants stay.

        Raises:
            ValueError: another process is writing to the folder.
        """
        quantized = fp8_layers(self) or getattr(self, "hf_quantizer", None) is not None
        if getattr(self.config, "quantization_config", None) is not None and not quantized:
            # From the config of a quantized checkpoint, of which this model has only the shape (TRAPS E12).
            del self.config.quantization_config
        self.set_saving_conversions()
        with_biases = self._saves_biases_of_adapters()
        bound = inspect.signature(PreTrainedModel.save_pretrained).bind(self, save_directory, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        if grouped or not given["is_main_process"] or given["push_to_hub"] or Path(save_directory).is_file():
            with biases_in_adapters(self, with_biases):
                super().save_pretrained(save_directory, *args, **kwargs)
            return
        with replacing_files(Path(save_directory), given["variant"]) as staging, biases_in_adapters(self, with_biases):
            super().save_pretrained(staging, *args, **kwargs)

    def _saves_biases_of_adapters(self) -> bool:
        """Returns True for a model that `save_pretrained` saves an adapter of, biases included (`adapter_state`)."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            return False  # a whole model, which may be the base of a PeftModel or have had its adapters merged
        return any(getattr(config, "bias", None) == "all" for config in self.peft_config.values())

    # transformers refuses both for any quantized model; our FP8 layers are left as they are while the rest is cast.
    def half(self, *args: Any) -> Any:
        """Casts to float16 all but FP8 layers."""
        return cast(Any, self).to(torch.float16) if fp8_layers(self) else super().half(*args)

    def float(self, *args: Any) -> Any:
        """Casts to float32 all but FP8 layers."""
        return cast(Any, self).to(torch.float32) if fp8_layers(self) else super().float(*args)

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`.

        Raises:
            ValueError: the model is split by a tensor-parallel plan that splits attention without a rule for the
                rotated key, which all heads share: its gradient would be one rank's part (TRAPS S1). Or it has sparse
                attention, whose indexers were never trained so.
        """
        rules = self._tp_plan or {}
        cuts = any(rule.endswith(".kv_b_proj") and style != "replicate" for rule, style in rules.items())
        if mode and (self.tp_size or 1) > 1 and cuts:
            style = next((style for rule, style in rules.items() if rule.endswith(".kv_a_proj_with_mqa")), None)
            if style != "mla_kv_a_proj" or any(isinstance(module, LightningIndexer) for module in self.modules()):
                raise ValueError(
                    "expected attention that is not sparse, and a plan that gives kv_a_proj_with_mqa the style "
                    f"mla_kv_a_proj, to train with attention split over {self.tp_size} ranks, got {style!r}"
                )
        return super().train(mode)

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Turns FP8 layers into ordinary ones, in `dtype` (default the model's), so that adapters can be merged."""
        return super().dequantize(dtype or self.dtype)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Returns "eager"; raises ValueError for another implementation, which would never be called."""
        if requested_experts not in (None, "eager"):
            raise ValueError(
                f"expected experts_implementation None or 'eager', got {requested_experts!r}: the experts of "
                f"{type(self).__name__} run on this package's own grouped operators"
            )
        return "eager"

    def post_init(self) -> None:
        """Runs once a model's modules are there: transformers' part, and ours to read and write published names."""
        super().post_init()
        routers = [module for module in self.modules() if isinstance(module, Router)]
        if all(router.e_score_correction_bias is None for router in routers):
            self._keep_in_fp32_modules_strict = set()  # type: ignore[assignment]
        if has_other_quantizer(self.config):
            make_linears_plain(self)
        self.set_saving_conversions()
        accept_published_names(self)
        if self.base_model is not self:  # once for a model: adapters' names below it are part of its own
            self.register_load_state_dict_post_hook(report_lost_adapters)

    def set_saving_conversions(self) -> None:
        """Sets the conversions that `save_pretrained` undoes, however the model was made."""
        self._weight_conversions = saving_conversions(self._core_for_saving(), self._has_fp8_experts())

    def _core_for_saving(self) -> DeepseekConfig | None:
        """Returns the config of a model with MTP modules."""
        return None

    def _has_fp8_experts(self) -> bool:
        return any(isinstance(module, FP8Experts) for module in self.modules())
