"""Sequence and token classifiers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from ..config.deepseek_config import DeepseekConfig
from .base import DeepseekPreTrainedModel
from .key_mapping import register_conversions
from .lookup_tables import add_class_name
from .main_model import DeepseekModel

__all__ = ["DeepseekForSequenceClassification", "DeepseekForTokenClassification"]


class DeepseekForSequenceClassification(GenericForSequenceClassification, DeepseekPreTrainedModel):
    """The main model with a classifier on the last token of each row."""

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        # Not the generic class's constructor: it asks AutoModel, which knows these classes only while registered.
        DeepseekPreTrainedModel.__init__(self, config)
        self.num_labels = self.config.num_labels
        self.model = DeepseekModel(self.config)
        self.score = nn.Linear(self.config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class DeepseekForTokenClassification(GenericForTokenClassification, DeepseekPreTrainedModel):
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
