"""Model sizes at which the operators are timed: those of a published config, and numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from deepseek_arch.config.deepseek_config import DeepseekConfig

__all__ = ["SCALES", "Scale", "scale"]


@dataclass(frozen=True)
class Scale:
    """A model and the numbers of tokens for its operators.

    Attributes:
        preset: a preset of deepseek_arch.
        tokens: tokens of a training batch on one device.
        prompt: tokens of a prefill, and of the forward product of one layer.
        decode: sequences that decode one token each.
        routed: rows (pairs of token and expert) for the experts of one device in training.
        experts: experts of that device.
    """

    name: str
    preset: str
    tokens: int
    prompt: int
    decode: int
    routed: int
    experts: int

    # `cached_property` writes into the instance's dictionary, which a frozen dataclass allows.
    @cached_property
    def config(self) -> DeepseekConfig:
        return DeepseekConfig.from_pretrained(self.preset)

    @property
    def hidden(self) -> int:
        return self.config.hidden_size

    @property
    def intermediate(self) -> int:
        """Intermediate size of a dense layer."""
        return self.config.intermediate_size

    @property
    def expert(self) -> int:
        """Intermediate size of one expert."""
        size = self.config.moe_intermediate_size
        if size is None:
            raise ValueError(f"expected a preset with experts, got {self.preset}")
        return size

    @property
    def topk(self) -> int:
        return self.config.num_experts_per_tok or 1

    @property
    def attention(self) -> int:
        """Features of all heads' values: the input of o_proj."""
        return self.config.num_attention_heads * self.config.v_head_dim

    @property
    def indexer(self) -> tuple[int, int, int] | None:
        """Heads of the indexer, their width and the keys that it selects; None for models without one.

        Beside V3's widths those of DeepSeek-V3.2, which has all others from it.
        """
        return _INDEXERS.get(self.name)

    @property
    def queries(self) -> int:
        """Features of all heads' queries."""
        return self.config.num_attention_heads * (self.config.qk_nope_head_dim + self.config.qk_rope_head_dim)

    @property
    def latent(self) -> int:
        """Features of the latent and the shared key: 576, which no block of 128 divides."""
        return self.config.kv_lora_rank + self.config.qk_rope_head_dim


_INDEXERS = {"v3": (64, 128, 2048), "cpu": (16, 128, 64), "tiny": (4, 32, 8)}
SCALES = {
    one.name: one
    for one in (
        # Eight experts and 4096 rows each: a device of 32 in V3's training.
        Scale("v3", "deepseek-v3", tokens=8192, prompt=4096, decode=64, routed=32768, experts=8),
        Scale("v2-lite", "deepseek-v2-lite", tokens=8192, prompt=4096, decode=64, routed=49152, experts=64),
        Scale("kimi-k2", "kimi-k2-instruct", tokens=8192, prompt=4096, decode=64, routed=32768, experts=12),
        # For a CPU: widths of a published model, few tokens.
        Scale("cpu", "deepseek-v2-lite", tokens=128, prompt=64, decode=1, routed=192, experts=8),
        # For tests: widths that no block divides.
        Scale("tiny", "tiny", tokens=24, prompt=20, decode=1, routed=48, experts=4),
    )
}


def scale(name: str) -> Scale:
    """Returns the scale of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCALES:
        raise ValueError(f"expected a shape among {', '.join(SCALES)}, got {name!r}")
    return SCALES[name]
