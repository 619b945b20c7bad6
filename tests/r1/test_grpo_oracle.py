"""The trainer's loss and its gradients against the papers' formulas, written independently in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.r1.trainer import R1Config, R1Trainer
from support import grpo_oracle, published

LAYERS = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
GROUP = 4


def reward(completions, completion_ids, **columns):
    """Something that differs within a group, is equal in one, and is None for one output."""
    out = [float(sum(ids) % 7) for ids in completion_ids]
    out[GROUP : 2 * GROUP] = [1.0] * GROUP
    out[-1] = None
    return out


@pytest.fixture(scope="module")
def trainer_of(policy_folder, tag_tokenizer, tmp_path_factory):
    def make(**changes) -> R1Trainer:
        folder = policy_folder(**LAYERS)
        options = {
            "num_generations": GROUP, "per_device_train_batch_size": 12, "max_completion_length": 16, "report_to": [],
            "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False, "loss_type": "grpo",
            "save_strategy": "no",
        }  # fmt: skip
        rows = [{"prompt": " ".join(f"w{7 * i + j}" for j in range(2 + i))} for i in range(3)]
        with dhf.registered():
            trainer = R1Trainer(
                folder,
                reward,
                R1Config(str(tmp_path_factory.mktemp("out")), **(options | changes)),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tag_tokenizer,
            )
        trainer.current_gradient_accumulation_steps = 1
        trainer.batch = [row for row in rows for _ in range(GROUP)]
        return trainer

    return make


def rows_of(batch) -> list[tuple[list[int], list[int]]]:
    """Prompt and output of each row, without padding."""

    def real(ids, mask):
        return [int(token) for token, kept in zip(ids, mask, strict=True) if kept]

    columns = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    rows = zip(*(batch[name] for name in columns), strict=True)
    return [(real(prompt, prompt_mask), real(output, mask)) for prompt, prompt_mask, output, mask in rows]


def moved(weights, seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor if "correction_bias" in name or "mlp.gate." in name
        else tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in weights.items()
    }  # fmt: skip


def padded(rows, width: int):
    return torch.tensor([[float(value) for value in row] + [0.0] * (width - len(row)) for row in rows])


def test_advantages_are_the_papers(trainer_of):
    trainer = trainer_of(beta=0.0)
    batch = trainer._generate_and_score_completions(trainer.batch)
    rewards = reward(None, [output for _, output in rows_of(batch)])
    expected = grpo_oracle.advantages(rewards, GROUP)
    assert batch["advantages"].tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[GROUP : 2 * GROUP] == [0.0] * GROUP and expected[-1] == 0.0
    assert len(set(expected)) > 4


@pytest.mark.parametrize(
    "case",
    [
        {"epsilon": 0.2, "beta": 0.0},
        {"epsilon": 10.0, "beta": 0.0},
        {"epsilon": 0.2, "beta": 0.04},
        {"epsilon": 10.0, "beta": 0.001},
        {"epsilon": 0.2, "beta": 0.04, "unbiased": True},
        {"epsilon": 0.2, "beta": 0.04, "delta": 0.01},
        {"epsilon": 0.2, "beta": 0.04, "unbiased": True, "delta": 0.0},
    ],
    ids=lambda case: " ".join(f"{k}={v:g}" for k, v in case.items()),
)
def test_loss_and_gradients(trainer_of, case):
    trainer = trainer_of(
        epsilon=case["epsilon"],
        beta=case["beta"],
        use_bias_correction_kl=case.get("unbiased", False),
        off_policy_mask_threshold=case.get("delta"),
    )
    model = trainer.model
    config = model.config.to_core()
    batch = trainer._generate_and_score_completions(trainer.batch)
    rows = rows_of(batch)
    weights = {name: tensor.double() for name, tensor in published.unstack(model.state_dict(), config).items()}
    for name, tensor in weights.items():
        tensor.requires_grad_("correction_bias" not in name)

    def log_probs(weights):
        return [grpo_oracle.token_log_probs(config, weights, *row) for row in rows]

    with torch.no_grad():
        old, reference = log_probs(moved(weights, 1, 0.05)), log_probs(moved(weights, 2, 0.05))
    policy = log_probs(weights)
    # A fixed spread of advantages: the sign decides which side clips.
    advantage = [(-1) ** i * (0.5 + 0.1 * i) for i in range(len(rows))]
    expected = grpo_oracle.loss(policy, old, reference, advantage, **case)
    expected.backward()

    width = batch["completion_ids"].shape[1]
    batch["advantages"] = torch.tensor(advantage)
    batch["old_per_token_logps"] = padded(old, width)
    batch["ref_per_token_logps"] = padded(reference, width)
    drifts = [[float(o - p) for p, o in zip(*pair, strict=True)] for pair in zip(policy, old, strict=True)]
    ratios = [math.exp(-drift) for row in drifts for drift in row]
    assert min(ratios) < 0.8 and max(ratios) > 1.2  # both sides of the clip are reached
    if case.get("delta"):
        masked = [a < 0 and sum(d) / len(d) > case["delta"] for a, d in zip(advantage, drifts, strict=True)]
        assert 0 < sum(masked) < sum(a < 0 for a in advantage)
    model.train()
    model.zero_grad()
    # The oracle chooses experts itself, so the batch is trained on without the rollout's.
    batch.pop("routing")
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    gradients = published.unstack(
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}, config
    )
    compared = 0
    for name, tensor in weights.items():
        if tensor.grad is None:
            continue
        found = gradients.get(name)
        if name == "model.embed_tokens.weight":  # transformers' models never train the embedding of padding
            tensor.grad[config.pad_token_id] = 0
        scale = float(tensor.grad.abs().max())
        if found is None:
            assert scale == 0
            continue
        assert float((found.double() - tensor.grad).abs().max()) <= 1e-3 * scale + 1e-7, name
        compared += 1
    assert compared > 40


def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_the_policy_gradient(trainer_of):
    trainer = trainer_of(beta=0.0)
    model = trainer.model
    batch = trainer._generate_and_score_completions(trainer.batch)
    assert "old_per_token_logps" not in batch
    model.train()
    loss = trainer._compute_loss(model, batch)
    counts = [len(output) for _, output in rows_of(batch)]
    # All ratios are 1: minus the mean of the advantages, which are centred within each group.
    assert float(loss.detach()) == pytest.approx(-float(batch["advantages"].mean()), abs=1e-6)
    assert len(set(counts)) > 1
    loss.backward()
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0


def test_the_whole_step_follows_the_formula_with_the_rollouts_experts(trainer_of, monkeypatch):
    """Keep Routing in the oracle too: its routers are told the recorded experts and only weigh them."""
    trainer = trainer_of(beta=0.0)
    model, config = trainer.model, trainer.model.config.to_core()
    batch = trainer._generate_and_score_completions(trainer.batch)
    weights = {name: tensor.double() for name, tensor in published.unstack(model.state_dict(), config).items()}
    # The policy moves after the rollout, routers and all: its own choices would be others.
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, da.Router):
                module.weight += 0.5 * torch.randn(module.weight.shape, generator=generator)
                module.e_score_correction_bias += torch.randn(module.num_experts, generator=generator)
    weights = {name: tensor.double() for name, tensor in published.unstack(model.state_dict(), config).items()}
    for name, tensor in weights.items():
        tensor.requires_grad_("correction_bias" not in name)
    prompt_width = batch["prompt_ids"].shape[1]
    policy, recorded = [], batch["routing"]
    for i, (prompt, output) in enumerate(rows_of(batch)):
        start = prompt_width - len(prompt)
        forced = iter(recorded[i, start : start + len(prompt) + len(output), 0].tolist())

        def route(config, token, weight, bias, forced=forced):
            ids = next(forced)
            scores = torch.sigmoid(weight @ token)[ids]
            return ids, list(config.routed_scaling_factor * scores / (scores.sum() + 1e-20))

        monkeypatch.setattr(grpo_oracle.oracle, "route", route)
        no_drafts = weights_without_drafts(weights, config)
        policy.append(grpo_oracle.token_log_probs(no_drafts[1], no_drafts[0], prompt, output))
    expected = grpo_oracle.loss(policy, policy, None, batch["advantages"].tolist(), epsilon=0.2)
    expected.backward()
    model.train()
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    gradients = published.unstack(
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}, config
    )
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.o_proj.weight", "lm_head.weight"):
        scale = float(weights[name].grad.abs().max())
        assert scale > 0
        assert float((gradients[name].double() - weights[name].grad).abs().max()) <= 1e-3 * scale, name


def weights_without_drafts(weights, config):
    """The trunk's weights and config: prediction layers route by themselves."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    trunk = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    return trunk, dataclasses.replace(config, num_nextn_predict_layers=0)
