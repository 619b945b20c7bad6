"""MTP modules trained through transformers: the core's numbers, and off unless asked for."""

from __future__ import annotations

import pytest
import torch
from twins import ours, same_tensors

import deepseek_arch.hf as dhf
from deepseek_arch.moe.load_balancer import LoadBalancer, routers
from support import small_models
from support.small_models import error, tokens

EPS32 = torch.finfo(torch.float32).eps
# Both classes run the same modules on the same numbers, but for masks: sums of some hundred float32 products differ
# in their last bits.
SAME = 100 * EPS32
CONFIG = small_models.config("v3", num_nextn_predict_layers=2)


def weighted(weight=0.3, config=CONFIG, **changes):
    model = ours(config).train()
    model.config.mtp_loss_weight = weight
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("feeding", [("post_norm", "block"), ("pre_norm", "head_norm")])
@pytest.mark.parametrize("rows", ["plain", "left padding", "right padding", "packed"])
def test_the_loss_is_the_cores(rows, feeding):
    config = CONFIG.replace(mtp_input=feeding[0], mtp_chain=feeding[1])
    core, model = small_models.model(config).train(), weighted(config=config)
    assert (model.config.to_core().mtp_input, model.config.to_core().mtp_chain) == feeding
    core.balance_loss = type(core.balance_loss)()
    ids, inputs = tokens(config, 2, 9), {}
    if rows == "packed":
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    elif rows != "plain":
        inputs["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
        inputs["attention_mask"][1, slice(3) if rows == "left padding" else slice(6, 9)] = 0
    labels = ids.masked_fill(inputs.get("attention_mask", torch.ones_like(ids)) == 0, -100)
    if rows == "packed":  # what a collator does; the core needs it not
        labels = labels.masked_fill(inputs["position_ids"] == 0, -100)
    if rows == "left padding":
        labels[1, 3] = -100  # transformers' loss predicts the first token from the padding before it
    expected = core(ids, labels=labels, **inputs)
    got = model(ids, labels=labels, **inputs)
    assert error(got.mtp_losses, expected.mtp_losses) < SAME
    assert torch.equal(got.mtp_accuracy, expected.mtp_accuracy)
    assert error(got.mtp_loss, expected.mtp_losses.mean()) < SAME
    assert error(got.loss, expected.loss + 0.3 * expected.mtp_loss) < SAME
    got.loss.backward()
    (expected.loss + 0.3 * expected.mtp_loss).backward()
    wanted = {name: p.grad for name, p in core.named_parameters()}
    # Gradients are longer sums, over tokens and layers.
    assert max(error(grad, wanted[name]) for name, grad in gradients(model).items()) < 1e-4


@pytest.mark.parametrize("marks", ["cu_seq_lens_q", "seq_idx"])
def test_documents_that_a_padding_free_collator_marks(marks):
    model, ids = weighted(), tokens(CONFIG, 1, 9)
    given = {"cu_seq_lens_q": torch.tensor([0, 4, 9])} if marks == "cu_seq_lens_q" else {"seq_idx": None}
    if marks == "seq_idx":
        given["seq_idx"] = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    expected = model(ids, labels=ids, position_ids=positions).mtp_losses
    assert error(model(ids, labels=ids, **given).mtp_losses, expected) < SAME
    apart = model(ids, labels=ids).mtp_losses
    assert error(apart, expected) > 1e-3, "a test of nothing"


def test_nothing_changes_without_a_weight():
    model = ours(CONFIG).train()
    ids = tokens(CONFIG, 2, 9)
    out = model(ids, labels=ids)
    assert out.mtp_loss is None and "mtp_loss" not in out
    out.loss.backward()
    trained = gradients(model)
    assert not any(name.startswith("mtp.") for name in trained) and "lm_head.weight" in trained
    assert "mtp_loss_weight" not in model.config.to_dict()
    model.config.mtp_loss_weight = 0.5
    with_it = model(ids, labels=ids)
    assert error(with_it.loss, out.loss + 0.5 * with_it.mtp_loss) < SAME
    assert "mtp_loss" not in model(ids) and "mtp_loss" not in model(ids, use_cache=True)
    embedded = model(inputs_embeds=model.model.embed_tokens(ids), labels=ids)  # whose next tokens are unknown
    assert embedded.mtp_loss is None


def test_evaluation_reports_it_and_leaves_the_loss_comparable():
    model = weighted().eval()
    ids = tokens(CONFIG, 2, 9)
    plain = ours(CONFIG)(ids, labels=ids).loss
    out = model(ids, labels=ids)
    assert torch.equal(out.loss, plain) and out.mtp_loss > 0
    assert model(ids, labels=ids, return_dict=False)[0] is not None
    assert torch.equal(model(ids, labels=ids, return_dict=False)[0], plain)


def test_a_weight_that_cannot_be():
    ids = tokens(CONFIG, 1, 4)
    with pytest.raises(ValueError, match=r"mtp_loss_weight >= 0, got -1\.0"):
        weighted(-1)(ids, labels=ids)
    with pytest.raises(ValueError, match=r"with MTP modules for mtp_loss_weight 0\.3"):
        weighted(config=small_models.config("v3"))(ids, labels=ids)


def test_the_weight_is_a_setting_of_the_checkpoint(folder_of, tmp_path):
    folder = folder_of("v3", num_nextn_predict_layers=2)
    model = dhf.DeepseekForCausalLM.from_pretrained(folder, mtp_loss_weight=0.1)
    assert model.config.mtp_loss_weight == 0.1
    model.save_pretrained(tmp_path)
    assert dhf.DeepseekForCausalLM.from_pretrained(tmp_path).config.mtp_loss_weight == 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_nothing(reentrant):
    ids, results = tokens(CONFIG, 2, 9), []
    for recompute in (False, True):
        model = weighted()
        calls = []
        model.mtp[1].eh_proj.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = model(ids, labels=ids)
        out.loss.backward()
        assert len(calls) == 1 + recompute
        results.append((out.mtp_losses, gradients(model), LoadBalancer(model, rate=0).step().loads))
    for (name, load), other in zip(results[0][2].items(), results[1][2].values(), strict=True):
        assert torch.equal(load, other), name
    assert len(results[0][2]) == 4  # two layers of the main model, two MTP modules
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert error(results[1][1][name], grad) < SAME, name


def test_mtp_modules_are_balanced_too():
    """Counted without the tokens that read nothing; their balance loss in `mtp_loss`, as the core has it (TRAPS F9)."""
    model, core = weighted(), small_models.model(CONFIG).train()
    ids = tokens(CONFIG, 2, 9)
    out = model(ids, labels=ids, output_router_logits=True)
    expected = core(ids, labels=ids)
    assert error(out.aux_loss * model.router_aux_loss_coef, expected.aux_loss) < SAME
    assert error(out.mtp_loss, expected.mtp_loss) < SAME
    assert error(out.mtp_loss - out.mtp_losses.mean(), expected.mtp_aux_losses.mean()) < 1e-2  # 1e-4 of a loss of 4
    assert error(out.loss, expected.loss + 0.3 * expected.mtp_loss) < SAME
    loads = {name: router.load for name, router in routers(model).items()}
    assert [int(load.sum()) for load in loads.values()] == [18 * 3, 18 * 3, 16 * 3, 14 * 3]
    assert all(torch.equal(load, routers(core)[name].load) for name, load in loads.items())


def test_a_detached_main_model_learns_nothing_from_it():
    """TRAPS F12."""
    model = weighted()
    model.mtp_detached = True
    ids = tokens(CONFIG, 2, 9)
    model(ids, labels=ids).mtp_loss.backward()
    trained = gradients(model)
    assert trained and all(name.startswith("mtp.") for name in trained)


@pytest.mark.parametrize("lengths", [(9, 9, 9, 9), (9, 3, 7, 5)])
def test_added_losses_count_once_a_step_whatever_the_accumulation(lengths):
    """TRAPS D7: four calls of a row against one of four, with the divisor that trainers pass.

    Rows of equal length give the same gradients. Rows of different length do not, by definition: a mean over the rows
    of a call weighs rows alike, and over calls it weighs them by their targets.
    """
    ids = tokens(CONFIG, 4, 9)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    items = (labels[:, 1:] != -100).sum()
    results = []
    for pieces in (1, 4):
        model, total, terms = weighted(), 0.0, []
        for rows in torch.arange(4).chunk(pieces):
            out = model(ids[rows], mask[rows], labels=labels[rows], num_items_in_batch=items, output_router_logits=True)
            out.loss.backward()
            total += out.loss.detach()
            share = (labels[rows, 1:] != -100).sum() / items
            terms.append(share * (1e-4 * out.aux_loss + 0.3 * out.mtp_loss).detach())
        results.append((total, gradients(model), LoadBalancer(model).step().loads, sum(terms)))
    (whole, grads, loads, added), (parts, others, again, summed) = results
    assert all(torch.equal(load, again[name]) for name, load in loads.items())
    # The next-token loss alone is the same for any lengths.
    assert error(whole - added, parts - summed) < SAME
    if len(set(lengths)) == 1:
        assert error(parts, whole) < SAME
        # Four roundings of gradients instead of one sum.
        assert max(error(others[name], grad) for name, grad in grads.items()) < 1e-5
    else:
        assert error(parts, whole) > 100 * SAME


def test_the_trainer_trains_the_mtp_modules(tmp_path, capsys):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    moved = {}
    for weight in (0.0, 0.3):
        model = weighted(weight)
        before = {name: p.clone() for name, p in model.mtp.state_dict().items()}
        data = [{"input_ids": row, "labels": row} for row in tokens(CONFIG, 8, 10, seed=3)]
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data,
            eval_dataset=data,
            callbacks=[dhf.LoadBalancingCallback()],
            compute_metrics=lambda predicted: {"width": float(predicted.predictions.shape[-1])},
        )
        first = (
            float(model(data[0]["input_ids"][None], labels=data[0]["labels"][None]).mtp_loss.detach())
            if weight
            else 0.0
        )
        model.train()
        for router in routers(model).values():
            router.load = None
        trainer.train()
        assert trainer.evaluate()["eval_width"] == CONFIG.vocab_size  # the logits alone
        moved[weight] = not same_tensors(model.mtp.state_dict(), before)
        if weight:
            after = {name: p for name, p in model.mtp.state_dict().items() if "e_score" not in name}
            assert not any(torch.equal(p, before[name]) for name, p in after.items() if "experts" not in name)
            last = float(model(data[0]["input_ids"][None], labels=data[0]["labels"][None]).mtp_loss.detach())
            assert last < first
    assert moved == {0.0: False, 0.3: True}


def test_the_output_survives_accelerate_in_lower_precision():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # that of the Trainer before
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(weighted())
    ids = tokens(CONFIG, 2, 9)
    out = model(ids, labels=ids)
    assert type(out) is type(ours(CONFIG)(ids)) and out.mtp_loss.dtype == torch.float32
    accelerator.backward(out.loss)
    assert model.mtp[0].eh_proj.weight.grad.abs().sum() > 0
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
