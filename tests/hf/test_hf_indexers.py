"""Indexers of sparse attention trained through transformers: the core's losses and gradients, in Trainer and TRL."""

from __future__ import annotations

import pytest
import torch
from twins import ours, same_tensors

import deepseek_arch as da
import deepseek_arch.hf as dhf
from support import small_models
from support.cut_models import gradients
from support.small_models import SPARSE_KINDS, error, tokens

EPS32 = torch.finfo(torch.float32).eps
SAME = 100 * EPS32  # the same modules, but for masks
TOKENS = 19  # index_topk is 6


def config_of(kind: str) -> da.DeepseekConfig:
    return small_models.config(kind, **({} if kind == "glm-5" else {"num_nextn_predict_layers": 1}))


def staged(config, stage, **changes):
    model = ours(config).train()
    for name, value in ({"indexer_stage": stage} | changes).items():
        setattr(model.config, name, value)
    return model


def rows(padded):
    def of(config):
        ids = tokens(config, 2, TOKENS)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, TOKENS - 4 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    return of


def core_of(config):
    core = small_models.model(config).train()
    core.balance_loss = type(core.balance_loss)()  # transformers adds it only where router logits are asked for
    return core


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_the_warm_up_is_the_cores(kind, padded):
    config = config_of(kind)
    core, model, given = core_of(config), staged(config, "dense"), rows(padded)(config)
    for each in (core, model):
        da.train_only_indexers(each)
    loss, selection = da.indexer_warm_up(core, given["input_ids"], given["attention_mask"])
    loss.backward()
    out = model(**given)
    out.loss.backward()
    assert error(out.loss, loss) < SAME and error(out.indexer_loss, loss) < SAME
    assert error(out.indexer_recall, torch.stack(list(selection.recall.values())).mean()) < SAME
    expected, got = gradients(core), gradients(model)
    assert got.keys() == expected.keys() and all(".indexer." in name for name in got)
    assert max(error(got[name], grad) for name, grad in expected.items()) < 1e-4


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_the_sparse_stage_is_the_cores(kind, padded):
    config = config_of(kind)
    weight = 0.3 if kind != "glm-5" else 0.0
    core, given = core_of(config), rows(padded)(config)
    model = staged(config, "sparse", indexer_loss_weight=2.0, mtp_loss_weight=weight)
    expected = da.sparse_training(core, **given)
    wanted = expected.loss + 2.0 * expected.indexer_loss + (weight * expected.mtp_loss if weight else 0.0)
    wanted.backward()
    out = model(**given)
    out.loss.backward()
    assert error(out.loss, wanted) < SAME and error(out.indexer_loss, expected.indexer_loss) < SAME
    assert out.indexer_recall is None
    wanted_grads, got = gradients(core), gradients(model)
    assert max(error(got[name], grad) for name, grad in wanted_grads.items()) < 1e-4
    assert {name for name in got if ".indexer." in name} == {name for name in wanted_grads if ".indexer." in name}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_recomputed_layers_give_the_same(kind, stage, reentrant):
    config, runs = config_of(kind), []
    for recompute in (False, True):
        model = staged(config, stage, **({} if kind == "glm-5" else {"mtp_loss_weight": 0.1}))
        if stage == "dense":
            da.train_only_indexers(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        out = model(**rows(True)(config))
        out.loss.backward()
        runs.append((out.loss, gradients(model)))
    (loss, expected), (again, got) = runs
    assert torch.equal(again, loss) and got.keys() == expected.keys()
    assert all(torch.equal(got[name], grad) for name, grad in expected.items())
    assert any(".indexer." in name for name in got)


def test_evaluation_reports_the_loss_and_leaves_that_of_tokens():
    config = config_of("v32")
    given = rows(False)(config)
    plain = ours(config)(**given)
    assert plain.indexer_loss is None and "indexer_loss" not in plain
    out = staged(config, "sparse").eval()(**given)
    assert torch.equal(out.loss, plain.loss) and out.indexer_loss > 0
    out = staged(config, "dense").eval()(**given)
    assert torch.equal(out.loss, out.indexer_loss)
    model = staged(config, "dense").eval()
    without = {name: value for name, value in given.items() if name != "labels"}
    assert torch.equal(model(**without).logits, ours(config)(**without).logits)  # sparse attention, as to be used
    options = {"max_new_tokens": 5, "do_sample": False}
    ids = given["input_ids"]
    assert torch.equal(model.generate(ids, **options), ours(config).generate(ids, **options))


def trained(model, folder, resume=None, **changes):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in tokens(model.config.to_core(), 8, TOKENS, seed=3)]
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 1}
    arguments |= {"learning_rate": 1e-2, "weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    arguments |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    settings = TrainingArguments(str(folder), **arguments | {"train_sampling_strategy": "sequential"} | changes)
    trainer = Trainer(model, settings, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_the_trainer_trains_as_the_functions_do(tmp_path, stage, recompute, capsys):
    """Four steps of two batches each, in order: the losses and the weights of a loop around the core's functions."""
    config = small_models.config("v32")
    model, core = staged(config, stage), core_of(config)
    if stage == "dense":
        da.train_only_indexers(model)
        da.train_only_indexers(core)
    losses = trained(model, tmp_path, gradient_checkpointing=recompute)
    optimizer = torch.optim.AdamW([p for p in core.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    batches, expected = tokens(config, 8, TOKENS, seed=3).split(2), []
    for step in range(4):
        total = 0.0
        for ids in (batches[2 * step % 4], batches[(2 * step + 1) % 4]):
            if stage == "dense":
                loss = da.indexer_warm_up(core, ids)[0] / 2
            else:
                out = da.sparse_training(core, ids, labels=ids)
                loss = (out.loss + out.indexer_loss) / 2
            loss.backward()
            total += float(loss.detach())
        expected.append(total)
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < losses[0]
    before = small_models.model(config).state_dict()
    for name, tensor in core.state_dict().items():
        got = model.state_dict()[name]
        assert error(got, tensor) < 1e-3, name
        if stage == "dense" and ".indexer." not in name:
            assert torch.equal(got, before[name]), name


def test_training_goes_on_from_a_checkpoint(tmp_path, capsys):
    """The stage and its weight are saved with the model, and the resumed run ends with the same weights."""
    config = small_models.config("v32")
    whole = da.train_only_indexers(model := staged(config, "dense", indexer_loss_weight=0.5))
    assert whole
    expected = trained(model, tmp_path, save_strategy="steps", save_steps=2)
    again = dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    assert (again.config.indexer_stage, again.config.indexer_loss_weight) == ("dense", 0.5)
    da.train_only_indexers(again)
    resumed = trained(again, tmp_path, resume=str(tmp_path / "checkpoint-2"), save_strategy="steps", save_steps=2)
    assert resumed == pytest.approx(expected, rel=1e-6)
    assert same_tensors(again.state_dict(), model.state_dict())
    assert da.load(tmp_path / "checkpoint-4").config.index_topk == 6


@pytest.mark.parametrize("trainer", ["loss", "log_probs"])
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_a_fused_head_on_the_instance_trains_indexers(stage, trainer):
    """TRL's trainers replace `forward` of the instance."""
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL has no fused head")
    config = small_models.config("v32")  # without MTP modules, whose loss SFTTrainer does not read
    model, given = staged(config, stage), rows(True)(config)
    expected = model(**given)
    expected.loss.backward()
    wanted = gradients(model)
    model.zero_grad(set_to_none=True)
    utils.add_fused_lm_head(model)
    out = model(**given, fused_lm_head=True)
    assert error(out.loss, expected.loss) < 1e-5
    if trainer == "loss":
        out.loss.backward()
    else:  # SFTTrainer's own, which reads nothing else
        (-out.log_probs.sum() / (given["labels"][:, 1:] != -100).sum()).backward()
    got = gradients(model)
    assert {name for name in got if ".indexer." in name} == {name for name in wanted if ".indexer." in name}
    assert all(error(got[name], grad) < 1e-4 for name, grad in wanted.items())
    if stage == "dense":
        assert not any(grad.any() for name, grad in got.items() if ".indexer." not in name)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_sft_trains_indexers(tmp_path, tokenizer, stage, capsys):
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl import SFTConfig, SFTTrainer

    config = small_models.config("v32", vocab_size=len(tokenizer))
    model = staged(config, stage)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if stage == "dense":
        da.train_only_indexers(model)
    words = [" ".join(f"w{(i + k) % 20}" for k in range(12)) for i in range(8)]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "bf16": False}
    arguments = SFTConfig(str(tmp_path), learning_rate=1e-2, disable_tqdm=True, save_strategy="no", **options)
    data = datasets.Dataset.from_dict({"text": words})
    SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in moved if ".indexer." in name} == {name for name in before if ".indexer." in name}
    assert stage != "dense" or all(".indexer." in name for name in moved)


def test_mistakes_are_named():
    config = small_models.config("v32")
    given = rows(False)(config)
    with pytest.raises(ValueError, match="indexer_stage None, 'dense' or 'sparse', got 'warm'"):
        staged(config, "warm")(**given)
    with pytest.raises(ValueError, match="with indexers for indexer_stage 'dense', got none"):
        staged(small_models.config("v3"), "dense")(**given)
    for weight in (0.0, -1.0, float("nan"), "1", True):
        with pytest.raises(ValueError, match="finite indexer_loss_weight > 0"):
            staged(config, "sparse", indexer_loss_weight=weight)(**given)
    model = staged(config, "dense")
    with pytest.raises(ValueError, match="and no cache, with indexer_stage"):
        model.model(given["input_ids"], use_cache=True, indexer_stage="dense")
