"""DeepSeek-family models in transformers: Auto classes, `generate`, Trainer, PEFT and TRL on this package's modules.

    import deepseek_arch.hf as dhf

    model = dhf.DeepseekForCausalLM.from_pretrained("path/to/checkpoint")   # no registration needed

    dhf.register()                                                          # explicit, and undone by unregister()
    model = AutoModelForCausalLM.from_pretrained("path/to/checkpoint")      # the same class

Importing this changes nothing for transformers' own classes; `PreTrainedConfig` itself
reads configs of these model types afterwards that it failed on (`resumed_config`).
"""

from . import resumed_config as resumed_config
from .base import DeepseekPreTrainedModel
from .causal_lm import DeepseekForCausalLM
from .classifiers import DeepseekForSequenceClassification, DeepseekForTokenClassification
from .configuration import (
    ArchDeepseekV2Config,
    ArchDeepseekV3Config,
    ArchDeepseekV32Config,
    ArchGlm4MoeLiteConfig,
    ArchGlmMoeDsaConfig,
    ArchKimiK2Config,
    as_arch_config,
)
from .fp8_config import DeepseekFP8Config
from .load_balancing_callback import LoadBalancingCallback
from .main_model import DeepseekModel
from .quantizer import DeepseekFP8Quantizer
from .registration import register, registered, unregister
from .replaying import replaying

__all__ = [
    "ArchDeepseekV2Config",
    "ArchDeepseekV3Config",
    "ArchDeepseekV32Config",
    "ArchGlm4MoeLiteConfig",
    "ArchGlmMoeDsaConfig",
    "ArchKimiK2Config",
    "DeepseekFP8Config",
    "DeepseekFP8Quantizer",
    "DeepseekForCausalLM",
    "DeepseekForSequenceClassification",
    "DeepseekForTokenClassification",
    "DeepseekModel",
    "DeepseekPreTrainedModel",
    "LoadBalancingCallback",
    "as_arch_config",
    "register",
    "registered",
    "replaying",
    "unregister",
]
