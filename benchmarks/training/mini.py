"""A small DeepSeek model trained from nothing in minutes: an example to start from.

    python -m benchmarks.training.mini --steps 400 --checkpoint my-model

It has a model from a config, the training loop with multi-token prediction and with experts balanced by biases,
decoding with drafts, and a checkpoint in the published layout. The text is a file's bytes, or this repository's.
`python -m benchmarks train-mini` measures such a run.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.models.mtp_loss import mtp_weight
from deepseek_arch.moe.expert_load import LoadHistory
from deepseek_arch.moe.load_balancer import LoadBalancer

from ..core.options import parse_settings
from .corpus import file_text, random_rows, repository_text

__all__ = ["Example", "Recipe", "default_device", "main", "mini_config", "train"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes and rates of a training run.

    Raises:
        ValueError: a size that is not positive.
    """

    steps: Annotated[int, "optimizer steps"] = 400
    batch: Annotated[int, "rows of a batch"] = 8
    sequence: Annotated[int, "tokens of a row"] = 128
    accumulate: Annotated[int, "batches of each step"] = 1
    rate: Annotated[float, "highest learning rate, reached after the warm-up; it falls to a tenth of it"] = 2e-3
    warmup: Annotated[int, "steps in which the learning rate rises"] = 20
    balance: Annotated[float, "rate of the bias updates that balance experts; 0 for none"] = 1e-3
    seed: Annotated[int, "of the weights and of the order of batches"] = 0
    threads: Annotated[int, "threads of torch"] = 2

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.sequence, self.accumulate, self.warmup, self.threads) < 1:
            raise ValueError(f"expected positive sizes, got {self}")

    def schedule(self, step: int) -> float:
        """Returns the factor of the learning rate: a linear rise, and a cosine from 1 to 0.1."""
        fall = 0.55 + 0.45 * math.cos(math.pi * step / self.steps)
        return min(1.0, (step + 1) / self.warmup) * fall


def mini_config() -> da.DeepseekConfig:
    """Returns the preset `mini`, smaller and on bytes: 8 layers of 16 experts, and one MTP module."""
    return da.DeepseekConfig.from_pretrained("mini").replace(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        moe_intermediate_size=128,
        num_hidden_layers=8,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        q_lora_rank=None,
        kv_lora_rank=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        dtype="float32",
        bos_token_id=None,
        eos_token_id=None,
    )


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    model: da.DeepseekLM,
    text: Tensor,
    recipe: Recipe,
    *,
    history: LoadHistory | None = None,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Trains a model and returns the next-token loss of every step, in nats.

    Args:
        text: token ids [N].
        history: records the use of the experts.
        autocast: the dtype of products; None for that of the weights.
        on_step: called after each step with the number of steps and the loss.
    """
    draw = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.schedule)
    balancer = LoadBalancer(model, rate=recipe.balance)
    history = LoadHistory() if history is None else history
    precision = torch.autocast(model.device.type, autocast) if autocast else contextlib.nullcontext()
    losses: list[float] = []
    tokens = 0
    for step in range(recipe.steps):
        model.train()
        loss = 0.0
        for _ in range(recipe.accumulate):
            rows = random_rows(text, recipe.batch, recipe.sequence + 1, draw).to(model.device)
            with precision:
                out = model(rows, labels=rows)
            # `out.loss` contains V3's small balance loss (aux_loss), which is not reported.
            total = out.loss if out.mtp_loss is None else out.loss + mtp_weight(tokens) * out.mtp_loss
            (total / recipe.accumulate).backward()
            balance = 0.0 if out.aux_loss is None else float(out.aux_loss.detach())
            loss += (float(out.loss.detach()) - balance) / recipe.accumulate
            tokens += rows.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        history.add(balancer.step())  # once per optimizer step, whatever the accumulation
        losses.append(loss)
        on_step(step + 1, loss)
    return losses


@dataclass(frozen=True, kw_only=True)
class Example(Recipe):
    """A training run, and a text that the trained model continues."""

    text: Annotated[str, "file to train on (default: this repository's files)"] = ""
    prompt: Annotated[str, "text to continue"] = "def "
    new_tokens: Annotated[int, "bytes to write"] = 200
    checkpoint: Annotated[str, "folder for the model, in the published layout (default: none)"] = ""


def main(example: Example) -> int:
    """Trains a model, continues a text with its own drafts, and saves it."""
    torch.set_num_threads(example.threads)
    torch.manual_seed(example.seed)
    text = file_text(example.text) if example.text else repository_text()
    model = da.DeepseekLM(mini_config(), device=default_device(), dtype=torch.float32)

    def show(step: int, loss: float) -> None:
        if step == 1 or step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}")

    history = LoadHistory()
    train(model, text, example, history=history, on_step=show)
    busiest = max(float(load.max()) for load in history.mean(min(20, example.steps)).values())
    print(f"busiest expert of the last steps: {busiest:.2f} times its share")

    prompt = torch.tensor([list(example.prompt.encode())], device=model.device)
    tokens, report = da.generate(model, prompt, max_new_tokens=example.new_tokens, mtp_depth=1, return_report=True)
    print(bytes(tokens[0].tolist()).decode(errors="replace"))
    print(f"{report.tokens_per_step:.2f} tokens for each step of the model")

    if example.checkpoint:
        da.save(model.to(torch.bfloat16), example.checkpoint)
        print(f"saved {example.checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_settings("python -m benchmarks.training.mini", Example, __doc__, sys.argv[1:])))
