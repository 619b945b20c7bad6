"""FP8 training of whole models: what stays, what comes back, and that the loss falls."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from deepseek_arch.models.causal_lm import DeepseekLM
from deepseek_arch.quant.fp8_training import (
    FP8,
    V3_RECIPE,
    FP8Policy,
    FP8Rule,
    fp8_training,
    remove_fp8_training,
)
from deepseek_kernels import (
    quantize_blocks,
)
from support.fp8_layers import EPS32, SMALL, same, wide
from support.small_models import model, tokens

# ------------------------------------------------------------------ a whole model


def step(lm: nn.Module, ids: Tensor) -> list[Tensor]:
    """Loss and all gradients."""
    lm.zero_grad()
    out = lm(ids, labels=ids)
    (out.loss + 0.3 * out.mtp_loss).backward()
    return [out.loss.detach(), *(p.grad.clone() for p in lm.parameters())]


def test_everything_but_the_products_stays_and_comes_back():
    lm, ids = model(SMALL), tokens(SMALL, 2, 9)
    hooked = []
    lm.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: hooked.append(1))
    lm.lm_head.bias_free = True  # an attribute of somebody else's
    modules = {name: (module, type(module), set(vars(module))) for name, module in lm.named_modules()}
    parameters, state = dict(lm.named_parameters()), {k: v.clone() for k, v in lm.state_dict().items()}
    before = step(lm, ids)

    first = fp8_training(lm)
    once = step(lm, ids)
    assert not torch.equal(once[0], before[0])
    assert fp8_training(lm) == first and same(step(lm, ids), once)  # idempotent
    assert all(lm.get_parameter(name) is p for name, p in parameters.items())
    assert list(lm.state_dict()) == list(state) and all(torch.equal(lm.state_dict()[k], v) for k, v in state.items())
    assert all(lm.get_submodule(name) is module for name, (module, *_) in modules.items())
    assert isinstance(lm.model.layers[0].self_attn.o_proj, nn.Linear)

    remove_fp8_training(lm)
    assert {name: (m, type(m), set(vars(m))) for name, m in lm.named_modules()} == modules
    assert same(step(lm, ids), before) and len(hooked) == 4
    remove_fp8_training(lm)  # nothing to do
    assert same(step(lm, ids), before)


def test_another_policy_replaces_the_first():
    lm, twin, ids = model(SMALL), model(SMALL), tokens(SMALL, 1, 7)
    only = FP8Policy((FP8Rule("o_proj", FP8),))
    fp8_training(lm)
    assert fp8_training(lm, only) == fp8_training(twin, only)
    assert same(step(lm, ids), step(twin, ids))


def test_training_updates_the_same_parameters_and_lowers_the_loss():
    """An optimizer made before the change goes on; the model learns one sequence by heart, as in high precision."""
    torch.manual_seed(0)
    lm, ids = DeepseekLM(SMALL, dtype=torch.float32).train(), tokens(SMALL, 1, 16)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    fp8_training(lm)
    start = {name: p.detach().clone() for name, p in lm.named_parameters()}
    losses = []
    for _ in range(20):
        out = lm(ids, labels=ids)
        (out.loss + 0.3 * out.mtp_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 and not torch.equal(p, start[name]) for name, p in lm.named_parameters())


def test_micro_batches_add_up():
    """Two accumulated backward passes give the sum of the two alone: one addition in float32."""
    lm, ids = model(SMALL), tokens(SMALL, 2, 9)
    fp8_training(lm)
    alone = [step(lm, row[None])[1:] for row in ids]
    lm.zero_grad()
    for row in ids:
        out = lm(row[None], labels=row[None])
        (out.loss + 0.3 * out.mtp_loss).backward()
    expected = [a + b for a, b in zip(*alone, strict=True)]
    assert same(expected, [p.grad for p in lm.parameters()])


def test_gradient_checkpointing_of_a_model_gives_the_same_bits():
    lm, ids = model(SMALL).train(), tokens(SMALL, 2, 9)
    fp8_training(lm)
    plain = step(lm, ids)
    lm.gradient_checkpointing_enable()
    assert same(step(lm, ids), plain)


def test_copies_are_independent_and_files_hold_the_plain_weights(tmp_path):
    lm, ids = model(SMALL), tokens(SMALL, 1, 7)
    fp8_training(lm)
    expected = step(lm, ids)
    twin = copy.deepcopy(lm)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.01)
    assert same(step(lm, ids), expected) and not same(step(twin, ids), expected)
    file = io.BytesIO()
    torch.save(lm, file)
    file.seek(0)
    assert same(step(torch.load(file, weights_only=False), ids), expected)
    plain = DeepseekLM(SMALL, dtype=torch.float32).eval()
    plain.load_state_dict(lm.state_dict())
    remove_fp8_training(lm)
    assert same(step(plain, ids), step(lm, ids))


def test_absorbed_attention_multiplies_by_the_quantized_weight():
    """Decoding in between: `kv_b_proj` means the same in both forms."""
    lm = model(SMALL)
    fp8_training(lm)
    attention = lm.model.layers[0].self_attn
    expected = wide(quantize_blocks(attention.kv_b_proj.weight), rows=128)
    # A unit vector in FP8 is 448 times a float32 quotient by 448.
    assert (attention.kv_b_map(torch.zeros(1))[0].double() - expected).abs().max() <= 2 * EPS32 * expected.abs().max()


@pytest.mark.slow
def test_the_transformers_trainer_needs_nothing_special(tmp_path, capsys):
    """Accumulation, checkpointing and a saved checkpoint that holds the plain weights."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    import deepseek_arch.hf as dhf

    lm = dhf.DeepseekForCausalLM(SMALL)
    assert len(fp8_training(lm).fp8) == 3 * 5 + 3 + 2 * (2 + 3)  # attention, the dense layer, experts and shared ones
    rows = [{"input_ids": row, "labels": row} for row in tokens(SMALL, 4, 10)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(lm, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    lm.save_pretrained(tmp_path / "saved")
    plain = dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "saved")
    state = lm.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_the_benchmark_compares_runs_that_differ_in_nothing_but_precision():
    """Under a policy without FP8 the first run is the second, bit for bit."""
    from benchmarks.training.fp8_training import BF16, OTHER, Settings, run

    settings = Settings(steps=3, last=2, batch=2, sequence=8, held_out=2, warmup=1)
    text = torch.randint(256, (200,), dtype=torch.uint8)
    high, low = (run(settings, SMALL.replace(vocab_size=256), p, text) for p in (FP8Policy(()), V3_RECIPE))
    for report, differs in ((high, False), (low, True)):
        rows = {row.name: row.results for row in report.rows}
        curves = rows["training loss, every step"]
        assert [len(curve.values) for curve in curves.values()] == [3, 3, 3]
        assert (curves["ours"] != curves[BF16]) == differs and curves[OTHER] != curves[BF16]
        assert curves["ours"].values[0] == pytest.approx(math.log(256), rel=0.1)
        for name in ("training loss, difference to bf16", "held-out loss, difference to bf16"):
            assert (rows[name]["ours"].median > 0) == differs
    assert (high.settings["fp8_weights"], low.settings["fp8_weights"]) == (0, 28)
    with pytest.raises(ValueError, match="expected more than 44 bytes of text, got 30"):
        run(settings, SMALL.replace(vocab_size=256), text=text[:30])
    with pytest.raises(ValueError, match="last <= steps"):
        Settings(steps=3, last=4)
