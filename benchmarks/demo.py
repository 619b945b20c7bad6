"""Demonstration of the package in one minute on a laptop's CPU: `python -m benchmarks.demo`, or `make demo`.

The exit status is 1 if the models do not agree.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.cli.memory_plan import plan_memory
from deepseek_arch.cli.tables import print_plan
from deepseek_arch.layout.accounting import expanded_cache_bytes

from .core.report import NATIVE, OURS
from .core.timing import interleave
from .models.actions import decode_actions
from .models.contestants import PARITY, check_same_logits, comparable, native_twin, random_model

NEW_TOKENS = 24
CONTEXT = 8192

console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def main() -> int:
    """Runs every step and returns the exit status."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="deepseek-arch-demo-") as name:
        folder = Path(name)
        config = write(folder / "fp8")
        model, tokens = generate(folder / "fp8", config)
        agreed = agree(folder, model, tokens)
    cache_size(config)
    agreed &= decode_speed()
    title("6. The memory of DeepSeek-V3 itself (`deepseek-arch plan deepseek-v3`)")
    print_plan("deepseek-v3", plan_memory(da.DeepseekConfig.from_pretrained("deepseek-v3")))
    verdict = "[green]Everything agreed.[/green]" if agreed else "[red]The models do not agree: see above.[/red]"
    console.print(f"\n{verdict} {time.perf_counter() - started:.0f} s.")
    return 0 if agreed else 1


def title(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def write(folder: Path) -> da.DeepseekConfig:
    title("1. A tiny checkpoint in the layout that DeepSeek-V3 was published in, random weights")
    config = da.DeepseekConfig.from_pretrained("tiny")
    # The weights are larger than at the start of a training, so that every layer affects the next token.
    saved = write_checkpoint(folder, config, "fp8", shards=4, std=0.08)
    checkpoint = da.inspect_checkpoint(folder)
    console.print(
        f"   {len(checkpoint.tensors)} tensors in {len(checkpoint.shards)} safetensors files, {saved.nbytes:,} bytes;"
    )
    console.print(f"   {saved.quantized} in FP8, one float32 scale per block of 128 x 128, partial at the edges;")
    console.print(f"   {config.num_hidden_layers} decoder layers and one MTP module.")
    return config


def generate(folder: Path, config: da.DeepseekConfig) -> tuple[Any, Tensor]:
    title("2. AutoModelForCausalLM reads it after deepseek_arch.hf.register(), and generates")
    from transformers import AutoModelForCausalLM

    import deepseek_arch.hf as dhf

    dhf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    dhf.unregister()
    prompt = torch.arange(2, 18)[None]
    tokens = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    console.print(f"   class {type(model).__module__}.{type(model).__name__}, its FP8 weights kept as they are")
    console.print(f"   prompt {prompt[0].tolist()}")
    console.print(f"   new tokens {tokens[0, prompt.shape[1] :].tolist()}")
    return model, tokens


def agree(folder: Path, model: Any, tokens: Tensor) -> bool:
    title("3. Agreement with transformers' own DeepseekV3ForCausalLM, in float32")
    from transformers import DeepseekV3ForCausalLM

    console.print(
        "   on a BF16 copy written by deepseek_arch.save (its FP8 reader takes no partial blocks, seen in 5.23)"
    )
    core = da.load(folder / "fp8", fp8="dequantize")
    da.save(core, folder / "bf16")
    again = da.load(folder / "bf16").state_dict()
    exact = all(torch.equal(tensor, again[name]) for name, tensor in core.state_dict().items())
    console.print(f"   the copy, loaded again, has the same bits: {_mark(exact)}")
    model = model.dequantize().float().eval()
    native = DeepseekV3ForCausalLM.from_pretrained(folder / "bf16", dtype=torch.float32).eval()
    with torch.inference_mode():
        ours, theirs = model(tokens).logits, native(tokens).logits
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    close = error <= PARITY
    console.print(f"   largest difference of logits, relative: {error:.1e}, at most {PARITY:.0e}: {_mark(close)}")
    prompt = tokens[:, :-NEW_TOKENS]
    chosen = [
        one.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None) for one in (model, native)
    ]
    same = torch.equal(*chosen)
    console.print(f"   the same {NEW_TOKENS} greedy tokens: {_mark(same)}")
    return exact and close and same


def cache_size(config: da.DeepseekConfig) -> None:
    title("4. The cache: latents for all heads together, instead of keys and values for each")
    cache = da.DeepseekLM(config, dtype=torch.bfloat16).new_cache(1, capacity=1024)
    console.print(f"   tiny: {cache.nbytes:,} bytes held for 1,024 tokens in bfloat16")
    for name in ("tiny", "deepseek-v2-lite", "deepseek-v3"):
        c = da.DeepseekConfig.from_pretrained(name)
        latent, expanded = da.kv_cache_bytes(c), expanded_cache_bytes(c)
        times = expanded / latent
        console.print(f"   {name}: {latent:,} bytes a token; expanded {expanded:,}, {times:.1f} times as many")


def decode_speed() -> bool:
    title(f"5. Decoding on a context of {CONTEXT:,} tokens, against transformers on the same weights")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "vocab_size": 4096}
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 16}
    routing = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
    v3 = comparable(da.DeepseekConfig.from_pretrained("deepseek-v3"))
    config = v3.replace(**sizes, **layers, **routing, q_lora_rank=256, dtype="float32")
    model = random_model(config, torch.float32)
    twin = native_twin(model)
    try:
        difference = check_same_logits(model, twin)
    except ValueError as error:
        console.print(f"   [red]{error}[/red]")
        return False
    console.print("   V3's head sizes and cache, 16 heads, 2 layers, hidden size 512, float32, random weights")
    console.print(f"   logits of both agree to {difference:.1e}, prompt and single tokens")
    seconds = interleave(decode_actions(model, twin, CONTEXT, 8), rounds=5, warmup=1, budget_s=20)
    ours, theirs = (seconds[name].median for name in (OURS, NATIVE))
    runs, threads = len(seconds[NATIVE].values), torch.get_num_threads()
    console.print(f"   ours {1e3 * ours:.1f} ms a token, transformers {1e3 * theirs:.0f} ms (medians of {runs})")
    console.print(f"   [bold]{theirs / ours:.1f} times as fast[/bold], on this machine and {threads} of its threads")
    return True


def _mark(passed: bool) -> str:
    return "[green]yes[/green]" if passed else "[red]NO[/red]"


if __name__ == "__main__":
    sys.exit(main())
