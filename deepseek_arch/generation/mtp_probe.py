"""Measures which way of feeding a checkpoint's multi-token-prediction modules gets most drafts accepted.

A mistake in the mapping of these modules changes no output, only how many drafts are accepted (TRAPS F13). No published
text settles which hidden state they read, before or after the main model's final norm, and what is passed on from one
draft to the next (TRAPS F2, F3). So it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from torch import Tensor

from ..config.argument_types import check_types
from ..models.causal_lm import DeepseekLM
from .entry import generate

__all__ = ["MTPProbe", "probe_mtp"]


@dataclass(frozen=True)
class MTPProbe:
    """Acceptance of drafts with one way of feeding the MTP modules.

    Attributes:
        mtp_input: "post_norm" or "pre_norm", see `DeepseekConfig`.
        mtp_chain: "block" or "head_norm".
        acceptance: share accepted, by position in the draft; None where no draft was looked at.
        drafted: number of drafts looked at, by position.
        tokens_per_step: tokens that a row gained in a pass of the main model.
        configured: True for the way that the model's config names.
    """

    mtp_input: str
    mtp_chain: str
    acceptance: tuple[float | None, ...]
    drafted: tuple[int, ...]
    tokens_per_step: float
    configured: bool

    def __str__(self) -> str:
        shares = ", ".join("-" if share is None else f"{share:.1%}" for share in self.acceptance)
        mark = "  (as configured)" if self.configured else ""
        return f"input {self.mtp_input:9} chain {self.mtp_chain:9} accepted {shares}{mark}"


@check_types
def probe_mtp(
    model: DeepseekLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    mtp_depth: int = 2,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[MTPProbe]:
    """Continues the prompts once for each way of feeding the MTP modules, and returns the best way first.

    Args:
        input_ids, attention_mask, max_new_tokens, mtp_depth, temperature: see `generate`. Drafts of one token pass
            nothing on, so that both chains are the same.
        seed: of sampling.

    Raises:
        ValueError: as `generate`, and for `mtp_depth` 0, which drafts nothing, or a model without MTP modules.
    """
    if isinstance(mtp_depth, int) and mtp_depth < 1:
        raise ValueError(f"expected mtp_depth >= 1, got {mtp_depth}")
    if not len(model.mtp):
        raise ValueError(
            "expected a model with MTP modules to probe, got one without (num_nextn_predict_layers is 0, the files "
            "hold none, or it was loaded with mtp=False)"
        )
    configured, probes = model.config, []
    try:
        for mtp_input, mtp_chain in product(("post_norm", "pre_norm"), ("block", "head_norm")):
            model.config = configured.replace(mtp_input=mtp_input, mtp_chain=mtp_chain)
            result = generate(
                model,
                input_ids,
                attention_mask,
                max_new_tokens,
                mtp_depth,
                temperature,
                seed=seed,
                eos_token_id=[],
                adaptive=False,
                return_report=True,
            )
            assert isinstance(result, tuple)
            report = result[1]
            probes.append(
                MTPProbe(
                    mtp_input,
                    mtp_chain,
                    tuple(report.acceptance),
                    tuple(report.drafted),
                    report.tokens_per_step,
                    (mtp_input, mtp_chain) == (configured.mtp_input, configured.mtp_chain),
                )
            )
    finally:
        model.config = configured
    return sorted(probes, key=lambda probe: (-probe.tokens_per_step, not probe.configured))
