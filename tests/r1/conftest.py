"""Tiny policies in folders, with a tokenizer that has DeepSeek's tokens and tags."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # small_models, however pytest is started


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars, and nothing stays registered with transformers."""
    if "transformers" not in sys.modules:
        yield
        return
    import transformers

    import deepseek_arch.hf as dhf

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    yield
    dhf.unregister()


@pytest.fixture(scope="session")
def tag_tokenizer() -> Any:
    """One word a token, for the 61 tokens of the small models: pad, end, tags, and 53 words."""
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    words = ["<pad>", "<end>", "<unk>", *tags, *(str(i) for i in range(10)), *(f"w{i}" for i in range(44))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="left"
    )


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, tag_tokenizer: Any) -> Callable[..., str]:
    """(kind, config changes) -> a folder with a model and the tokenizer; the same one for the same arguments."""
    import deepseek_arch as da
    from support import small_models

    made: dict[str, str] = {}

    def make(kind: str = "v3", **changes: Any) -> str:
        key = f"{kind} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("policy")
            config = small_models.config(kind, **({"pad_token_id": 0, "eos_token_id": 1} | changes))
            da.save(small_models.model(config), folder)
            tag_tokenizer.save_pretrained(folder)
            made[key] = str(folder)
        return made[key]

    return make


@pytest.fixture
def prompts() -> Callable[[int], list[dict[str, Any]]]:
    """count -> rows of a training set, with prompts of different length."""

    def make(count: int) -> list[dict[str, Any]]:
        rng = random.Random(0)
        return [
            {"prompt": " ".join(f"w{rng.randrange(44)}" for _ in range(2 + i % 4)), "answer": str(i % 10)}
            for i in range(count)
        ]

    return make
