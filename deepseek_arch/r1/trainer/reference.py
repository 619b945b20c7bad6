"""The reference model: refreshed with its buffers."""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.callbacks import SyncRefModelCallback

__all__ = ["ReferenceRefresh", "blend_buffers"]


class ReferenceRefresh(SyncRefModelCallback):
    """TRL's refresh of the reference model, buffers included.

    Routers' correction biases are buffers: without them a refreshed reference routes otherwise than the policy, and
    the divergence of equal weights is not 0 (TRAPS T3).
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step % args.ref_model_sync_steps == 0:
            model = self.accelerator.unwrap_model(kwargs["model"]) if self.accelerator else kwargs["model"]
            blend_buffers(model, self.ref_model, args.ref_model_mixup_alpha)


@torch.no_grad()
def blend_buffers(source: Any, target: Any, alpha: float) -> None:
    """Moves the buffers of `target` the share `alpha` of the way to those of `source`; integers are copied."""
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        given = buffers[name].to(buffer.device)
        if buffer.is_floating_point() and alpha != 1.0:
            buffer.lerp_(given.to(buffer.dtype), alpha)
        else:
            buffer.copy_(given)
