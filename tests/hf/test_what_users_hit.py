"""Reports by users of transformers' classes, tried on ours: loading, resuming, RoPE scaling, batching."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PreTrainedConfig, Trainer, TrainingArguments
from twins import native, ours

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.config.json_format import rope_type
from support import small_models
from support.small_models import error, tokens

SAME = 100 * torch.finfo(torch.float32).eps
TOLERANCE = 1e-4  # against transformers' own class, which computes in another order


ROPE = {
    "default": None,
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 4.0},
    "yarn": small_models.YARN,
}


@pytest.mark.parametrize("theta", [10000, 10000.0, 50000.0, 1000000.0], ids=str)
@pytest.mark.parametrize("rope", ROPE)
def test_the_trainer_resumes_every_rotary_embedding(tmp_path, capsys, rope, theta):
    """It reads the checkpoint's config as the base class, which fails on YaRN in the older form with a base."""
    pytest.importorskip("accelerate")
    config = small_models.config("kimi", rope_theta=theta, rope_scaling=ROPE[rope])
    rows = [{"input_ids": row, "labels": row} for row in tokens(config, 8, 9)]

    def train(resume=None):
        model = ours(config)
        settings = {"max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows).train(resume)
        return model.state_dict()

    expected = train()
    resumed = train(str(tmp_path / "checkpoint-1"))
    assert all(error(resumed[name], expected[name]) < SAME for name in expected)
    assert any(error(resumed[name], tensor) > SAME for name, tensor in ours(config).state_dict().items())
    file = tmp_path / "checkpoint-1" / "config.json"
    saved = json.loads(file.read_text())
    # Readers of the older form find the scaling beside the base.
    assert (saved["rope_scaling"] or {}).get("type", "default") == rope and saved["rope_theta"] == theta
    parameters = PreTrainedConfig.from_json_file(file).rope_parameters
    assert (parameters["rope_type"], parameters["rope_theta"]) == (rope, theta)
    again = da.DeepseekConfig.from_pretrained(file.parent)
    assert (again.rope_theta, again.yarn) == (theta, config.yarn)
    assert rope_type(again.rope_scaling or {}) == rope


@pytest.mark.parametrize("preset", ["kimi-k2-instruct", "deepseek-v3", "moonlight-16b-a3b"])
def test_published_configs_are_read_as_the_trainer_reads_them(tmp_path, preset):
    """Those of other classes are read as ever."""
    published = da.DeepseekConfig.from_pretrained(preset).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(published))
    read = PreTrainedConfig.from_json_file(tmp_path / "config.json")
    assert read.vocab_size == published["vocab_size"]
    if published["rope_scaling"] is not None:
        assert read.rope_parameters["rope_theta"] == published["rope_theta"]
        assert read.rope_parameters["rope_type"] == published["rope_scaling"]["type"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 5.0}))
    assert PreTrainedConfig.from_json_file(tmp_path / "config.json").to_dict()["rope_theta"] == 5.0


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
@pytest.mark.parametrize("length", [9, 40])
def test_rope_scaling_of_transformers(tmp_path, kind, length):
    """Within the trained context of 16 tokens, and beyond it."""
    scaling = {"rope_type": kind, "factor": 4.0}
    config = small_models.config("v3", max_position_embeddings=16, rope_scaling=scaling)
    model, ids = ours(config), tokens(config, 2, length)
    twin = native(model)
    with torch.no_grad():
        got, expected = model(ids).logits, twin(ids).logits
    assert error(got, expected) < TOLERANCE
    core = small_models.model(config)
    with torch.no_grad():
        assert error(core(ids).logits, expected) < TOLERANCE
    plain = ours(small_models.config("v3", max_position_embeddings=16))
    with torch.no_grad():
        assert (error(plain(ids).logits, expected) > 1e-3) == (kind == "linear" or length > 16)
    model.save_pretrained(tmp_path)
    for loaded in (dhf.DeepseekForCausalLM.from_pretrained(tmp_path), da.load(tmp_path)):
        with torch.no_grad():
            assert error(loaded(ids).logits, expected) < TOLERANCE


def test_the_first_layers_load_alone(folder_of):
    folder = folder_of("v3", num_nextn_predict_layers=1)
    ids = tokens(da.DeepseekConfig.from_pretrained(folder), 1, 7)
    with torch.no_grad():
        expected = da.load(folder, layers=[0, 1], mtp=False)(ids).logits
    config = dhf.DeepseekForCausalLM.from_pretrained(folder).config
    config.num_hidden_layers = 2
    for how in ({"num_hidden_layers": 2}, {"config": config}):
        with pytest.warns(UserWarning, match="first 2 of 3 layers"):
            model = dhf.DeepseekForCausalLM.from_pretrained(folder, **how)
        assert len(model.model.layers) == 2 and len(model.mtp) == 0 and model.config.num_nextn_predict_layers == 0
        with torch.no_grad():
            assert error(model(ids).logits, expected) < SAME
    assert config.num_nextn_predict_layers == 1  # the caller's own
    with pytest.raises(ValueError, match="at most 3 layers, which the checkpoint has, got num_hidden_layers 4"):
        # The fourth would be the prediction module, which is no layer of the main model.
        dhf.DeepseekForCausalLM.from_pretrained(folder, num_hidden_layers=4, num_nextn_predict_layers=0)


def test_ordinary_files_under_an_fp8_config_are_an_ordinary_model(folder_of, edited, tmp_path, capsys):
    """It can be cast and trained, and is saved without the claim (TRAPS E12), as `da.load` and `da.save` do."""
    pytest.importorskip("accelerate")
    claim = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folder = edited(folder_of("v3"), lambda tensors, config: config.update(quantization_config=claim))
    model = dhf.DeepseekForCausalLM.from_pretrained(folder)
    assert not getattr(model, "is_quantized", False) and model.float() is model
    assert da.load(folder).config.quantization_config is None
    ids = tokens(da.DeepseekConfig.from_pretrained(folder), 4, 9)
    arguments = TrainingArguments(str(tmp_path / "t"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert da.load(tmp_path / "saved").config.quantization_config is None


@pytest.mark.parametrize(
    ("kind", "style", "refused"),
    [("glm", None, False), ("v2", None, False), ("v3", None, False), ("v2", "colwise", True), ("v32", None, True)],
)
def test_training_under_plans_with_a_wrong_backward_is_refused(kind, style, refused):
    """Without its style, the gradient of the rotated key is one rank's part; inference is right (TRAPS S1)."""
    model = ours(small_models.config(kind))
    model._tp_size = 2  # what transformers sets on a model that it has split
    if kind == "v32":
        model._tp_plan["model.layers.*.self_attn.kv_b_proj"] = "colwise"
    for rule in model._tp_plan:
        if style and rule.endswith("kv_a_proj_with_mqa"):
            model._tp_plan[rule] = style
    assert model.eval() is model
    if not refused:
        assert model.train() is model
        return
    with pytest.raises(ValueError, match="attention split over 2 ranks"):
        model.train()
    model._tp_size = 1
    assert model.train().training
