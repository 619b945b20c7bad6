"""Look-ups of transformers, TRL and PEFT by a class's name or exact type: ours is found, or the request is refused."""

from __future__ import annotations

import copy
import json
import warnings
from types import MethodType, SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, Trainer, TrainingArguments
from twins import WIDE, ours

import deepseek_arch as da
import deepseek_arch.hf as dhf
from support import oracle, small_models
from support.small_models import error, tokens

CONFIG = small_models.config("v3")


class Renamed(dhf.DeepseekForCausalLM):
    """A user's subclass."""


@pytest.mark.parametrize("kind", [dhf.DeepseekForCausalLM, Renamed])
@pytest.mark.parametrize("adapted", [False, True])
def test_label_smoothing_shifts_the_labels(kind, adapted, tmp_path):
    model = kind(CONFIG).eval()
    ids = tokens(CONFIG, 2, 12)
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[:, :-1]
    chosen = -log_probs.gather(-1, ids[:, 1:, None]).mean()
    expected = 0.9 * chosen + 0.1 * -log_probs.mean()
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"])).eval()
    settings = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    trainer = Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    with torch.no_grad():
        loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_subclass_loads_the_published_experts(folder_of):
    loaded = Renamed.from_pretrained(folder_of("v3")).eval()
    ids = tokens(CONFIG, 1, 5)
    with torch.no_grad():
        assert error(loaded(ids).logits, ours(CONFIG)(ids).logits) <= 1e-6


def test_the_architecture_is_an_attribute_of_transformers_while_registered(folder_of):
    folder = folder_of("v3")
    with dhf.registered():
        config = AutoConfig.from_pretrained(folder)
        assert getattr(transformers, config.architectures[0]) is dhf.DeepseekForCausalLM
        assert transformers.DeepseekModel is dhf.DeepseekModel
    assert not hasattr(transformers, "DeepseekForCausalLM")
    assert AutoConfig.from_pretrained(folder).architectures == ["DeepseekV3ForCausalLM"]


def test_serving_takes_the_model_for_a_language_model(folder_of):
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    model = dhf.DeepseekForCausalLM.from_pretrained(folder_of("v3"))
    assert manager.ModelManager.get_model_modality(model) is manager.Modality.LLM


@pytest.mark.parametrize("task", ["text-generation", "text-classification", "token-classification"])
def test_pipelines_support_the_class(task, tokenizer, caplog):
    kind = {
        "text-generation": dhf.DeepseekForCausalLM,
        "text-classification": dhf.DeepseekForSequenceClassification,
        "token-classification": dhf.DeepseekForTokenClassification,
    }[task]
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = kind(CONFIG).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
    assert pipe("w1 w2 w3")
    assert "not supported" not in caplog.text


