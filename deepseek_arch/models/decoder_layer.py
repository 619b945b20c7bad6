"""One decoder layer: attention and feed-forward, each behind a norm and a residual."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..attention.mla import MultiHeadLatentAttention
from ..config.deepseek_config import DeepseekConfig
from ..layers.mlp import MLP
from ..layers.norm import RMSNorm
from ..layers.plain_module import is_plain_module
from ..moe.moe import MoE
from ..moe.routing import Routing
from ..quant.fp8_activations import add_norm_for, norm_for

__all__ = ["DecoderLayer"]


class DecoderLayer(nn.Module):
    """Decoder layer `layer_idx`: dense or with experts, as the config says for that index.

    Subclasses may set `attention_class` to another implementation of the same attention.
    """

    attention_class: type[MultiHeadLatentAttention] = MultiHeadLatentAttention

    def __init__(self, config: DeepseekConfig, layer_idx: int, *, device=None, dtype=None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layer_idx = layer_idx
        self.self_attn = self.attention_class.from_config(config, layer_idx, **factory)
        self.mlp: MoE | MLP
        if config.is_moe_layer(layer_idx):
            self.mlp = MoE.from_config(config, layer_idx, **factory)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, **factory)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: Any | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """[B, T, H] -> the same; arguments as for `MultiHeadLatentAttention.forward` and `MoE.forward`."""
        attended = self.self_attn(norm_for(self._read_by(self.self_attn), self.input_layernorm, x), rope, mask, cache)
        normed, x = add_norm_for(self._read_by(self.mlp), self.post_attention_layernorm, attended, x)
        if routing is None or not isinstance(self.mlp, MoE):
            return x + self.mlp(normed)
        return x + self.mlp(normed, routing)

    @staticmethod
    def _read_by(block: nn.Module) -> tuple[nn.Module, ...]:
        """The linear layers that alone read a block's input; none where others do too, or may."""
        kind = type(block)
        # A class says so of itself: what a subclass computes is not known.
        return block.input_projections if "input_projections" in vars(kind) and is_plain_module(block, kind) else ()
