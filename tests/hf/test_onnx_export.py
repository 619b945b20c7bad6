"""`torch.onnx.export`: the program computes the model's logits in ONNX Runtime, at other lengths than its sample's."""

from __future__ import annotations

import pytest
import torch
from test_hf_compile import Logits, core
from twins import ours

from support import small_models
from support.small_models import error, tokens

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(("make", "kind"), [(core, "v2-lite"), (core, "v32"), (ours, "v3")])
def test_logits_of_the_program(make, kind, tmp_path):
    """Routers with and without groups, experts that no token chose, and lengths on both sides of `index_topk`."""
    config = small_models.config(kind, num_hidden_layers=2)
    module = Logits(make(config).eval()).eval()
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            (tokens(config, 1, 9),),
            dynamo=True,
            dynamic_shapes={"input_ids": {1: length}},
            verbose=False,
        )
        program.save(tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        for tokens_of_a_row in (9, 4, 23):
            ids = tokens(config, 1, tokens_of_a_row, seed=tokens_of_a_row)
            (got,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
            assert error(torch.from_numpy(got), module(ids)) < 1e-5