def test_another_experts_implementation_is_refused(folder_of):
    model = ours(CONFIG)
    assert model.get_experts_implementation() == {"": "eager"}
    model.set_experts_implementation("eager")
    for name in ("grouped_mm", "batched_mm"):
        with pytest.raises(ValueError, match="experts_implementation None or 'eager', got '" + name):
            model.set_experts_implementation(name)
        with pytest.raises(ValueError, match="experts_implementation None or 'eager', got '" + name):
            dhf.DeepseekForCausalLM.from_pretrained(folder_of("v3"), experts_implementation=name)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide") / "model"
    da.save(small_models.model(WIDE), folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_converts_every_linear_layer_but_the_head(wide_folder, bits):
    bnb = pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    with pytest.warns(UserWarning, match=r"bitsandbytes\w* converts linear layers; the stacked experts, 393216"):
        model = dhf.DeepseekForCausalLM.from_pretrained(
            wide_folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
        )
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    linears = {name for name, module in ours(WIDE).named_modules() if isinstance(module, nn.Linear)}
    converted = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert converted == linears - {"lm_head"}
    ids = tokens(WIDE, 2, 9)
    with torch.no_grad():
        for name in converted:  # each layer, since rounding that turns a routing decision is no measure
            module = model.get_submodule(name)
            if bits == 4:
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            else:
                scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
                weight = module.weight.data.float() * scale[:, None] / 127
            x = torch.randn(3, weight.shape[1])
            assert error(module(x), x @ weight.float().T) < 0.02
        text = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        whole = model(text.sequences).logits
    if bits == 4:  # 8-bit layers round a row by what else is in the call
        assert all(error(step, whole[:, 8 + i]) < 0.05 for i, step in enumerate(text.logits))


def test_a_quantizer_that_converts_nothing_is_an_error(folder_of, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    monkeypatch.setattr(Bnb4BitHfQuantizer, "_process_model_before_weight_loading", lambda self, model, **kwargs: model)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match=r"bitsandbytes.* to convert linear layers, got a model without a converted"):
        dhf.DeepseekForCausalLM.from_pretrained(folder_of("v3"), quantization_config=settings, device_map="cpu")


def test_torchao_weights_are_multiplied_as_torchao_means_them(wide_folder):
    quantization = pytest.importorskip("torchao.quantization")
    model = ours(WIDE)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    plain = ours(WIDE)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                weight = module.weight
                assert type(weight) is not nn.Parameter
                plain.get_submodule(name).weight.copy_(weight.dequantize())
        ids = tokens(WIDE, 2, 9)
        assert error(model(ids).logits, plain(ids).logits) <= 1e-4
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_a_fused_head_on_the_instance_keeps_our_losses():
    """TRL's trainers replace `forward` and compute Mixtral's balance loss there; ours is computed instead."""
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL has no fused head")
    config = small_models.config("v3", num_nextn_predict_layers=1)
    ids = tokens(config, 3, 9)
    labels, mask = ids.clone(), torch.ones_like(ids)
    mask[0, 6:], labels[0, 6:] = 0, -100
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    model = ours(config).train()
    model.config.output_router_logits, model.config.router_aux_loss_coef, model.config.mtp_loss_weight = True, 0.3, 0.2
    expected = model(**given)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    utils.add_fused_lm_head(model)
    out = model(**given, fused_lm_head=True)
    out.loss.backward()
    assert error(out.aux_loss, expected.aux_loss) <= 1e-6 and error(out.loss, expected.loss) <= 1e-5
    assert all(error(p.grad, gradients[name]) <= 1e-4 for name, p in model.named_parameters())
    assert error(model(**given).loss, expected.loss) <= 1e-6  # its ordinary call
    model.config.output_router_logits, model.config.mtp_loss_weight = False, 0.0
    out = model(**given, fused_lm_head=True)
    assert out.aux_loss is None and error(out.loss, model(**given).loss) <= 1e-5


def test_a_copy_of_a_model_with_a_fused_head_computes_with_its_own_weights():
    plain = dhf.DeepseekForCausalLM.forward

    def fused(self, *args, fused_lm_head=False, **kwargs):
        return plain(self, *args, **kwargs)

    model = ours(CONFIG).eval()
    model.forward = MethodType(fused, model)
    other, ids = copy.deepcopy(model), tokens(CONFIG, 2, 7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        for given in ({}, {"fused_lm_head": True, "labels": ids}):
            assert float(other(input_ids=ids, **given).logits.abs().max()) == 0
            assert float(model(input_ids=ids, **given).logits.abs().max()) > 0


def test_other_replacements_of_forward_are_left_alone():
    model = ours(CONFIG)
    other = MethodType(lambda self, *args, **kwargs: SimpleNamespace(logits=None), model)
    model.forward = other
    assert model.__dict__["forward"] is other


def per_expert_adapter(folder, tensors, names):
    """A LoRA as transformers 4 wrote it, one pair for each expert's linear layer; and the merged tensors."""
    generator = torch.Generator().manual_seed(3)
    adapter, merged = {}, dict(tensors)
    for name, weight in tensors.items():
        if any(part in name for part in names) and weight.ndim == 2:
            a = torch.randn(2, weight.shape[1], generator=generator) * 0.1
            b = torch.randn(weight.shape[0], 2, generator=generator) * 0.1
            stem = "base_model.model." + name.removesuffix(".weight")
            adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            merged[name] = weight + 2 * (b @ a)
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    targets = ["gate_proj", "up_proj", "down_proj", "o_proj"]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"inference_mode": True}))
    return merged


