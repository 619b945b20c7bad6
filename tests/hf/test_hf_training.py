"""Trainer, PEFT and the balance loss: the same numbers as transformers' own class gives."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from twins import native, ours, same_tensors

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.hf import LoadBalancingCallback
from deepseek_arch.moe.load_balancer import routers
from support import small_models
from support.balance_oracle import balance_loss_of
from support.small_models import error, tokens

TOLERANCE = 1e-4


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_memory_only(reentrant):
    model = ours(small_models.config("v3")).train()
    ids = tokens(model.config.to_core(), 2, 9)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    model.model.layers[1].input_layernorm.register_forward_hook(lambda *args: calls.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2  # once forward, once again on the way back
    got = gradients(model)
    assert got.keys() == expected.keys()
    assert max(error(got[name], expected[name]) for name in expected) <= TOLERANCE


def test_balance_loss_and_its_factor():
    """The report's loss of every layer, without a factor; added with the config's, or else the family's (TRAPS D8)."""
    model = ours(small_models.config("v3")).train()
    core = model.config.to_core()
    ids, mask = tokens(core, 2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    out = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    expected = balance_loss_of(gates, core.num_experts_per_tok, mask, lambda: model(ids, attention_mask=mask))
    assert float(out.aux_loss) == pytest.approx(expected, rel=TOLERANCE)
    assert len(out.router_logits) == len(gates)
    plain = model(ids, attention_mask=mask, labels=ids)
    assert plain.aux_loss is None and plain.router_logits is None
    assert error(out.loss, plain.loss + 1e-4 * expected) <= TOLERANCE  # V3's, where the config has none
    for field, factor in (("aux_loss_alpha", 0.01), ("router_aux_loss_coef", 0.5)):
        setattr(model.config, field, factor)
        weighted = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        assert error(weighted.loss, plain.loss + factor * expected) <= TOLERANCE
    out.aux_loss.backward()
    assert model.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_the_trainer_balances_experts_once_per_optimizer_step(tmp_path, recompute):
    """TRAPS D1, D3: counts of both accumulated batches, padding left out, recomputation not counted."""
    callback = LoadBalancingCallback(rate=0.25)
    model = ours(small_models.config("v3"))
    model.config_core = model.config.to_core()
    before = {name: router.e_score_correction_bias.clone() for name, router in routers(model).items()}
    changes = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    train(model, tmp_path, callbacks=[callback], gradient_checkpointing=recompute, **changes)
    shares = callback.history.shares
    assert len(shares) == 2 and all(len(steps) == 3 for steps in shares.values())
    assert callback.report.rate == 0.25
    assert {int(load.sum()) for load in callback.report.loads.values()} == {2 * 2 * 10 * 3}
    for name, router in routers(model).items():
        steps = (router.e_score_correction_bias - before[name]) / 0.25
        assert router.load is None and torch.equal(steps, steps.round()) and steps.abs().max() <= 3
        assert steps.abs().max() >= 1


def train(model, folder, resume=None, callbacks=(), **changes):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens(model.config_core, 8, 10, seed=3)]
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
    }
    trainer = Trainer(
        model, TrainingArguments(str(folder), **(arguments | changes)), train_dataset=rows, callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_follows_the_native_losses_and_saves_a_published_checkpoint(tmp_path, capsys):
    model = ours(small_models.config("v3", num_nextn_predict_layers=1))
    twin = native(model)
    model.config_core = twin.config_core = model.config.to_core()
    untouched = {name: p.clone() for name, p in model.mtp.state_dict().items()}
    losses = train(model, tmp_path, gradient_checkpointing=True, save_strategy="steps", save_steps=6)
    assert losses == pytest.approx(train(twin, tmp_path / "native"), rel=TOLERANCE)
    assert losses[-1] < losses[0]
    saved = tmp_path / "checkpoint-6"
    assert same_tensors(da.load(saved).state_dict(), model.state_dict())
    with dhf.registered():
        assert same_tensors(AutoModelForCausalLM.from_pretrained(saved).state_dict(), model.state_dict())
    assert same_tensors(model.mtp.state_dict(), untouched)


def test_trainer_resumes_with_the_experts_it_saved(tmp_path, capsys):
    """It calls `load_state_dict(strict=False)` on published names: the native stacked experts stay as they were."""
    pytest.importorskip("accelerate")
    schedule = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3}
    config = small_models.config("v3", num_nextn_predict_layers=1)
    models = [ours(config), ours(config)]
    for model in models:
        model.config_core = config
    expected = train(models[0], tmp_path, **schedule)
    resumed = train(models[1], tmp_path, resume=tmp_path / "checkpoint-3", **schedule)
    assert resumed == pytest.approx(expected, rel=1e-6)
    assert same_tensors(models[1].state_dict(), models[0].state_dict())


