"""Checks of the arguments of `generate`: types, ranges, and what goes together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from ..config.argument_types import as_integer
from ..models.causal_lm import DeepseekLM
from ..models.tensor_checks import as_int64, check_dense, check_multiplicative, nonzero

__all__ = ["check_arguments", "check_prompts", "end_tokens", "padding_token"]

_LONGEST = 2**20  # tokens of a text, unless the model's positions go further
_INT64 = 2**63


def check_prompts(model: DeepseekLM, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the prompts, int64 [B, T], and the mask as bool.

    Raises:
        ValueError: the model has no memory, the prompts are no integers [B, T], or the mask has a row without tokens.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "new_cache"):
        raise ValueError(f"expected model to be a DeepseekLM, got {type(model).__name__}")
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"expected input_ids to be a tensor [B, T], got {type(input_ids).__name__}")
    if model.device.type == "meta":
        raise ValueError("expected a model with weights, got one on device meta")
    weights = torch.empty(0, device=model.device)
    check_dense("input_ids", input_ids, weights)
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"expected non-empty input_ids [B, T] with T >= 1, got {list(input_ids.shape)}")
    ids = as_int64("input_ids", input_ids)
    if attention_mask is None:
        return ids, None
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"expected attention_mask to be a tensor, got {type(attention_mask).__name__}")
    check_dense("attention_mask", attention_mask, weights)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"expected attention_mask {list(input_ids.shape)}, got {list(attention_mask.shape)}")
    if attention_mask.is_floating_point():
        check_multiplicative(attention_mask)
    valid = nonzero(attention_mask)
    if not bool(valid.any(-1).all()):
        raise ValueError("expected at least one prompt token in every row, got a row of padding only")
    return ids, valid


def check_arguments(model: DeepseekLM, prompt: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `generate` by name, numbers as Python's own.

    Args:
        prompt: tokens of a prompt.

    Raises:
        ValueError: some are of another type or out of range; the message names all of them.
    """
    problems: list[str] = []
    known = dict(arguments)

    def integer(name: str, low: int, high: int = _INT64 - 1, optional: bool = False) -> None:
        value = known[name]
        if optional and value is None:
            return
        try:
            number = None if isinstance(value, bool) else index(value)
        except TypeError:
            number = None
        if number is None:
            problems.append(f"expected an integer {name} >= {low}, got {_shown(value)}")
        elif number < low:
            problems.append(f"expected {name} >= {low}, got {_shown(number)}")
        elif number > high:
            problems.append(f"expected {name} <= {high}, got {_shown(number)}")
        else:
            known[name] = number

    def real(name: str, fits: Callable[[float], bool], what: str, optional: bool = False) -> None:
        value = known[name]
        if optional and value is None:
            return
        try:
            number = math.nan if isinstance(value, str | bytes | bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if fits(number):
            known[name] = number
        else:
            problems.append(f"expected {what}, got {_shown(value)}")

    integer("max_new_tokens", 0, max(model.config.max_position_embeddings, _LONGEST) - prompt)
    integer("mtp_depth", 0, 2**10)
    integer("top_k", 1, optional=True)
    integer("prefill_chunk", 1, optional=True)
    integer("pad_token_id", -_INT64, optional=True)
    integer("seed", -_INT64, 2 * _INT64 - 1, optional=True)
    real("temperature", lambda value: 0 <= value < math.inf, "a finite temperature >= 0")
    real("top_p", lambda value: 0 < value <= 1, "top_p in (0, 1]", optional=True)
    if known["cache_format"] not in (None, "fp8"):
        problems.append(f"expected cache_format None or 'fp8', got {known['cache_format']!r}")
    if known["callback"] is not None and not callable(known["callback"]):
        problems.append(f"expected callback to be a function, got {known['callback']!r}")
    for name in ("compiled", "drop_finished", "record_routing", "return_logprobs", "return_report", "adaptive"):
        if not isinstance(known[name], bool) and not (name == "adaptive" and known[name] is None):
            problems.append(f"expected {name} to be True or False, got {known[name]!r}")
    if not problems:
        problems = _combinations(model, known)
    if problems:
        raise ValueError("; ".join(problems))
    return known


def _shown(value: Any) -> str:
    """Returns a value as it stands in a message: short, also for numbers of any size."""
    if isinstance(value, int) and abs(value) >= 10**15:
        return f"about {'-' if value < 0 else ''}10**{int(math.log10(2) * value.bit_length())}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _combinations(model: DeepseekLM, known: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with arguments that are right one by one."""
    problems = []
    if known["mtp_depth"] and not len(model.mtp):
        problems.append(
            "expected mtp_depth 0 for a model without multi-token-prediction modules (num_nextn_predict_layers 0, or "
            f"loaded with mtp=False), got {known['mtp_depth']}"
        )
    if known["compiled"] and known["mtp_depth"]:
        problems.append(f"expected mtp_depth 0 with compiled=True, got {known['mtp_depth']}")
    if known["compiled"] and known["drop_finished"]:
        problems.append("expected drop_finished=False with compiled=True, whose batch is fixed, got True")
    return problems


def end_tokens(model: DeepseekLM, eos_token_id: int | Iterable[int] | None, device: torch.device) -> Tensor:
    """Returns the tokens that end a row, int64 [n]: the argument, else the model's generation config, else its config.

    Raises:
        ValueError: not an integer, or not a list of them; or one of the argument's is outside the vocabulary.

    Warns:
        UserWarning: one of a config's is outside the vocabulary, so that no text ends with it.
    """
    given, source = eos_token_id, "the argument"
    if given is None:
        given, source = _from_generation_config(model, "eos_token_id"), "generation_config.json"
    if given is None:
        given, source = model.config.eos_token_id, "config.json"
    if given is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    ends: list[int] = []
    for each in _several(given):
        ends.append(_token(each, f"eos_token_id of {source}", given))
        if len(ends) > _LONGEST or (source == "the argument" and not 0 <= ends[-1] < model.config.vocab_size):
            break  # however many follow
    if len(ends) > _LONGEST:
        raise ValueError(f"expected at most {_LONGEST} eos_token_id, got more")
    outside = [each for each in ends if not 0 <= each < model.config.vocab_size]
    if outside:
        message = f"expected eos_token_id of {source} between 0 and {model.config.vocab_size - 1}, got {outside[0]}"
        if source == "the argument":
            raise ValueError(message)
        warnings.warn(f"{message}, which ends no text", stacklevel=5)  # past `generate` and its decorator
    return torch.tensor(ends, dtype=torch.int64, device=device)


def padding_token(model: DeepseekLM, pad_token_id: int | None, ends: Tensor) -> int:
    """Returns the token that fills finished rows: the argument, else a config's, else the first end token, else 0.

    It is never run, and need not be in the vocabulary.

    Raises:
        ValueError: it is no integer.
    """
    for pad in (pad_token_id, _from_generation_config(model, "pad_token_id"), model.config.pad_token_id):
        if pad is not None:
            return _token(pad, "pad_token_id", pad)
    return int(ends[0]) if len(ends) else 0


def _several(given: Any) -> Iterable[Any]:
    if isinstance(given, Tensor) and given.ndim == 0:
        return [given]
    return given if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]


def _token(value: Any, name: str, given: Any) -> int:
    """Returns one token of the value of an argument, `given`, as Python's integer."""
    try:
        token = as_integer(name, value)
    except ValueError:
        kind = "an integer or a list of integers" if name.startswith("eos") else "an integer"
        raise ValueError(f"expected {name} to be {kind}, got {_shown(given)}") from None
    if not -_INT64 <= token < _INT64:
        raise ValueError(f"expected {name} to be a token id, got {_shown(given)}")
    return token


def _from_generation_config(model: DeepseekLM, name: str) -> Any:
    """A field of `model.generation_config`, which loading sets where the folder has a generation_config.json."""
    settings = getattr(model, "generation_config", None)
    return settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)