PARTS = {
    "experts": (".mlp.experts.", "o_proj"),
    "every MLP": ("gate_proj", "up_proj", "down_proj", "o_proj"),
    "dense layers": ("layers.0.mlp.", "o_proj"),
}


@pytest.mark.parametrize("entry", ["PeftModel", "load_adapter"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", ["v3", "kimi", "v2-lite", "glm"])
def test_adapters_of_single_experts_and_of_dense_layers_both_load(folder_of, tmp_path, kind, parts, entry):
    """PEFT moves `gate_proj` to the stacked experts; dense layers and shared experts keep theirs."""
    peft = pytest.importorskip("peft")
    base, config = folder_of(kind), small_models.config(kind)
    tensors = {k: v for file in sorted(base.glob("*.safetensors")) for k, v in load_file(file).items()}
    merged = per_expert_adapter(tmp_path / "adapter", tensors, PARTS[parts])
    ids = tokens(config, 1, 9)
    expected = oracle.run(config, merged, ids[0].tolist()).logits
    assert error(oracle.run(config, tensors, ids[0].tolist()).logits, expected) > 0.02
    model = dhf.DeepseekForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*belong to no module")
        if entry == "PeftModel":
            model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
        else:
            model.load_adapter(str(tmp_path / "adapter"))
    model.eval()
    with torch.no_grad():
        assert error(model(ids).logits[0], expected) <= 1e-5
        if entry == "PeftModel":  # saved as it is now, it loads again
            model.save_pretrained(tmp_path / "again")
            again = dhf.DeepseekForCausalLM.from_pretrained(base)
            again = peft.PeftModel.from_pretrained(again, tmp_path / "again").eval()
            assert error(again(ids).logits[0], expected) <= 1e-5
            assert error(model.merge_and_unload()(ids).logits[0], expected) <= 1e-5


def test_adapters_that_no_module_takes_are_named(folder_of, tmp_path):
    """The router has never been a linear layer."""
    peft = pytest.importorskip("peft")
    base = folder_of("v3")
    tensors = {k: v for file in sorted(base.glob("*.safetensors")) for k, v in load_file(file).items()}
    per_expert_adapter(tmp_path / "adapter", tensors, ("mlp.gate.", "o_proj"))
    with pytest.warns(UserWarning, match=r"adapter tensors .*: .*layers\.1\.mlp\.gate\.lora_A"):
        peft.PeftModel.from_pretrained(dhf.DeepseekForCausalLM.from_pretrained(base), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("targets", "linear", "stacked"),
    [
        (["gate_proj", "up_proj", "down_proj"], {"layers.0.mlp.", "shared_experts."}, True),
        ("all-linear", {"layers.0.mlp.", "shared_experts."}, True),
        (["shared_experts.down_proj"], {"shared_experts."}, False),
        (["layers.0.mlp.down_proj", "o_proj"], {"layers.0.mlp."}, False),
        (r".*layers\.0\..*(gate|up|down)_proj", {"layers.0.mlp."}, None),
    ],
)
def test_the_targets_of_a_new_adapter_are_what_they_name(targets, linear, stacked):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(ours(CONFIG), peft.LoraConfig(r=2, target_modules=targets))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    found = {part for part in ("layers.0.mlp.", "shared_experts.") for name in adapted if f"{part}down_proj" in name}
    assert found == linear
    if stacked is not None:
        assert any(name.endswith("mlp.experts") for name in adapted) == stacked
