"""`torch.ao.quantization`, which finds layers by their exact class: it says that ours stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support import small_models
from support.small_models import tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("name", ["torch.ao.quantization", "torch.quantization"])
def test_dynamic_quantization_warns_and_leaves_the_model_as_it_is(name):
    api = torch.ao.quantization if name == "torch.ao.quantization" else torch.quantization
    lm = small_models.model(small_models.config("v3"))
    ids = tokens(lm.config, 1, 5)
    with pytest.warns(UserWarning, match=r"torch\.ao\.quantization converts no Linear of deepseek_arch"):
        converted = api.quantize_dynamic(lm, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, lm(ids).logits)
    assert not hasattr(converted.lm_head, "qconfig")


def test_a_layer_that_is_named_is_refused():
    lm = small_models.model(small_models.config("v3"))
    settings = torch.ao.quantization.default_dynamic_qconfig
    with pytest.raises(ValueError, match=r"expected no qconfig, got .*torchao's quantize_"):
        torch.ao.quantization.quantize_dynamic(lm, {"lm_head": settings}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="expected no qconfig"):
        lm.lm_head.qconfig = settings
