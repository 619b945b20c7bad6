"""Plain decoding steps, one token for every row, with all work fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..cache.static_cache import StaticLatentCache
from ..config.argument_types import check_types
from ..models.causal_lm import DeepseekLM

__all__ = ["CompiledDecodeStep", "fixed_capacity"]

_SLOTS = 256
_WARM_UP = 2  # calls before a graph is captured: kernels are compiled and workspaces allocated in them


def fixed_capacity(tokens: int) -> int:
    """Returns slots for so many tokens, rounded up so that most lengths of prompts share a compiled step."""
    return -(-tokens // _SLOTS) * _SLOTS


@check_types
class CompiledDecodeStep:
    """Decodes one token for every row through a static cache, without Python between the kernels.

    On a GPU the step is captured as a CUDA graph, elsewhere compiled (`torch.compile`, once for a model and a shape).
    Small batches gain most: there the launches take longer than the kernels.

    Args:
        model: in eval mode.
        cache: holds the prompts. Its rows grow by one token with each call.
    """

    def __init__(self, model: DeepseekLM, cache: StaticLatentCache) -> None:
        self.model, self.cache = model, cache
        self._call = self._captured() if cache.device.type == "cuda" else self._compiled()

    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 [B] -> logits [B, vocab_size] of the token after; on a GPU the next call overwrites them."""
        return self._call(tokens[:, None])

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        step = torch.compile(_step, fullgraph=True, dynamic=False)
        # One compilation for each shape, of which there may be more than the compiler expects of one function.
        first = [torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16)]

        def run(tokens: Tensor) -> Tensor:
            with first.pop() if first else nullcontext():
                return step(self.model, self.cache, tokens)

        return run

    @torch.no_grad()
    def _captured(self) -> Callable[[Tensor], Tensor]:
        inputs = torch.zeros(self.cache.batch_size, 1, dtype=torch.int64, device=self.cache.device)
        lengths = self.cache.device_lengths.clone()
        stream = torch.cuda.Stream(inputs.device)
        stream.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                _step(self.model, self.cache, inputs)
        torch.cuda.current_stream(inputs.device).wait_stream(stream)
        # The slots written so far lie beyond the tokens of the cache; the first real step writes there again.
        self.cache.rewind(lengths)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = _step(self.model, self.cache, inputs)

        def replay(tokens: Tensor) -> Tensor:
            inputs.copy_(tokens)
            graph.replay()
            return logits

        return replay


@torch.no_grad()
def _step(model: DeepseekLM, cache: StaticLatentCache, tokens: Tensor) -> Tensor:
    return model(tokens, cache=cache).logits[:, -1]
