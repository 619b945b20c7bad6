"""Sequence and token classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from ..config.deepseek_config import DeepseekConfig
from .base import DeepseekPreTrainedModel
from .input_checks import check_classes
from .key_mapping import register_conversions
from .lookup_tables import add_class_name
from .main_model import DeepseekModel

__all__ = ["DeepseekForSequenceClassification", "DeepseekForTokenClassification"]


class _CheckedLabels(DeepseekPreTrainedModel):
    """Names labels that are no class, for which PyTorch raises IndexError, or on a GPU stops the process."""

    @property
    def loss_function(self) -> Callable[..., Any]:
        """The loss of transformers, with a look at its labels."""
        loss = PreTrainedModel.loss_function.fget(self)  # type: ignore[attr-defined]

        def checked(*args: Any, **kwargs: Any) -> Any:
            check_classes(kwargs.get("labels", args[1] if len(args) > 1 else None), self.config)
            return loss(*args, **kwargs)

        return checked

    @loss_function.setter
    def loss_function(self, value: Callable[..., Any]) -> None:
        PreTrainedModel.loss_function.fset(self, value)  # type: ignore[attr-defined]


class DeepseekForSequenceClassification(GenericForSequenceClassification, _CheckedLabels):
    """The main model with a classifier on the last token of each row."""

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        # Not the generic class's constructor: it asks AutoModel, which knows these classes only while registered.
        DeepseekPreTrainedModel.__init__(self, config)
        self.num_labels = self.config.num_labels
        self.model = DeepseekModel(self.config)
        self.score = nn.Linear(self.config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class DeepseekForTokenClassification(GenericForTokenClassification, _CheckedLabels):
    """The main model with a classifier on every token."""

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        DeepseekPreTrainedModel.__init__(self, config)
        self.num_labels = self.config.num_labels
        self.model = DeepseekModel(self.config)
        dropout = getattr(self.config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(self.config.hidden_size, self.num_labels)
        self.post_init()


for _model in (DeepseekForSequenceClassification, DeepseekForTokenClassification):
    register_conversions(_model.__name__)
    add_class_name(_model.__name__.removeprefix("Deepseek"), _model.__name__)
