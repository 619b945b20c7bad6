"""`mla_attention`: attention of prefill and training, with V3's heads split over eight devices.

Causal attention is half of the rectangle of queries and keys. The forward pass has two products, P + R and V wide; the
backward pass has five, `q @ k.T` again, `do @ v.T` and those of the three gradients: 3 (P + R) + 2 V, 2.6 times as much
at 192 and 128.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepseek_kernels import dispatch, use_backend
from deepseek_kernels.attention.mla_attention import mla_attention, reference
from deepseek_kernels.common.masks import as_dense

from ..declare import Operator, Provider, Shape, swept
from ..fp8_operands import BF16_ROUNDING
from ..goals import Goal
from ..operands import Random
from ..scales import Scale
from ..verify import require_close

# The weights, the result and, in the backward pass, ds and the gradients are rounded, and so are their factors; errors
# of single elements average out in the norm.
_TOLERANCE = 4 * BF16_ROUNDING
_DOCUMENTS = 8


class Forward(Operator):
    """Operands: q, kv, key, spans or None, and the result's gradient."""

    name, op = "mla_attention.forward", "mla_attention"
    goal = Goal("450 TF", "520 TF")
    trains = False

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        sizes = self._sizes(scale) | {"S": scale.tokens, "documents": 1}
        name = f"{scale.name} {sizes['N']} heads, {sizes['S']} tokens"
        on_goal = scale.name == "v3"
        yield Shape(name, sizes, self.goal if on_goal else None, 1 if on_goal else 5)
        yield Shape(f"{name} in {_DOCUMENTS} documents", sizes | {"documents": _DOCUMENTS}, None, 6)

    def sweeps(self, scale: Scale) -> Iterable[Shape]:
        sizes = self._sizes(scale) | {"documents": 1}
        return swept(f"{scale.name} {sizes['N']} heads", sizes, "S", min(512, scale.tokens // 4), 4 * scale.tokens)

    def _sizes(self, scale: Scale) -> dict[str, int]:
        config = scale.config
        heads = config.num_attention_heads // (8 if config.num_attention_heads == 128 else 1)
        return {"N": heads, "P": config.qk_nope_head_dim, "R": config.qk_rope_head_dim, "V": config.v_head_dim}

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        tokens, heads = shape["S"], shape["N"]
        q = random.normal(1, tokens, heads, shape["P"] + shape["R"])
        kv = random.normal(1, tokens, heads, shape["P"] + shape["V"])
        key = random.normal(1, tokens, shape["R"])
        spans = _documents(tokens, shape["documents"], q.device) if shape["documents"] > 1 else None
        return q, kv, key, spans, random.normal(1, tokens, heads, shape["V"])

    def ours(self, q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None, grad: Tensor) -> Any:
        return mla_attention(q, kv, key, _scale(q), spans)

    def expected(self, q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None, grad: Tensor) -> Any:
        """Computes the reference on float32 operands, without rounding."""
        with use_backend("reference"):
            return self.ours(q.float(), kv.float(), key.float(), spans, grad)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {
            "sdpa, one width": Provider(lambda *inputs: _padded(*inputs[:4])),
            "sdpa": Provider(lambda *inputs: _unpadded(*inputs[:4])),
            "cudnn": Provider(lambda *inputs: _cudnn(*inputs[:4]), devices=("cuda",)),
        }

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_close(got, expected, _TOLERANCE)

    def flops(self, shape: Shape) -> int:
        return self.pairs(shape) * (shape["P"] + shape["R"] + shape["V"]) * 2

    def pairs(self, shape: Shape) -> int:
        """Returns the pairs of a query and a key that it attends to, in all heads."""
        return shape["N"] * shape["S"] ** 2 // shape["documents"] // 2

    def bytes(self, shape: Shape) -> int:
        return 2 * shape["S"] * (shape["N"] * (2 * shape["P"] + shape["R"] + 2 * shape["V"]) + shape["R"])


@dataclass
class Graphs:
    """Operands, and the graph of each provider's forward pass, which is computed when first used.

    Not a tensor, so that every timed call gets the same one: a pass at the size of the goals exceeds any cache.
    """

    q: Tensor
    kv: Tensor
    key: Tensor
    spans: Tensor | None
    graphs: dict[Any, Any] = field(default_factory=dict)

    def of(self, forward: Any) -> Any:
        if forward not in self.graphs:
            self.graphs[forward] = forward(self.q, self.kv, self.key, self.spans)
        return self.graphs[forward]


class Backward(Forward):
    """The gradients alone, from the forward pass's result and log sums. Operands: a `Graphs`, and the gradient."""

    name = "mla_attention.backward"
    goal = Goal("300 TF", "380 TF")

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        *operands, spans, grad = super().inputs(shape, random)
        return Graphs(*(x.requires_grad_() for x in operands), spans), grad

    def ours(self, graphs: Graphs, grad: Tensor) -> Any:
        q, kv, key, spans = graphs.q, graphs.kv, graphs.key, graphs.spans
        if dispatch.pick("mla_attention", q.device) == "reference":
            return _differentiate(graphs, _reference, grad)
        out, log_sum = graphs.of(_kernels)
        from deepseek_kernels.attention.mla_attention import launch

        return launch.attend_backward(grad, q, kv, key, spans, out, log_sum, _scale(q), True, True)

    def expected(self, graphs: Graphs, grad: Tensor) -> Any:
        """Computes the reference on float32 operands, without rounding."""
        q, kv, key = (x.detach().float().requires_grad_() for x in (graphs.q, graphs.kv, graphs.key))
        return torch.autograd.grad(_reference(q, kv, key, graphs.spans), (q, kv, key), grad.float())

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {
            "sdpa, one width": Provider(lambda graphs, grad: _differentiate(graphs, _padded, grad)),
            "sdpa": Provider(lambda graphs, grad: _differentiate(graphs, _unpadded, grad)),
            "cudnn": Provider(lambda graphs, grad: _differentiate(graphs, _cudnn, grad), devices=("cuda",)),
        }

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        for mine, right, what in zip(got, expected, ("q", "kv", "key"), strict=True):
            require_close(mine, right, _TOLERANCE, f"gradient of {what}")

    def flops(self, shape: Shape) -> int:
        return self.pairs(shape) * (3 * (shape["P"] + shape["R"]) + 2 * shape["V"]) * 2

    def bytes(self, shape: Shape) -> int:
        """Counts q, kv, key, the result and its gradient, which are read, and three gradients, which are written."""
        return 2 * super().bytes(shape)


def _scale(q: Tensor) -> float:
    return q.shape[3] ** -0.5


def _documents(tokens: int, count: int, device: torch.device) -> Tensor:
    """Spans [1, T, 2] of documents of equal length."""
    index = torch.arange(tokens, device=device)
    length = -(-tokens // count)
    return torch.stack((index // length * length, index + 1), -1).int()[None]


def _reference(q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None) -> Tensor:
    with use_backend("reference"):
        return mla_attention(q, kv, key, _scale(q), spans)


def _kernels(q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    from deepseek_kernels.attention.mla_attention import launch

    with torch.no_grad():
        return launch.attend(q, kv, key, spans, _scale(q))


def _padded(q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None) -> Tensor:
    return reference.attend(q, kv, key, _scale(q), spans)


def _unpadded(q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None) -> Tensor:
    nope, heads = q.shape[3] - key.shape[2], kv.transpose(1, 2)
    k = torch.cat((heads[..., :nope], key[:, None].expand(-1, heads.shape[1], -1, -1)), -1)
    mask = as_dense(spans, kv.shape[1])
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k, heads[..., nope:], attn_mask=mask, is_causal=mask is None
    ).transpose(1, 2)


def _cudnn(q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None) -> Tensor:
    """Fails, and is absent from the table, if cuDNN does not accept widths of 192 and 128."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _unpadded(q, kv, key, spans)


def _differentiate(graphs: Graphs, forward: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """Computes the gradients alone.

    On a GPU it waits for one number: autograd runs a backward pass on the stream of its forward pass, so that it cannot
    be captured in a graph, and calls that wait are timed one by one.
    """
    gradients = torch.autograd.grad(graphs.of(forward), (graphs.q, graphs.kv, graphs.key), grad, retain_graph=True)
    if grad.is_cuda:
        gradients[-1].flatten()[0].item()
    return gradients


OPERATORS = (Forward(), Backward())
