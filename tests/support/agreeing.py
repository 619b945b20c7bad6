"""A model whose drafts are accepted as often as a test needs."""

from __future__ import annotations

import torch

from support.small_models import config, model


def agreeing(depths: int = 1, noise: float = 0.0, seed: int = 0, **changes):
    """Returns a model whose next token depends on the last one alone, with MTP modules that predict it.

    No layer adds anything to the residual, and eh_proj passes the embedding on, so that an MTP module predicts the
    same for token i + d + 1 as the main model. `noise` on the other half of eh_proj makes some predictions wrong.
    """
    lm = model(config("v3", num_nextn_predict_layers=depths, **changes), seed)
    with torch.no_grad():
        for layer in (*lm.model.layers, *lm.mtp):
            layer.self_attn.o_proj.weight.zero_()
            for name, parameter in layer.mlp.named_parameters():
                if "down_proj" in name:
                    parameter.zero_()
        lm.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(seed))
        lm.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed + 1))
        lm.model.norm.weight.fill_(1.0)
        width = lm.config.hidden_size
        for layer in lm.mtp:
            for norm in (layer.enorm, layer.hnorm, layer.shared_head.norm):
                norm.weight.fill_(1.0)
            layer.eh_proj.weight.copy_(torch.cat((torch.eye(width), noise * torch.randn(width, width)), 1))
    return lm
