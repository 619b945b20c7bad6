"""Checks before anything is trained, each with one clear error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["check_lengths", "check_tokenizer", "require"]


def require(package: str, extra: str = "r1") -> Any:
    """Imports `package`.

    Raises:
        ImportError: it is missing; the message says which extra has it.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'expected {package}, got none: pip install "deepseek-arch[{extra}]"') from error


def check_tokenizer(tokenizer: Any, tags: Sequence[str] = ()) -> None:
    """Raises ValueError for a tokenizer that reinforcement learning cannot work with.

    It needs an end token and another one for padding: where they are the same, an end that was sampled cannot be told
    from padding (TRAPS T9). And `tags` have to survive decoding: as special tokens they vanish from the texts that
    rewards read (TRAPS T8).
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("expected a tokenizer with an end token, got one without eos_token")
    if tokenizer.pad_token_id is None:
        raise ValueError("expected a tokenizer with a pad token, got one without pad_token")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"expected a tokenizer with a pad token other than its end token, got {tokenizer.pad_token!r} for both"
        )
    for tag in tags:
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if decoded != tag:
            raise ValueError(
                f"expected a tokenizer that decodes {tag!r} as it was encoded, got {decoded!r}: add it with "
                "special=False"
            )


def check_lengths(prompt: int, completion: int, positions: int | None) -> None:
    """Raises ValueError where the longest prompt and completion do not fit the model's positions."""
    if positions is not None and prompt + completion > positions:
        raise ValueError(
            f"expected prompts and completions of at most {positions} tokens together, got {prompt} and {completion}"
        )
