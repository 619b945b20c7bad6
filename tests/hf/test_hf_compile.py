"""torch.compile and torch.export: whole graphs, lengths that change, training."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache
from twins import ours

from support import small_models
from support.small_models import error, tokens

CONFIG = small_models.config("v3", num_nextn_predict_layers=1, num_hidden_layers=2)
TOLERANCE = 1e-5  # traced code may sum in another order


def core(config=CONFIG):
    return small_models.model(config)


class Logits(torch.nn.Module):
    """Model as it is exported: tensors in, one tensor out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.fixture(autouse=True)
def no_earlier_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [core, ours])
@pytest.mark.parametrize("padded", [False, True])
def test_one_graph_for_every_length(make, padded):
    """From the second length on lengths are symbols, of which no comparison is a plain bool."""
    model = make(CONFIG).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (12, 17, 23):
        ids = tokens(CONFIG, 2, length)
        mask = torch.ones_like(ids)
        mask[0, : 3 * padded] = 0
        given = {"attention_mask": mask} if padded else {}
        with torch.no_grad():
            got, expected = compiled(ids, **given).logits, model(ids, **given).logits
        assert error(got[mask.bool()], expected[mask.bool()]) < TOLERANCE


@pytest.mark.parametrize("recompute", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_training_compiles_with_every_loss(recompute):
    """Next tokens, MTP modules and balance, at two lengths; with gradient checkpointing at one."""
    models = [ours(CONFIG).train() for _ in range(2)]
    if recompute is not None:
        models[0].gradient_checkpointing_enable(recompute)
    for model in models:
        model.config.mtp_loss_weight, model.config.output_router_logits, model.config.router_aux_loss_coef = (
            0.3,
            True,
            0.1,
        )
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    for length in (9, 12) if recompute is None else (9,):
        ids = tokens(CONFIG, 2, length)
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        models[1](input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for (name, got), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert error(got.grad, expected.grad) < TOLERANCE, name


@pytest.mark.parametrize(
    ("make", "masked", "strict"),
    [(core, False, False), (core, True, False), (core, True, True), (ours, False, False), (ours, True, False)],
)
def test_export_with_dynamic_batch_and_length(make, masked, strict):
    """From one token on, also fewer than the sample has: no size of the program is compared with a number."""
    module = Logits(make(CONFIG).eval()).eval()
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=1, max=4096)}

    def arguments(batch, length):
        ids = tokens(CONFIG, batch, length)
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        return (ids, mask) if masked else (ids,)

    shapes = {"input_ids": sizes} | ({"attention_mask": sizes} if masked else {})
    with torch.no_grad():
        program = torch.export.export(module, arguments(2, 8), strict=strict, dynamic_shapes=shapes).module()
        for batch, length in ((3, 11), (2, 64), (1, 1), (2, 2), (1, 3), (5, 7)):
            given = arguments(batch, length)
            real = given[-1].bool() if masked else torch.ones_like(given[0], dtype=torch.bool)
            assert error(program(*given)[real], module(*given)[real]) < TOLERANCE, (batch, length)


class Decoding(torch.nn.Module):
    """A step on a static cache that has a prompt; its tensors are buffers, as transformers' exporter makes them."""

    def __init__(self, model: torch.nn.Module, prompt: torch.Tensor) -> None:
        super().__init__()
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(prompt, past_key_values=self.cache, use_cache=True)
        for i, layer in enumerate(self.cache.layers):
            for name in ("keys", "values", "cumulative_length"):
                if isinstance(getattr(layer, name, None), torch.Tensor):
                    self.register_buffer(f"{name}_{i}", getattr(layer, name), persistent=False)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=self.cache, use_cache=True)
        return out.logits


def test_static_cache_decoding_exports():
    model, ids = ours(CONFIG), tokens(CONFIG, 1, 6)
    with torch.no_grad():
        expected = model(ids).logits
        step = (ids[:, 3:4], torch.tensor([[3]]))
        program = torch.export.export(Decoding(model, ids[:, :3]), step, strict=True).module()
        for i in (3, 4, 5):
            assert error(program(ids[:, i : i + 1], torch.tensor([[i]])), expected[:, i : i + 1]) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "make", "masked", "sample", "strict"),
    [
        ("v32", core, False, 9, False),
        ("v32", ours, False, 9, False),
        ("v32", ours, True, 4, False),
        ("glm-5", core, True, 4, False),
        ("v32", core, False, 9, True),
        ("glm-5", core, False, 4, True),
    ],
)
def test_sparse_attention_exports_for_lengths_on_both_sides_of_its_selection(kind, make, masked, sample, strict):
    """One program where every key is read (up to `index_topk`) and where a part is left out."""
    config = small_models.config(kind, **({"num_hidden_layers": 2} if kind == "v32" else {}))
    module = Logits(make(config).eval()).eval()
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=1, max=4096)}

    def arguments(batch, length):
        ids = tokens(config, batch, length, seed=length)
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        return (ids, mask) if masked else (ids,)

    shapes = {"input_ids": sizes} | ({"attention_mask": sizes} if masked else {})
    with torch.no_grad():
        program = torch.export.export(module, arguments(2, sample), strict=strict, dynamic_shapes=shapes).module()
        for batch, length in ((3, 5), (2, config.index_topk), (2, config.index_topk + 1), (1, 1), (1, 2), (2, 64)):
            given = arguments(batch, length)
            real = given[-1].bool() if masked else torch.ones_like(given[0], dtype=torch.bool)
            assert error(program(*given)[real], module(*given)[real]) < TOLERANCE, (batch, length)
