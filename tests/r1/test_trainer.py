"""R1's trainer: the rollout's experts in every minibatch, a reference with its buffers, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
from transformers import Qwen2Config, Qwen2ForCausalLM

import deepseek_arch.hf as dhf
from deepseek_arch.hf import load_balancing_callback
from deepseek_arch.moe.load_balancer import routers
from deepseek_arch.r1.presets import PRESETS
from deepseek_arch.r1.trainer import R1Config, R1Trainer
from deepseek_arch.r1.trainer import reference as reference_module
from deepseek_arch.r1.trainer.config import base_model
from support import small_models
from support.balance_oracle import balance_loss_of

COMMON = {
    "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6,
    "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False,
    "disable_tqdm": True, "gradient_checkpointing": False, "loss_type": "grpo", "lr_scheduler_type": "constant",
    "use_bias_correction_kl": False,
}  # fmt: skip
DRAFTS = {"num_nextn_predict_layers": 1}


def reward(completion_ids, **columns):
    return [float(sum(ids) % 5) for ids in completion_ids]


@pytest.fixture
def trainer_of(policy_folder, tag_tokenizer, prompts, tmp_path):
    def make(model=None, tokenizer=tag_tokenizer, rewards=reward, out="out", rows=None, **changes):
        extra = {name: changes.pop(name) for name in ("peft_config", "callbacks") if name in changes}
        dhf.register()
        return R1Trainer(
            policy_folder(**DRAFTS) if model is None else model,
            rewards,
            R1Config(str(tmp_path / out), **(COMMON | changes)),
            train_dataset=datasets.Dataset.from_list(rows or prompts(16)),
            processing_class=tokenizer,
            **extra,
        )

    return make


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer._policy.state_dict().items()}


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("how", ["plain", "16 minibatches", "checkpointing", "adapters"])
def test_every_minibatch_takes_the_experts_of_its_rollout(trainer_of, how):
    changes = {
        "plain": {},
        "16 minibatches": {"steps_per_generation": 16, "max_steps": 16, "beta": 0.04, "num_generations": 8},
        "checkpointing": {"gradient_checkpointing": True},
        "adapters": {},
    }[how]
    if how == "adapters":
        changes["peft_config"] = pytest.importorskip("peft").LoraConfig(r=4, target_modules=["o_proj"])
    trainer = trainer_of(**changes)
    compared = []
    gates = list(routers(base_model(trainer._policy).model).values())
    used: dict[int, torch.Tensor] = {}
    for i, gate in enumerate(gates):
        gate.register_forward_hook(lambda module, inputs, output, i=i: used.__setitem__(i, output[2]))
    inner = trainer._compute_loss

    def compute_loss(model, inputs):
        loss = inner(model, inputs)
        real = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1).bool()
        for i in range(len(gates)):
            ids = used[i].unflatten(0, real.shape)
            assert torch.equal(ids[real], inputs["routing"][:, :, i][real].long())
        compared.append(inputs["prompt_ids"])
        return loss

    trainer._compute_loss = compute_loss
    trainer.train()
    assert len(compared) == trainer.args.max_steps
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_without_replay_the_routers_choose_for_themselves(trainer_of):
    trainer = trainer_of(keep_routing=False)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    assert "routing" not in batch


def test_a_step_moves_the_policy_and_neither_drafts_nor_biases(trainer_of):
    trainer = trainer_of()
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("o_proj" in name for name in moved)
    assert not any(name.startswith("mtp.") or "correction_bias" in name for name in moved)


def test_drafts_are_trained_beside_the_policy_and_do_not_touch_it(trainer_of):
    plain, drafting = trainer_of(out="a"), trainer_of(out="b", mtp_loss_weight=0.5)
    before = parameters(drafting)
    for trainer in (plain, drafting):
        torch.manual_seed(0)
        trainer.args.max_grad_norm = 0.0  # the norm is of all gradients together
        trainer.train()
    first, second = parameters(plain), parameters(drafting)
    for name in first:
        if name.startswith("mtp."):
            assert torch.equal(first[name], before[name])
        else:
            assert torch.equal(first[name], second[name]), name
    assert sum(not torch.equal(second[name], before[name]) for name in before if name.startswith("mtp.")) > 10
    assert len(logged(drafting, "mtp_loss")) == 2


def test_rollouts_with_drafts_keep_their_experts_too(trainer_of, policy_folder):
    trainer = trainer_of(rollout_mtp_depth=1, mtp_loss_weight=0.1)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    assert batch["routing"].shape[:2] == (4, batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1])
    trainer.train()
    assert all(0 <= share <= 1 for share in logged(trainer, "mtp_acceptance"))
    assert len(logged(trainer, "mtp_acceptance")) == 2
    with pytest.raises(ValueError, match="prediction layers for rollout_mtp_depth 1"):
        trainer_of(policy_folder(), rollout_mtp_depth=1)


def test_the_balance_loss_is_v3s(trainer_of):
    trainer = trainer_of(balance_loss=0.01)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = float(trainer._compute_loss(trainer.model, batch).detach())
    value = trainer._metrics["train"]["balance_loss"][-1]
    trainer.args.balance_loss = 0.0
    assert loss == pytest.approx(float(trainer._compute_loss(trainer.model, batch).detach()) + 0.01 * value, abs=1e-6)
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    model = copy.deepcopy(trainer._policy).eval()
    del model.forward  # TRL's, bound to the first model
    gates = [layer.mlp.gate for layer in model.model.layers if layer.has_experts]
    chosen = model.config.num_experts_per_tok
    expected = balance_loss_of(gates, chosen, mask, lambda: model(ids, attention_mask=mask))
    assert value == pytest.approx(expected, rel=1e-5)


def test_biases_follow_the_load_if_asked_to(trainer_of):
    trainer = trainer_of(balance_rate=0.01)
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    biases = [name for name in before if "correction_bias" in name and not name.startswith("mtp.")]
    assert biases and all(not torch.equal(before[name], after[name]) for name in biases)
    assert len(logged(trainer, "max_violation")) >= 2


@pytest.mark.parametrize("replay", [True, False])
def test_the_divergence_from_a_refreshed_reference_is_zero(trainer_of, replay):
    """Refreshed after each step, with biases that move a lot: both models are the same whenever they are compared."""
    changes = {"beta": 0.04, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer = trainer_of(balance_rate=0.3, max_steps=3, replay_reference=replay, keep_routing=replay, **changes)
    trainer.train()
    assert logged(trainer, "kl") == pytest.approx([0.0] * 3, abs=1e-9)
    for name, buffer in trainer.ref_model.named_buffers():
        assert torch.equal(buffer, dict(trainer._policy.named_buffers())[name]), name


def test_without_buffers_it_is_not(trainer_of, monkeypatch):
    """Refreshes a reference model as TRL's own callback does, which `LoadBalancingCallback` mends."""
    monkeypatch.setattr(reference_module, "blend_buffers", lambda *args: None)
    monkeypatch.setattr(load_balancing_callback, "refresh_copies_biases", lambda: lambda: None)
    changes = {"beta": 0.04, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer = trainer_of(balance_rate=0.3, max_steps=3, keep_routing=False, **changes)
    trainer.train()
    assert max(logged(trainer, "kl")[1:]) > 1e-4


def test_a_share_of_the_buffers_is_blended():
    source, target = torch.nn.Module(), torch.nn.Module()
    for module, value in ((source, 1.0), (target, 0.0)):
        module.register_buffer("bias", torch.full((2,), value))
        module.register_buffer("count", torch.full((2,), int(value)))
    reference_module.blend_buffers(source, target, 0.25)
    assert target.bias.tolist() == [0.25, 0.25] and target.count.tolist() == [1, 1]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(trainer_of):
    """The reference that was refreshed before the checkpoint is the one that the run goes on with."""
    changes = {
        "max_steps": 4, "beta": 0.5, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2,
        "save_strategy": "steps", "save_steps": 3, "balance_rate": 0.05, "learning_rate": 2e-2,
    }  # fmt: skip
    whole = trainer_of(out="whole", **changes)
    whole.train()
    resumed = trainer_of(out="whole", **changes)
    resumed.train(resume_from_checkpoint=str(whole.args.output_dir) + "/checkpoint-3")
    first, second = parameters(whole), parameters(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = whole.ref_model.state_dict(), resumed.ref_model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_dense_student_of_another_architecture_trains_with_transformers_rollouts(trainer_of, tag_tokenizer, tmp_path):
    config = Qwen2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "student")
    tag_tokenizer.save_pretrained(tmp_path / "student")
    trainer = trainer_of(str(tmp_path / "student"), rollout_engine="hf", keep_routing=False)
    before = parameters(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in parameters(trainer).items())


def test_conversations_are_judged_as_generated_though_the_tokenizer_has_a_response_template(trainer_of, tag_tokenizer):
    tokenizer = copy.deepcopy(tag_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}<think> "
    tokenizer.response_template = {"anything": "at all"}
    seen = []

    def judge(completions, completion_ids, **columns):
        seen.extend(completions)
        return reward(completion_ids)

    rows = [{"prompt": [{"role": "user", "content": f"w{i} w3"}]} for i in range(8)]
    trainer = trainer_of(tokenizer=tokenizer, rewards=judge, rows=rows, max_steps=1)
    trainer.train()
    assert tokenizer.response_template == {"anything": "at all"}
    assert all(set(message[0]) == {"role", "content"} for message in seen)


def bare(tokenizer, **changes):
    other = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def test_bad_tokenizers_are_refused(trainer_of, tag_tokenizer):
    for changes, message in (
        ({"pad_token": None}, "without pad_token"),
        ({"eos_token": None}, "without eos_token"),
        ({"pad_token": "<end>"}, "other than its end token"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tokenizer=bare(tag_tokenizer, **changes))
    special = copy.deepcopy(tag_tokenizer)
    special.add_special_tokens({"additional_special_tokens": ["<think>"]})
    with pytest.raises(ValueError, match="'<think>' as it was encoded"):
        trainer_of(tokenizer=special)


def test_bad_policies_are_refused(trainer_of, policy_folder, tmp_path):
    dense = policy_folder("v3", n_routed_experts=None, n_shared_experts=None, first_k_dense_replace=3)
    with pytest.raises(ValueError, match="experts for keep_routing"):
        trainer_of(dense)
    with pytest.raises(ValueError, match="experts for balance_rate"):
        trainer_of(dense, keep_routing=False, balance_rate=0.1)
    with pytest.raises(ValueError, match="prediction layers for mtp_loss_weight"):
        trainer_of(policy_folder(), mtp_loss_weight=0.1)
    made = dhf.DeepseekForCausalLM(small_models.config("v3"))
    with pytest.raises(ValueError, match="loaded from a folder"):
        trainer_of(made, beta=0.1)
    from deepseek_arch.checkpoint.synthetic import write_checkpoint
    from deepseek_arch.config.deepseek_config import DeepseekConfig

    write_checkpoint(tmp_path / "fp8", DeepseekConfig.from_pretrained("tiny"), "fp8")
    with pytest.raises(ValueError, match="FP8 weights"):
        trainer_of(dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "fp8"))
    student = Qwen2ForCausalLM(Qwen2Config(vocab_size=61, hidden_size=32, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(ValueError, match="use 'hf'"):
        trainer_of(student, keep_routing=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_engine": "magic"}, "rollout_engine among"),
        ({"rollout_engine": "hf"}, "rollout_engine='native' with keep_routing"),
        ({"rollout_engine": "vllm", "keep_routing": False}, "use_vllm=True"),
        ({"use_vllm": True}, "use_vllm=True"),
        ({"router_aux_loss_coef": 0.01}, "Mixtral"),
        ({"balance_rate": -1.0}, "balance_rate >= 0"),
        ({"mtp_loss_weight": float("nan")}, "mtp_loss_weight >= 0"),
        ({"min_p": 0.1}, "min_p"),
        ({"num_generations": 1}, "at least 2|greater than 1"),
        ({"num_generations": 3}, "divisible"),
    ],
)
def test_bad_arguments_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        R1Config(str(tmp_path), **(COMMON | changes))


def test_rewards_that_apply_to_nothing_are_refused(trainer_of):
    trainer = trainer_of(rewards=lambda completions, **columns: [None] * len(completions))
    before = parameters(trainer)
    with pytest.raises(ValueError, match="at least one completion"):
        trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in parameters(trainer).items())


def test_prompts_longer_than_the_model_are_refused(trainer_of, policy_folder):
    trainer = trainer_of(policy_folder(max_position_embeddings=8))
    with pytest.raises(ValueError, match="at most 8 tokens together"):
        trainer.train()


PUBLISHED = {
    "r1-zero": {
        "learning_rate": 3e-6, "beta": 0.001, "temperature": 1.0, "num_generations": 16, "max_steps": 10_400,
        "max_completion_length": 32_768, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0,
        "ref_model_sync_steps": 400, "num_iterations": 1, "loss_type": "grpo", "scale_rewards": "group",
        "use_bias_correction_kl": False, "importance_sampling_level": "token", "top_p": 1.0, "top_k": 0,
    },
    "r1-reason": {"learning_rate": 3e-6, "beta": 0.001, "epsilon": 10.0, "temperature": 1.0, "num_generations": 16,
                  "max_completion_length": 32_768, "ref_model_sync_steps": 400},
    "r1-align": {"temperature": 0.7, "max_steps": 1_700, "num_generations": 16, "epsilon": 10.0},
    "r1-zero-qwen-32b": {"learning_rate": 2e-6, "beta": 0.001, "num_generations": 16},
    "deepseekmath-7b": {"learning_rate": 1e-6, "beta": 0.04, "num_generations": 64, "max_completion_length": 1_024},
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_numbers_and_trl_takes_them(name, tmp_path):
    arguments = PRESETS[name].arguments(per_device=8, processes=4)
    assert {key: arguments[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    options = {"report_to": [], "use_cpu": True, "bf16": False}
    config = R1Config(str(tmp_path), **(PRESETS[name].arguments(per_device=16) | options))
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert batch == (1024 if name == "deepseekmath-7b" else 512)
    assert batch // config.num_generations == (16 if name == "deepseekmath-7b" else 32)  # questions a step
    assert config.generation_batch_size == (1024 if name == "deepseekmath-7b" else 8192)
    with pytest.raises(ValueError, match="divides a batch"):
        PRESETS[name].arguments(per_device=3)