def test_published_names_are_taken_by_load_state_dict(folder_of, tmp_path):
    from transformers.trainer_utils import load_sharded_checkpoint

    model = dhf.DeepseekForCausalLM.from_pretrained(folder_of("v3", num_nextn_predict_layers=2))
    model.save_pretrained(tmp_path, max_shard_size="50KB")  # the experts of a layer lie in several shards
    fresh = dhf.DeepseekForCausalLM(model.config.to_core())
    load_sharded_checkpoint(fresh, str(tmp_path), strict=False)
    assert same_tensors(fresh.state_dict(), model.state_dict())
    published = {}
    for file in tmp_path.glob("*.safetensors"):
        published |= load_file(file)
    fresh = pickle.loads(pickle.dumps(dhf.DeepseekForCausalLM(model.config.to_core())))
    fresh.load_state_dict(published)  # strict: nothing missing, nothing unexpected
    assert same_tensors(fresh.state_dict(), model.state_dict())
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    with pytest.raises(RuntimeError, match=re.escape(name)):
        fresh.load_state_dict(published | {name: published[name].T})
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        fresh.load_state_dict({k: v for k, v in published.items() if k != "lm_head.weight"})


# ---------------------------------------------------------------- PEFT

ADAPTERS = {
    "attention": {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "stacked experts": {
        "target_modules": ["o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "all linear layers": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("where", ADAPTERS)
def test_lora_trains_saves_merges_and_fits_native_models(folder_of, tmp_path, where):
    peft = pytest.importorskip("peft")
    folder = folder_of("v3", num_nextn_predict_layers=1)
    base = dhf.DeepseekForCausalLM.from_pretrained(folder)
    frozen = {name: p.clone() for name, p in base.state_dict().items()}
    # Random adapters, so that they show at once; LoRA's own start changes nothing.
    settings = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[where])
    model = peft.get_peft_model(base, settings).train()
    ids = tokens(base.config.to_core(), 2, 9)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    first = model(ids, labels=ids).loss
    first.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in trained.items() if ".mtp." not in name)
    optimizer.step()
    assert model(ids, labels=ids).loss < first
    model.eval()
    with torch.no_grad():
        assert model(ids, labels=ids).loss < first
        logits = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
        # The absorbed form reads kv_b_proj through its adapter: cached and uncached agree.
        steps = [model(ids[:, :-1], use_cache=True)]
        steps.append(model(ids[:, -1:], past_key_values=steps[0].past_key_values))
        assert error(torch.cat([step.logits for step in steps], 1), logits) <= TOLERANCE
        model.save_pretrained(tmp_path / "adapter")
        for cls in (dhf.DeepseekForCausalLM, DeepseekV3ForCausalLM):
            again = peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter").eval()
            if where == "all linear layers" and cls is DeepseekV3ForCausalLM:
                # PEFT moves these names to the experts there, so that a dense layer's adapter finds no place.
                assert not any("layers.0.mlp.down_proj.lora" in name for name, _ in again.named_parameters())
                continue
            assert error(again(ids).logits, logits) <= TOLERANCE
        attached = dhf.DeepseekForCausalLM.from_pretrained(folder)
        attached.load_adapter(str(tmp_path / "adapter"))
        assert error(attached.eval()(ids).logits, logits) <= TOLERANCE
        merged = model.merge_and_unload()
        assert error(merged(ids).logits, logits) <= TOLERANCE
        merged.save_pretrained(tmp_path / "merged")
        core = da.load(tmp_path / "merged")
        assert error(core(ids).logits, logits) <= TOLERANCE
    assert error(logits, plain) > 0.01
    assert torch.equal(core.model.embed_tokens.weight, frozen["model.embed_tokens.weight"])


def test_adapter_folders_load_through_auto_classes_and_still_demand_every_weight(folder_of, edited, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    broken = edited(folder_of("v3"), lambda tensors, _: tensors.pop("model.layers.1.self_attn.q_a_proj.weight"))
    for base, complete in ((folder_of("v3"), True), (broken, False)):
        model = dhf.DeepseekForCausalLM.from_pretrained(folder_of("v3"))
        adapted = peft.get_peft_model(model, settings)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(tmp_path / "adapter")
        with dhf.registered():
            if complete:
                loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
                assert type(loaded) is dhf.DeepseekForCausalLM
                ids = tokens(model.config.to_core(), 1, 6)
                with torch.no_grad():
                    assert error(loaded(ids).logits, adapted.eval()(ids).logits) <= TOLERANCE
            else:
                with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.self_attn\.q_a_proj\.weight"):
                    AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
