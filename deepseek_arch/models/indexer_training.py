"""Training of sparse attention in its two stages (V3.2 report, section 2.1), from a model with dense attention.

    model = da.sparse_from_dense(dense, index_topk=2048)
    optimizer = torch.optim.AdamW(da.train_only_indexers(model), lr=1e-3)
    for ids in batches:                                   # the dense warm-up: 1000 steps in the report
        loss, selection = da.indexer_warm_up(model, ids)
        loss.backward(); optimizer.step(); optimizer.zero_grad()

    model.requires_grad_(True)
    for ids in batches:                                   # the sparse stage
        out = da.sparse_training(model, ids, labels=ids)
        (out.loss + out.indexer_loss).backward(); ...

The loss of a layer's indexer reaches that indexer alone, and no other loss reaches it (TRAPS G6): the two losses may be
added without a weight. `attention.indexer_loss` has the loss itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..attention.key_selection import KeySelection
from ..attention.lightning_indexer import LightningIndexer
from ..config.argument_types import check_types
from .allocate import allocate
from .causal_lm import DeepseekLM
from .outputs import CausalLMOutput

__all__ = ["indexer_warm_up", "sparse_from_dense", "sparse_training", "train_only_indexers"]


@check_types
def sparse_from_dense(
    model: DeepseekLM, *, index_topk: int = 2048, index_n_heads: int = 64, index_head_dim: int = 128
) -> DeepseekLM:
    """Returns a DeepSeek-V3.2 of the weights of a DeepSeek-V3, with new indexers.

    Args:
        model: with dense attention and query latents. Its modules move to the result, and its settings (balance loss,
            token dropping, recomputation) are the result's: no weight is copied.
        index_topk, index_n_heads, index_head_dim: as in `DeepseekConfig`.

    Raises:
        ValueError: the model is no DeepSeek-V3 or has sparse attention already, or a size does not fit.
    """
    config = model.config
    if config.model_type != "deepseek_v3" or config.is_sparse_attention:
        raise ValueError(f"expected a deepseek_v3 with dense attention, got {config.model_type} {config.index_topk=}")
    sizes = {"index_topk": index_topk, "index_n_heads": index_n_heads, "index_head_dim": index_head_dim}
    made = DeepseekLM(config.replace(model_type="deepseek_v32", architectures=None, **sizes), device="meta")
    made.model.embed_tokens, made.model.norm, made.lm_head = model.model.embed_tokens, model.model.norm, model.lm_head
    layers = zip((*made.model.layers, *made.mtp), (*model.model.layers, *model.mtp), strict=True)
    for new, old in layers:
        for name, module in old.named_children():
            if name != "self_attn":
                setattr(new, name, module)
        for name, module in old.self_attn.named_children():
            setattr(new.self_attn, name, module)
        indexer = new.self_attn.indexer.to(dtype=model.dtype)
        allocate(indexer, next(old.self_attn.parameters()).device)
        _draw(indexer, config.initializer_range)
    made.balance_loss, made.capacity, made.mtp_detached = model.balance_loss, model.capacity, model.mtp_detached
    made.generation_config = model.generation_config
    made.gradient_checkpointing_enable(model.model.gradient_checkpointing)
    return made.train(model.training)


def _draw(indexer: LightningIndexer, std: float) -> None:
    for layer in (indexer.wq_b, indexer.wk, indexer.weights_proj):
        nn.init.normal_(layer.weight, std=std)
    indexer.k_norm.reset_parameters()


@check_types
def train_only_indexers(model: nn.Module) -> list[nn.Parameter]:
    """Freezes everything but the indexers, and returns their parameters.

    Raises:
        ValueError: the model has none.
    """
    model.requires_grad_(False)
    indexers = [module for module in model.modules() if isinstance(module, LightningIndexer)]
    if not indexers:
        raise ValueError("expected a model with sparse attention, got one without an indexer")
    for indexer in indexers:
        indexer.requires_grad_(True)
    return [parameter for indexer in indexers for parameter in indexer.parameters()]


@check_types
def indexer_warm_up(
    model: DeepseekLM, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> tuple[Tensor, KeySelection]:
    """Runs a pass of the dense warm-up: attention reads all keys, and the indexers learn its distribution over them.

    Args:
        input_ids, attention_mask, position_ids: [B, T], as for `DeepseekLM.forward`.

    Returns:
        the sum of the losses of all indexers, those of MTP modules too; and the pass's `KeySelection`, with the loss
        and the recall of each layer.

    Raises:
        ValueError: the model has dense attention.
    """
    selection = KeySelection(stage="dense")
    labels = input_ids if len(model.mtp) else None  # the modules run with labels only
    out = model(input_ids, attention_mask, position_ids, labels=labels, return_logits=False, selection=selection)
    assert out.indexer_loss is not None
    return out.indexer_loss, selection


@check_types
def sparse_training(
    model: DeepseekLM,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> CausalLMOutput:
    """Runs a pass of the sparse stage: attention reads the selected keys, whose weights the indexers learn.

    Args:
        input_ids, labels, attention_mask, position_ids: [B, T], as for `DeepseekLM.forward`.

    Returns:
        the model's output: `loss` trains everything but the indexers, `indexer_loss` trains them alone.

    Raises:
        ValueError: as `indexer_warm_up`.
    """
    selection = KeySelection(stage="sparse")
    return model(
        input_ids,
        attention_mask,
        position_ids,
        labels=labels,
        return_logits=False,
        selection=selection,
    )
