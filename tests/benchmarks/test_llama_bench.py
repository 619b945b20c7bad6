"""llama.cpp as a contestant: its program's output, its failures, and the file that it reads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import deepseek_arch as da
from benchmarks.cli.commands import main
from benchmarks.core.report import Samples
from benchmarks.models.contestants import comparable, random_model
from benchmarks.models.gguf_file import write_gguf
from benchmarks.models.llama_bench import LlamaBench


def program(path: Path, body: str) -> LlamaBench:
    path.write_text(f"#!{sys.executable}\nimport json, sys, time\n{body}\n")
    path.chmod(0o755)
    return LlamaBench(str(path), str(path), threads=2, limit_s=20.0)


def test_a_sample_is_the_time_of_one_token_or_of_the_prompt(tmp_path):
    body = 'assert sys.argv[3:7] == ["-t", "2", "-fa", "1"]; print(json.dumps([{"samples_ns": [4e9, 8e9]}]))'
    bench = program(tmp_path / "llama-bench", body)
    assert bench.decode(512, tokens=4, rounds=2) == Samples((1.0, 2.0))
    assert bench.prefill(2048, rounds=2) == Samples((4.0, 8.0))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('sys.exit("no such architecture")', "failed with exit status 1: no such architecture"),
        ("print('no JSON')", "expected the samples of one test, got JSONDecodeError"),
        ("print('[]')", "expected the samples of one test, got IndexError"),
        ('print(json.dumps([{"samples_ns": []}]))', "expected the samples of one test, got ValueError"),
    ],
)
def test_a_failure_is_a_remark(tmp_path, body, reason):
    result = program(tmp_path / "llama-bench", body).prefill(8, rounds=1)
    assert isinstance(result, str)
    assert reason in result


def test_a_slow_program_is_stopped(tmp_path):
    bench = program(tmp_path / "llama-bench", "time.sleep(60)")
    object.__setattr__(bench, "limit_s", 0.5)
    assert bench.prefill(8, rounds=1) == "llama.cpp stopped after 0 s"


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"got no file .*absent"):
        LlamaBench(str(tmp_path / "absent"), str(tmp_path / "absent"), threads=1, limit_s=1.0)


# ------------------------------------------------------------------ the file


def values_of(tensor) -> torch.Tensor:
    """The values of a tensor that a GGUF file holds as float32 or BF16."""
    data = torch.from_numpy(tensor.data.copy())
    return data if data.dtype == torch.float32 else data.view(torch.bfloat16).float()


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("preset", ["tiny", "deepseek-v2-lite"])
def test_a_gguf_file_has_every_tensor_to_the_bit(tmp_path, preset, kind):
    gguf = pytest.importorskip("gguf")
    config = comparable(da.DeepseekConfig.from_pretrained(preset)).replace(
        num_hidden_layers=2, vocab_size=96, hidden_size=64, intermediate_size=96, n_routed_experts=8
    )
    model = random_model(config, torch.float32 if kind == "fp32" else torch.bfloat16)
    write_gguf(model, tmp_path / "model.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: values_of(tensor) for tensor in reader.tensors}
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}

    assert sum(tensor.numel() for tensor in found.values()) == sum(tensor.numel() for tensor in state.values())
    assert torch.equal(found["output.weight"], state["lm_head.weight"])
    expanded = state["model.layers.0.self_attn.kv_b_proj.weight"].unflatten(0, (config.num_attention_heads, -1))
    assert torch.equal(found["blk.0.attn_k_b.weight"], expanded[:, : config.qk_nope_head_dim].mT)
    assert torch.equal(found["blk.0.attn_v_b.weight"], expanded[:, config.qk_nope_head_dim :])
    moe = 1
    gate_up = state[f"model.layers.{moe}.mlp.experts.gate_up_proj"]
    ours = torch.cat([found[f"blk.{moe}.ffn_gate_exps.weight"], found[f"blk.{moe}.ffn_up_exps.weight"]], dim=1)
    assert torch.equal(ours, gate_up)
    assert torch.equal(found[f"blk.{moe}.ffn_gate_inp.weight"], state[f"model.layers.{moe}.mlp.gate.weight"])

    def field(name: str):
        return reader.fields[f"deepseek2.{name}"].contents()

    assert field("block_count") == 2
    assert field("attention.key_length") == config.latent_dim
    assert field("expert_used_count") == config.num_experts_per_tok
    if config.yarn is not None:
        assert field("rope.scaling.yarn_log_multiplier") == pytest.approx(0.1 * config.yarn.mscale_all_dim)


def test_q8_0_is_near_the_values(tmp_path):
    gguf = pytest.importorskip("gguf")
    config = comparable(da.DeepseekConfig.from_pretrained("tiny")).replace(num_hidden_layers=1)
    model = random_model(config, torch.bfloat16)
    write_gguf(model, tmp_path / "model.gguf", "q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    head = tensors["output.weight"]
    assert head.tensor_type.name == "Q8_0"
    values = torch.from_numpy(gguf.quants.dequantize(head.data, head.tensor_type))
    expected = model.lm_head.weight.detach().float()
    # A block's largest value has 127 codes, and a value is off by half of one; the scale itself is a float16.
    allowed = expected.abs().max() / 127 * (0.5 + 127 * 2**-11)
    assert (values - expected).abs().max() <= allowed


def test_the_command_writes_a_file(tmp_path, capsys):
    pytest.importorskip("gguf")
    out = tmp_path / "tiny.gguf"
    assert main(["gguf", "--preset", "tiny", "--layers", "1", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert out.read_bytes()[:4] == b"GGUF"
    assert main(["gguf", "--preset", "tiny", "--layers", "0", "--out", str(out)]) == 2


def test_what_llama_cpp_does_not_describe_is_refused(tmp_path):
    config = comparable(da.DeepseekConfig.from_pretrained("tiny")).replace(num_hidden_layers=1)
    for wrong, reason in (
        ({"tie_word_embeddings": True}, "tied embeddings"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "plain or YaRN rotation"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_gguf(random_model(config.replace(**wrong), torch.float32), tmp_path / "model.gguf", "fp32")
    with pytest.raises(ValueError, match="expected a kind among"):
        write_gguf(random_model(config, torch.float32), tmp_path / "model.gguf", "q4")
