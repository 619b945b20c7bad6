"""The parts of the command `model` that run in its own process: decoding, prefill, FP8, batches, small models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.quant.fp8_convert import keep_fp8
from deepseek_kernels import use_backend

from ..core.report import NATIVE, OURS, Row, Samples
from ..core.timing import interleave, interleave_clocked
from .actions import (
    Action,
    compiled_actions,
    decode_actions,
    generate_actions,
    our_decode,
    prefill_actions,
    with_reference,
)
from .contestants import (
    DTYPES,
    allowed_difference,
    check_same_logits,
    comparable,
    logit_differences,
    native_twin,
    random_ids,
    random_model,
)
from .deepseek_inference import CHECKED, DeepseekInference
from .deepseek_inference import NAME as DEEPSEEK
from .limits import ModelCeilings, Work, decode_work, measure_model_ceilings, prefill_work
from .llama_bench import LLAMA, LlamaBench
from .model_settings import Settings
from .timed_rows import Times, ran_fewer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MOST_STEPS", "Bench"]

MOST_STEPS = 22  # of a decode
HUGE, NATIVE_HUGE = "ours, huge pages", "transformers, huge pages"
PLAIN, PLAIN_REFERENCE = "unquantized", "unquantized, reference"
EAGER = "not compiled"
PROMPT = 32  # tokens before those that a small model generates
LLAMA_TOKENS = 16  # of a sample


def steps_at(context: int) -> int:
    """Returns how many counted steps a decode behind so many tokens has."""
    return MOST_STEPS - 2 if context < 4096 else 8


class Bench:
    """Both models, and the measurements on them."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.settings, self.config = settings, settings.config()
        self.llama, self.llama_q8 = (self._llama(file) for file in (settings.gguf, settings.gguf_q8))
        self.deepseek: DeepseekInference | None = None
        if settings.deepseek_inference:
            room = max(*settings.prompts, *settings.contexts, CHECKED) + MOST_STEPS
            about = (settings.deepseek_inference, self.config, settings.dtype, settings.threads, room)
            self.deepseek = DeepseekInference(*about)
        self.ours = random_model(self.config, DTYPES[settings.dtype])
        self.native = native_twin(self.ours)
        self.native_class = type(self.native).__name__
        self.difference = check_same_logits(self.ours, self.native)
        self.ceilings: ModelCeilings = measure_model_ceilings(settings.ceiling_size)

    def _llama(self, file: str) -> LlamaBench | None:
        s = self.settings
        return LlamaBench(s.llama_bench, file, s.threads, s.limit_s) if file else None

    def free(self) -> None:
        """Drops the models before others need the memory."""
        del self.ours, self.native
        if self.deepseek is not None:
            self.deepseek.close()

    # -------------------------------------------------------------- decode and prefill

    def decode(self) -> Iterator[Row]:
        """Milliseconds a token, batch 1, on a cache of random latents; both models also on copies in huge pages."""
        huge = deepcopy(self.ours)
        twins = (huge, native_twin(huge)) if da.use_huge_pages(huge) else None
        for context in self.settings.contexts:
            times = self._decode(f"decode at {context}", self.ours, self.native, context, huge=twins)
            work = decode_work(self.config, self.settings.dtype, 1, context)
            steps = steps_at(context)
            self._add_deepseek(times, lambda one, n=context, k=steps, **limits: one.decode(n, k, 2, **limits))
            if self.llama is not None and context in self.settings.llama_contexts:
                times.add(LLAMA, self.llama.decode(context, LLAMA_TOKENS, 5))
            yield self._decode_row(times, work)

    def prefill(self) -> Iterator[Row]:
        """Tokens a second of a prompt into an empty cache, batch 1, logits of the last token."""
        for prompt in self.settings.prompts:
            times = self._prefill(f"prefill {prompt}", self.ours, self.native, prompt)
            self._add_deepseek(times, lambda one, n=prompt, **limits: one.prefill(n, 3, **limits))
            if self.llama is not None:
                times.add(LLAMA, self.llama.prefill(prompt, 2))
            yield self._prefill_row(times, prompt, self.settings.dtype)

    def _decode(
        self,
        name: str,
        ours: da.DeepseekLM,
        native: PreTrainedModel,
        context: int,
        batch: int = 1,
        huge: tuple[da.DeepseekLM, PreTrainedModel] | None = None,
    ) -> Times:
        steps = steps_at(context * batch)
        actions = decode_actions(ours, native, context, steps + 2, batch)
        if huge is not None:
            moved = decode_actions(*huge, context, steps + 2, batch)
            actions |= {HUGE: moved[OURS], NATIVE_HUGE: moved[NATIVE]}
        seconds = interleave_clocked(actions, rounds=steps, warmup=2, budget_s=self.settings.budget_s)
        return Times(name, seconds, remarks=[ran_fewer(seconds, steps, "steps")])

    def _decode_row(self, times: Times, work: Work, dtype: str = "", baseline: str = NATIVE) -> Row:
        limit = (self.ceilings, work, dtype or self.settings.dtype)
        goals = self.settings.is_reference()
        return times.to_row("ms/token", "lower", lambda t: 1e3 * t, goals=goals, baseline=baseline, limit=limit)

    def _prefill(self, name: str, ours: da.DeepseekLM, native: object, prompt: int) -> Times:
        actions = prefill_actions(ours, native, prompt)
        note = self._drop_slow(actions, ours, native, prompt)
        seconds = interleave_clocked(actions, rounds=3, budget_s=self.settings.budget_s)
        return Times(name, seconds, remarks=[note or ran_fewer(seconds, 3, "runs")])

    def _prefill_row(self, times: Times, prompt: int, dtype: str) -> Row:
        limit = (self.ceilings, prefill_work(self.config, dtype, prompt), dtype)
        goals = self.settings.is_reference()
        return times.to_row("tokens/s", "higher", lambda t: prompt / t, goals=goals, limit=limit)

    def _add_deepseek(self, times: Times, time_it: Callable[..., Samples | str]) -> None:
        """Adds the times of DeepSeek's code, if the user has it."""
        if self.deepseek is not None:
            limits = {"budget_s": self.settings.budget_s, "limit_s": self.settings.limit_s}
            times.add(DEEPSEEK, time_it(self.deepseek, **limits))

    def _drop_slow(self, actions: dict[str, Action], ours: da.DeepseekLM, native: object, prompt: int) -> str:
        """Removes transformers if the time of an eighth of the prompt shows that it would exceed the limit."""
        if prompt < 512:
            return ""
        probe = prefill_actions(ours, native, prompt // 8)[NATIVE]
        at_least = 8 * interleave({NATIVE: probe}, rounds=1, warmup=0)[NATIVE].median
        if at_least <= self.settings.limit_s:
            return ""
        del actions[NATIVE]
        rate = f"{prompt / at_least:.3g} tokens/s for {prompt // 8} tokens"
        return f"{NATIVE} not run: at least {at_least:.0f} s at its rate of {rate}"

    # -------------------------------------------------------------- FP8, batches, fp32

    def kept(self) -> Iterator[Row]:
        """Decoding with weights kept in FP8, beside our model on the same weights unquantized."""
        context = self.settings.contexts[0]
        steps = steps_at(context)
        fp8 = keep_fp8(random_model(self.config, DTYPES[self.settings.dtype]))
        _check_backends_agree(fp8)
        actions = with_reference(OURS, lambda: our_decode(fp8, context, steps + 2))
        huge = deepcopy(fp8)
        if da.use_huge_pages(huge):
            actions[HUGE] = our_decode(huge, context, steps + 2)
        actions |= with_reference(PLAIN, lambda: our_decode(self.ours, context, steps + 2))
        seconds = interleave_clocked(actions, rounds=steps, warmup=2, budget_s=self.settings.budget_s)
        times = Times(f"FP8 kept, decode at {context}", seconds, remarks=[ran_fewer(seconds, steps, "steps")])
        if self.llama_q8 is not None and context in self.settings.llama_contexts:
            times.add(LLAMA, self.llama_q8.decode(context, LLAMA_TOKENS, 5))
            times.remarks.append(f"{LLAMA} with Q8_0")
        work = decode_work(self.config, self.settings.dtype, 1, context, fp8=True)
        yield self._decode_row(times, work, baseline=PLAIN_REFERENCE if PLAIN_REFERENCE in seconds else PLAIN)

    def batches(self) -> Iterator[Row]:
        """Milliseconds a step of several rows, of a model with few layers."""
        s, context = self.settings, self.settings.contexts[0]
        config = s.config(layers=s.batch_layers)
        ours = random_model(config, DTYPES[s.dtype])
        native = native_twin(ours)
        check_same_logits(ours, native)
        for batch in s.batches:
            name = f"{batch} rows, {s.batch_layers} layers, decode at {context}"
            times = self._decode(name, ours, native, context, batch)
            yield self._decode_row(times, decode_work(config, s.dtype, batch, context))

    def fp32(self) -> Iterator[Row]:
        """Decoding and prefill in float32; memory for it is twice that of BF16."""
        s, context = self.settings, self.settings.contexts[0]
        ours = random_model(s.config(dtype="fp32"), torch.float32)
        native = native_twin(ours)
        check_same_logits(ours, native)
        times = self._decode(f"fp32, decode at {context}", ours, native, context)
        yield self._decode_row(times, decode_work(self.config, "fp32", 1, context), "fp32")
        times = self._prefill(f"fp32, prefill {s.fp32_prompt}", ours, native, s.fp32_prompt)
        yield self._prefill_row(times, s.fp32_prompt, "fp32")

    # -------------------------------------------------------------- small models

    def small(self) -> Iterator[Row]:
        """Tokens a second of greedy generation in float32, prompts included; the same tokens by all."""
        s = self.settings
        for preset in s.presets:
            ours = random_model(comparable(da.DeepseekConfig.from_pretrained(preset)), torch.float32)
            native = native_twin(ours)
            check_same_logits(ours, native)
            for batch in s.small_batches:
                actions = generate_actions(ours, native, PROMPT, s.new_tokens, batch)
                remark = _token_remark({name: action() for name, action in actions.items()})
                seconds = interleave_clocked(actions, rounds=5, warmup=0, budget_s=s.budget_s)
                times = Times(f"{preset} generates, {batch} prompts", seconds, remarks=[remark])
                tokens = batch * s.new_tokens
                yield times.to_row("tokens/s", "higher", lambda t, n=tokens: n / t, goals=s.is_reference())

    def compiled(self) -> Iterator[Row]:
        """Tokens a second of the same generation with a compiled step; the first call, which compiles, is not in it."""
        s = self.settings
        for preset in s.presets:
            ours = random_model(comparable(da.DeepseekConfig.from_pretrained(preset)), torch.float32)
            for batch in s.compiled_batches:
                actions = compiled_actions((OURS, EAGER), ours, PROMPT, s.new_tokens, batch)
                start = time.perf_counter()
                tokens = {name: action() for name, action in actions.items()}
                remarks = [f"first call {time.perf_counter() - start:.0f} s", _token_remark(tokens)]
                seconds = interleave_clocked(actions, rounds=5, warmup=0, budget_s=s.budget_s)
                times = Times(f"{preset} generates compiled, {batch} prompts", seconds, remarks=remarks)
                made = batch * s.new_tokens
                yield times.to_row("tokens/s", "higher", lambda t, n=made: n / t, goals=False, baseline=EAGER)


@torch.inference_mode()
def _check_backends_agree(model: da.DeepseekLM) -> None:
    """Compares the logits of a prompt and of a step behind it with those of the references.

    Raises:
        ValueError: they differ by more than rounding.
    """
    ids = random_ids(model.config.vocab_size, 40, seed=1)

    def logits() -> Tensor:
        cache = model.new_cache(1)
        return torch.cat([model(ids[:, :-1], cache=cache).logits, model(ids[:, -1:], cache=cache).logits], dim=1)

    with use_backend("reference"):
        expected = logits()
    difference = float(logit_differences(logits(), expected).median())
    if not difference <= allowed_difference(model):
        raise ValueError(f"expected the logits of the references to rounding, got a difference of {difference:.2g}")


def _token_remark(tokens: dict[str, Tensor]) -> str:
    """Returns a remark if contestants generate other tokens than ours: near ties of random weights go either way."""
    shares = {name: float((ids == tokens[OURS]).float().mean()) for name, ids in tokens.items() if name != OURS}
    different = [f"{name} agrees in {share:.1%} of the tokens" for name, share in shares.items() if share < 1]
    return ", ".join(different)
