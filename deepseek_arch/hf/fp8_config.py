"""The published FP8 `quantization_config` under a method name of ours.

transformers refuses a second class for the name "fp8", and other models' FP8 stays its own: our configs put our name in
place of it in memory, and the published one in every file.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["FP8_METHOD", "PUBLISHED_METHOD", "DeepseekFP8Config"]

FP8_METHOD = "deepseek_fp8"
PUBLISHED_METHOD = "fp8"


@register_quantization_config(FP8_METHOD)
class DeepseekFP8Config(QuantizationConfigMixin):
    """The published `quantization_config`: the block size, and all other fields of the file, kept for saving.

    Args:
        dequantize: loads ordinary weights in the model's dtype instead of FP8 layers.
    """

    def __init__(
        self,
        weight_block_size: tuple[int, int] | list[int] | None = None,
        dequantize: bool | None = None,
        **published: Any,
    ) -> None:
        published.pop("quant_method", None)
        self.quant_method: Any = FP8_METHOD  # transformers' enum has no place for names from outside
        self.weight_block_size = list(weight_block_size or (128, 128))
        self.dequantize = bool(dequantize)  # also tells transformers that the loaded model is an ordinary one
        self.published = published if dequantize is None else {**published, "dequantize": dequantize}

    @property
    def blocks(self) -> tuple[int, int]:
        """(rows, columns) that share a scale."""
        rows, columns = self.weight_block_size
        return rows, columns

    def to_dict(self) -> dict[str, Any]:
        """Returns the published layout."""
        return {**self.published, "quant_method": PUBLISHED_METHOD, "weight_block_size": self.weight_block_size}
