"""State that training changes and saving must keep: router biases with adapters, and in a refreshed reference model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments
from twins import ours

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.moe.load_balancer import routers
from support import small_models
from support.small_models import error, tokens

peft = pytest.importorskip("peft")
CONFIG = small_models.config("v3")
IDS = tokens(CONFIG, 8, 12)
TOLERANCE = 1e-5


def biases(model: torch.nn.Module) -> Tensor:
    return torch.cat([router.e_score_correction_bias for _, router in sorted(routers(model).items())])


def adapted(**changes):
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["o_proj"]} | changes
    return peft.get_peft_model(ours(CONFIG), peft.LoraConfig(**settings))


def trainer(model, folder, **changes):
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **changes,
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    return Trainer(model, settings, train_dataset=data, callbacks=[dhf.LoadBalancingCallback(rate=0.1)])


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["gate"]}], ids=["buffers", "copies"])
def test_an_adapter_is_saved_and_resumed_with_the_biases_that_balancing_moved(tmp_path, changes, capsys):
    model = adapted(**changes)
    before = biases(model)
    trainer(model, tmp_path).train()
    after = biases(model)
    assert (after - before).abs().max() > 0.15
    model.eval()
    with torch.no_grad():
        expected = model(IDS[:2]).logits
        again = peft.PeftModel.from_pretrained(ours(CONFIG), tmp_path / "checkpoint-4").eval()
        assert error(again(IDS[:2]).logits, expected) <= TOLERANCE
        assert torch.equal(biases(again), after)
    resumed = adapted(**changes)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(biases(resumed), after)


def balanced(model) -> None:
    balancer = da.LoadBalancer(model, rate=0.25)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    balancer.step()
    model.eval()


def test_an_adapter_of_transformers_own_is_saved_with_them(tmp_path):
    model = ours(CONFIG)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    balanced(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(ours(CONFIG), tmp_path).eval()
    attached = ours(CONFIG)
    attached.load_adapter(str(tmp_path))
    with torch.no_grad():
        expected = model(IDS).logits
        assert error(again(IDS).logits, expected) <= TOLERANCE
        assert error(attached.eval()(IDS).logits, expected) <= TOLERANCE


def test_a_merged_model_is_saved_under_published_names_alone(tmp_path):
    model = adapted(init_lora_weights=False)
    balanced(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = da.load(tmp_path)
    with torch.no_grad():
        assert error(again(IDS).logits, merged(IDS).logits) <= TOLERANCE
    (file,) = tmp_path.glob("*.safetensors")
    assert not [name for name in load_file(file) if name.endswith("correction.bias")]


def saved_biases(folder):
    return [t for name, t in load_file(folder / "adapter_model.safetensors").items() if "e_score" in name]


@pytest.mark.parametrize("attached", [False, True], ids=["PeftModel", "load_adapter"])
def test_an_adapter_that_was_loaded_is_saved_again_with_them(tmp_path, attached):
    model = adapted(init_lora_weights=False)
    balanced(model)
    model.save_pretrained(tmp_path / "first")
    if attached:
        again = ours(CONFIG)
        again.load_adapter(str(tmp_path / "first"))
    else:
        again = peft.PeftModel.from_pretrained(ours(CONFIG), tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    assert len(saved_biases(tmp_path / "second")) == len(routers(model))
    third = peft.PeftModel.from_pretrained(ours(CONFIG), tmp_path / "second").eval()
    assert torch.equal(biases(third), biases(model))
    with torch.no_grad():
        assert error(third(IDS).logits, model(IDS).logits) <= TOLERANCE


def test_saving_the_base_model_leaves_the_adapter_with_them(tmp_path):
    model = adapted()
    balanced(model)
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert len(saved_biases(tmp_path / "adapter")) == len(routers(model))


def test_a_merged_native_model_is_saved_in_its_own_dtype(tmp_path):
    model = da.DeepseekLM(CONFIG, dtype=torch.bfloat16)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"]))
    balanced(wrapped)
    merged = wrapped.merge_and_unload()
    report = da.save(merged, tmp_path)
    assert report.config.dtype == "bfloat16"
    assert torch.equal(biases(da.load(tmp_path)), biases(merged))


def test_a_changed_setting_of_an_adapter_is_announced_once():
    model = adapted()
    with pytest.warns(UserWarning, match="default .*bias='all'.* trains the biases of the base model") as seen:
        balanced(model)
    assert [w.filename for w in seen if "bias='all'" in str(w.message)] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balanced(model)


def test_a_rate_of_zero_leaves_the_adapter_as_it_is():
    model = adapted()
    balancer = da.LoadBalancer(model, rate=0.0)
    model.train()(IDS, labels=IDS).loss.backward()
    balancer.step()
    assert model.peft_config["default"].bias == "none"
    assert not [name for name in peft.get_peft_model_state_dict(model) if "correction" in name]


def test_adapters_that_save_no_biases_are_named():
    model = peft.get_peft_model(ours(CONFIG), peft.LoHaConfig(r=2, target_modules=["o_proj"]))
    with pytest.warns(UserWarning, match="LOHA.* saved without the router biases"):
        balanced(model)


def test_a_reference_model_that_trl_refreshes_routes_as_the_policy(tmp_path):
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    original = callbacks.SyncRefModelCallback.sync_target_model
    policy = ours(CONFIG)
    reference = copy.deepcopy(policy)
    refresh = callbacks.SyncRefModelCallback(reference, accelerator=None)
    run = trainer(policy, tmp_path, save_strategy="no")
    run.args.ref_model_sync_steps, run.args.ref_model_mixup_alpha = 4, 1.0
    run.add_callback(refresh)
    run.train()
    with torch.no_grad():
        assert error(reference(IDS).logits, policy.eval()(IDS).logits) <= TOLERANCE
    assert (biases(reference) - biases(ours(CONFIG))).abs().max() > 0.15
    assert callbacks.SyncRefModelCallback.sync_target_model is original
