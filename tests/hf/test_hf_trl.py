"""TRL's trainers, two steps each, on models found by a path: ours while registered, the reference model too."""

from __future__ import annotations

import math
import shutil

import pytest
from transformers import DeepseekV3ForCausalLM

import deepseek_arch.hf as dhf
from deepseek_arch.hf.continuous_batching import _pages_take_halves
from support.balance_oracle import balance_loss_of, watched_balance

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def sentence(start: int, length: int) -> str:
    return " ".join(f"w{(7 * start + i) % 58}" for i in range(length))


@pytest.fixture
def checkpoint(folder_of, tokenizer, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of("v3", num_nextn_predict_layers=1), folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sft(model: str, tokenizer, folder, peft_config=None, batches=None, **changes):
    """A trained trainer and its losses; `batches` gets the inputs of every loss."""
    from trl import SFTConfig, SFTTrainer

    texts = datasets.Dataset.from_dict({"text": [sentence(i, 6 + i % 5) for i in range(8)]})
    trainer = SFTTrainer(
        model,
        args=SFTConfig(str(folder), max_length=32, **(COMMON | changes)),
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if batches is not None:
        compute = trainer.compute_loss

        def computing(model, inputs, *args, **kwargs):
            batches.append({name: value.clone() for name, value in inputs.items() if hasattr(value, "clone")})
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = computing
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("how", ["plain", "packing", "gradient checkpointing"])
def test_sft_finds_our_class_by_a_path_and_follows_the_native_losses(checkpoint, tokenizer, tmp_path, how, capsys):
    changes = {
        "plain": {"gradient_checkpointing": False},
        "packing": {"packing": True, "gradient_checkpointing": False},
        "gradient checkpointing": {"gradient_checkpointing": True},
    }[how]
    with dhf.registered():
        trainer, losses = sft(checkpoint, tokenizer, tmp_path / "ours", **changes)
    assert type(trainer.model) is dhf.DeepseekForCausalLM
    assert len(trainer.model.mtp) == 1
    trainer, expected = sft(checkpoint, tokenizer, tmp_path / "native", **changes)
    assert type(trainer.model) is DeepseekV3ForCausalLM
    # Logged to four digits.
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_sft_with_adapters_on_attention_and_experts(checkpoint, tokenizer, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=4, target_modules=["o_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with dhf.registered():
        trainer, losses = sft(checkpoint, tokenizer, tmp_path / "out", adapters)
    assert type(trainer.model.get_base_model()) is dhf.DeepseekForCausalLM
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    trained = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and "mtp" not in name]
    assert trained and all(p.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll", "dft"])
def test_sft_with_a_balance_loss(checkpoint, tokenizer, tmp_path, loss_type, capsys):
    """V3's sequence-wise loss of the batch that was trained on, not Mixtral's, which TRL computes (TRAPS R7)."""
    batches, given = [], {"loss_type": loss_type}
    with dhf.registered():
        trainer, losses = sft(
            checkpoint, tokenizer, tmp_path / "with", batches=batches, router_aux_loss_coef=0.01, **given
        )
        _, plain = sft(checkpoint, tokenizer, tmp_path / "without", **given)
    balance = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
    fresh = dhf.DeepseekForCausalLM.from_pretrained(checkpoint)
    gates = [layer.mlp.gate for layer in fresh.model.layers[1:]]
    given = {name: batches[0][name] for name in ("input_ids", "attention_mask") if name in batches[0]}
    mask = given.get("attention_mask", given["input_ids"] >= 0)
    expected = balance_loss_of(gates, fresh.config.num_experts_per_tok, mask, lambda: fresh(**given))
    assert balance[0] == pytest.approx(expected, rel=2e-4)  # logged to four digits
    assert losses[0] == pytest.approx(plain[0] + 0.01 * balance[0], abs=2e-4)  # three logged numbers of four digits


@pytest.mark.parametrize("how", ["plain", "reference model", "adapters", "balance loss", "continuous batching"])
def test_grpo_two_steps(checkpoint, tokenizer, tmp_path, how, capsys):
    from trl import GRPOConfig, GRPOTrainer

    if how == "continuous batching" and not _pages_take_halves():
        pytest.skip("this version's paged cache fits no latents")

    adapters = None
    if how == "adapters":
        adapters = pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_b_proj", "o_proj"])
    changes = {
        "reference model": {"beta": 0.04},
        "balance loss": {"router_aux_loss_coef": 0.01},
        "continuous batching": {"use_transformers_continuous_batching": True},
    }.get(how, {})

    def reward(completions: list[str], **kwargs: object) -> list[float]:
        return [float(sum(int(word[1:]) for word in text.split() if word.startswith("w"))) for text in completions]

    prompts = datasets.Dataset.from_dict({"prompt": [sentence(i, 4 + i % 3) for i in range(8)]})
    with dhf.registered():
        trainer = GRPOTrainer(
            checkpoint,
            reward_funcs=reward,
            args=GRPOConfig(str(tmp_path / "out"), max_completion_length=5, num_generations=2, **(COMMON | changes)),
            train_dataset=prompts,
            processing_class=tokenizer,
            peft_config=adapters,
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        policy = trainer.model.get_base_model() if adapters is not None else trainer.model
        assert type(policy) is dhf.DeepseekForCausalLM
        gates = [layer.mlp.gate for layer in policy.model.layers[1:]]
        with watched_balance(policy.model, gates, policy.config.num_experts_per_tok) as balance:
            trainer.train()
    if how == "reference model":
        assert type(trainer.ref_model) is dhf.DeepseekForCausalLM
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(math.isfinite(entry["loss"]) for entry in logs)
    if how == "balance loss":
        assert len(balance) == 2  # one batch a step
        for entry, expected in zip(logs, balance, strict=True):
            assert entry["aux_loss"] == pytest.approx(expected, rel=2e-4)  # logged to four digits
    moved = [name for name, p in trainer.model.named_parameters() if p.requires_grad and not p.equal(before[name])]
    assert any("o_proj" in name for name in moved)
    assert not any("mtp." in name for name in moved)
