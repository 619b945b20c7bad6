"""Commands that run a model: generate, probe-mtp."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..config.locations import explain_no_folder
from .options import Checkpoint, Device, DType, Json, parse_numbers, print_json

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

__all__ = ["generate", "probe"]

_MOST_TOKENS = 10_000_000  # of a reply; the context of a model is shorter


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text; needs a tokenizer in the folder.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids instead of text: 0,17,4.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, max=_MOST_TOKENS, help="Most tokens to add.")
    ] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the so many best tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw from the best tokens that sum to this.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")] = None,
    mtp_depth: Annotated[int, typer.Option(min=0, help="Draft up to so many tokens a step with the MTP modules.")] = 0,
    fp8: Annotated[Literal["keep", "dequantize"], typer.Option(help="What to do with FP8 weights.")] = "keep",
    device: Device = "cpu",
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, given as text or as token ids; new tokens are printed as they come."""
    from .tokenizer import Tokenizer, TokenPrinter

    if (prompt is None) == (ids is None):
        raise typer.BadParameter("expected either --prompt or --ids", param_hint="--prompt / --ids")
    tokenizer = Tokenizer.of(checkpoint, needed=ids is None)
    tokens = list(parse_numbers(ids, "--ids")) if ids is not None else _encode(tokenizer, prompt or "", checkpoint)

    import torch

    from ..checkpoint import load
    from ..generation.entry import generate as continue_prompt

    model = load(checkpoint, device=device, dtype=dtype, fp8=fp8, mtp=mtp_depth > 0)
    printer = TokenPrinter(tokenizer, None if as_json else partial(typer.echo, nl=False))
    started = time.perf_counter()
    out, report = continue_prompt(
        model,
        torch.tensor([tokens], device=device),
        max_new_tokens=max_new_tokens,
        mtp_depth=mtp_depth,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        callback=printer,
        return_report=True,
    )
    seconds = time.perf_counter() - started
    new = out[0, len(tokens) :].tolist()
    if as_json:
        text = None if tokenizer is None else tokenizer.decode(new)
        drafts = {"acceptance": report.acceptance} if mtp_depth else {}
        print_json({"prompt_ids": tokens, "new_ids": new, "text": text, "seconds": seconds, **drafts})
    else:
        printer.end()
        drafted = f"; {report}" if mtp_depth else ""
        typer.echo(f"{len(new)} tokens in {seconds:.2f} s{drafted}", err=True)


def probe(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text; needs a tokenizer in the folder.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids instead of text: 0,17,4.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=2, max=_MOST_TOKENS, help="Tokens to add.")
    ] = 64,
    mtp_depth: Annotated[int, typer.Option(min=1, help="Tokens to draft a step.")] = 2,
    device: Device = "cpu",
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Measure which inputs the MTP modules were trained with, by how many of their drafts are accepted."""
    from .tokenizer import Tokenizer

    if (prompt is None) == (ids is None):
        raise typer.BadParameter("expected either --prompt or --ids", param_hint="--prompt / --ids")
    tokens = (
        list(parse_numbers(ids, "--ids"))
        if ids is not None
        else _encode(Tokenizer.of(checkpoint), prompt or "", checkpoint)
    )
    import torch

    from ..checkpoint import load
    from ..generation.mtp_probe import probe_mtp

    model = load(checkpoint, device=device, dtype=dtype)
    probes = probe_mtp(model, torch.tensor([tokens], device=device), None, max_new_tokens, mtp_depth)
    if as_json:
        print_json([asdict(probe) for probe in probes])
    else:
        for probe in probes:
            typer.echo(probe)


def _encode(tokenizer: Tokenizer | None, prompt: str, checkpoint: Path) -> list[int]:
    if not checkpoint.is_dir():
        raise ValueError(f"expected a checkpoint folder, got {str(checkpoint)!r}{explain_no_folder(checkpoint)}")
    if tokenizer is None:
        raise ValueError(
            f"expected a tokenizer in {str(checkpoint)!r} for --prompt, found no tokenizer.json or "
            "tokenizer_config.json; give token ids with --ids"
        )
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError("expected a prompt of at least one token, got an empty one")
    return tokens
