"""Text in and out of the command line, for checkpoints that bring a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.json_format import parse_json, read_text

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TokenPrinter", "Tokenizer"]


class Tokenizer:
    """A checkpoint's own tokenizer, whichever library can read it."""

    def __init__(self, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]) -> None:
        self.encode = encode
        self.decode = decode

    @classmethod
    def of(cls, checkpoint: Path, needed: bool = True) -> Tokenizer | None:
        """Reads the tokenizer in a checkpoint folder; None if there is none.

        Args:
            needed: False for token ids, which a tokenizer only shows as text: None then also for one that cannot be
                read, or not without running code of the checkpoint, which is not tried.

        Raises:
            ImportError: there is one, and neither transformers nor tokenizers is installed.
            ValueError: it cannot be read without running code of the checkpoint.
        """
        file = checkpoint / "tokenizer.json"
        if not file.is_file() and not (checkpoint / "tokenizer_config.json").is_file():
            return None
        if not needed and (not file.is_file() or _has_code(checkpoint)):
            return None
        try:
            return cls._read(checkpoint)
        except Exception:  # of three libraries, one of which raises nothing more special
            if needed:
                raise
            return None

    @classmethod
    def _read(cls, checkpoint: Path) -> Tokenizer:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            return cls._from_file(checkpoint / "tokenizer.json")
        if _has_code(checkpoint):
            raise ValueError(
                f"expected a tokenizer without code of its own in {str(checkpoint)!r}, got tokenizer_config.json with "
                "auto_map, and code from a checkpoint is never run; give token ids with --ids"
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        return cls(tokenizer.encode, tokenizer.decode)

    @classmethod
    def _from_file(cls, file: Path) -> Tokenizer:
        try:
            import tokenizers
        except ImportError:
            raise ImportError(
                "expected transformers or tokenizers to be installed, to read the checkpoint's tokenizer"
            ) from None
        if not file.is_file():
            raise ValueError(f"expected {str(file)!r}; without transformers no other tokenizer file can be read")
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        return cls(lambda text: tokenizer.encode(text).ids, tokenizer.decode)


def _has_code(checkpoint: Path) -> bool:
    """Returns True if the tokenizer is a class in a file of the checkpoint."""
    try:
        text = read_text(checkpoint / "tokenizer_config.json")
    except FileNotFoundError:
        return False
    return "AutoTokenizer" in (parse_json(text).get("auto_map") or ())


class TokenPrinter:
    """Prints tokens as they come: text if there is a tokenizer, numbers otherwise.

    A character of several tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer | None, write: Callable[[str], Any] | None) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._ids: list[int] = []
        self._printed = ""

    def __call__(self, new: Tensor) -> None:
        """Takes the next token of the only row, int64 [1]."""
        self._ids.append(int(new[0]))
        text = self._text()
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """Prints what was held back, and a newline."""
        self._show(self._text() + "\n")

    def _text(self) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, self._ids))
        return self._tokenizer.decode(self._ids)

    def _show(self, text: str) -> None:
        if self._write is not None:
            self._write(text[len(self._printed) :])
        self._printed = text
