"""One decoder layer: attention and feed-forward, each behind a norm and a residual."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..attention.mla import MultiHeadLatentAttention
from ..config.deepseek_config import DeepseekConfig
from ..layers.linear import declares
from ..layers.mlp import MLP
from ..layers.norm import RMSNorm, add_and_normalize, normalize
from ..moe.moe import MoE
from ..moe.routing import Routing

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
        normed = normalize(self.input_layernorm, x, _norm_consumers(self.self_attn))
        attended = self.self_attn(normed, rope, mask, cache)
        normed, x = add_and_normalize(self.post_attention_layernorm, attended, x, _norm_consumers(self.mlp))
        if routing is None or not isinstance(self.mlp, MoE):
            return x + self.mlp(normed)
        return x + self.mlp(normed, routing)


def _norm_consumers(block: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the linear layers that alone read a block's input; none where others do too, or may."""
    return block.norm_consumers() if declares(block, "norm_consumers") else ()  # type: ignore[operator]
