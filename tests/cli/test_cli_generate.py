"""`deepseek-arch generate` and `probe-mtp`: tokens as the library gives them, and text by any tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import deepseek_arch
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.cli.tokenizer import Tokenizer, TokenPrinter
from deepseek_arch.config.deepseek_config import DeepseekConfig

# -------------------------------------------------------------------- generate


def expected_tokens(folder: Path, prompt: list[int], fp8: str = "keep", **options) -> list[int]:
    model = deepseek_arch.load(folder, fp8=fp8, mtp=False)
    return deepseek_arch.generate(model, torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def test_generate_from_token_ids(cli, stored):
    expected = expected_tokens(stored, [5, 7, 9], max_new_tokens=6)
    code, out, err = cli("generate", stored, "--ids", "5, 7 9", "-n", 6)
    assert code == 0 and [int(token) for token in out.split()] == expected
    assert f"{len(expected)} tokens in" in err
    _, out, _ = cli("generate", stored, "--ids", "5,7,9", "-n", 6, "--json")
    assert json.loads(out)["prompt_ids"] == [5, 7, 9] and json.loads(out)["new_ids"] == expected


def test_generate_with_drafts_and_from_dequantized_weights(cli, stored):
    expected = expected_tokens(stored, [5, 7, 9], max_new_tokens=6)
    code, out, err = cli("generate", stored, "--ids", "5,7,9", "-n", 6, "--mtp-depth", 2)
    assert code == 0 and [int(token) for token in out.split()] == expected and "acceptance" in err
    _, out, _ = cli("generate", stored, "--ids", "5,7,9", "-n", 6, "--mtp-depth", 1, "--json")
    assert json.loads(out)["new_ids"] == expected and len(json.loads(out)["acceptance"]) <= 1
    expected = expected_tokens(stored, [5, 7, 9], fp8="dequantize", max_new_tokens=6)
    _, out, _ = cli("generate", stored, "--ids", "5,7,9", "-n", 6, "--fp8", "dequantize")
    assert [int(token) for token in out.split()] == expected


def test_probe_of_the_prediction_layers(cli, stored):
    code, out, _ = cli("probe-mtp", stored, "--ids", "5,7,9", "-n", 8)
    assert code == 0 and out.count("accepted") == 4 and out.count("(as configured)") == 1
    _, out, _ = cli("probe-mtp", stored, "--ids", "5,7,9", "-n", 8, "--mtp-depth", 1, "--json")
    assert {(p["mtp_input"], p["mtp_chain"]) for p in json.loads(out)} == {
        (a, b) for a in ("post_norm", "pre_norm") for b in ("block", "head_norm")
    }


def test_generate_by_sampling(cli, stored):
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 3}
    expected = expected_tokens(stored, [1, 2], max_new_tokens=5, **options)
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    _, out, _ = cli("generate", stored, "--ids", "1,2", "-n", 5, *flags)
    assert [int(token) for token in out.split()] == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ids", "1,512"), "between 0 and 511, got 512"),
        (("--prompt", "hello"), "give token ids with --ids"),
        (("--ids", "1", "--device", "no-such-device"), "expected an available device"),
        (("--ids", "1", "--top-p", "0", "--temperature", "1"), "top_p"),
    ],
)
def test_generations_that_cannot_be(cli, stored, args, message):
    code, out, err = cli("generate", stored, *args)
    assert code == 1 and message in err and out.strip() == ""


def test_generate_from_a_broken_checkpoint(cli, checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    code, _, err = cli("generate", checkpoint, "--ids", "1")
    assert code == 1 and shard.name in err


def words() -> dict[str, int]:
    return {"<unk>": 0, **{f"w{index}": index for index in range(1, 512)}}


@pytest.mark.parametrize("library", ["transformers", "tokenizers"])
def test_generate_text(cli, checkpoint, monkeypatch, library):
    """With the folder's own tokenizer, by transformers if installed and else by tokenizers alone."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel(words(), unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if library == "transformers":
        pytest.importorskip("transformers")
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    expected = expected_tokens(checkpoint, [5, 7], max_new_tokens=4)
    code, out, _ = cli("generate", checkpoint, "--prompt", "w5 w7", "-n", 4)
    assert (code, out) == (0, " ".join(f"w{token}" for token in expected) + "\n")
    code, _, err = cli("generate", checkpoint, "--prompt", "")
    assert code == 1 and "at least one token" in err


def with_remote_code(folder: Path) -> None:
    """As Moonlight and Kimi-K2 come: a tokenizer that is code of the checkpoint."""
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_moonshot.py").write_text("raise SystemExit('code of the checkpoint ran')")


@pytest.mark.parametrize("tokenizer", [None, "{}", "not even JSON"])
def test_token_ids_need_no_tokenizer(cli, checkpoint, tokenizer):
    """One that is code of the checkpoint, or broken, is not touched; the ids come back as numbers."""
    if tokenizer is None:
        with_remote_code(checkpoint)
    else:
        (checkpoint / "tokenizer.json").write_text(tokenizer)
    code, out, err = cli("generate", checkpoint, "--ids", "3,1,4", "-n", 3, "--json")
    assert code == 0, err
    assert json.loads(out)["text"] is None and len(json.loads(out)["new_ids"]) == 3


def test_text_for_a_tokenizer_of_code_is_refused(cli, checkpoint):
    with_remote_code(checkpoint)
    code, out, err = cli("generate", checkpoint, "--prompt", "hello", "-n", 3)
    assert code == 1 and out == ""
    assert "code from a checkpoint is never run; give token ids with --ids" in err


def test_the_end_tokens_of_generation_config_end_a_text(cli, checkpoint):
    arguments = ("generate", checkpoint, "--ids", "3,1,4", "-n", 8, "--json")
    free = json.loads(cli(*arguments)[1])["new_ids"]
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[2]]}))
    assert json.loads(cli(*arguments)[1])["new_ids"] == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("how", [("--ids", "1,2"), ("--prompt", "hello")])
@pytest.mark.parametrize("command", ["generate", "probe-mtp", "inspect", "convert"])
def test_names_of_the_hub_are_refused_with_what_to_do(cli, command, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = {"inspect": (), "convert": ("out", "--to", "bf16")}.get(command, how)
    code, _, err = cli(command, "moonshotai/Kimi-K2-Instruct", *rest)
    assert code == 1 and "hf download moonshotai/Kimi-K2-Instruct --local-dir Kimi-K2-Instruct" in err


def test_probing_a_model_without_mtp_modules_says_so(cli, tmp_path):
    write_checkpoint(tmp_path, DeepseekConfig.from_pretrained("tiny").replace(num_nextn_predict_layers=0))
    code, _, err = cli("probe-mtp", tmp_path, "--ids", "1,2,3")
    assert code == 1 and "expected a model with MTP modules to probe, got one without" in err


def test_text_without_any_tokenizer_library(cli, checkpoint, monkeypatch):
    (checkpoint / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, err = cli("generate", checkpoint, "--prompt", "w5")
    assert code == 1 and "transformers or tokenizers to be installed" in err


def test_a_character_of_several_tokens_is_printed_whole():
    text = "aé€z"
    tokenizer = Tokenizer(list, lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    pieces: list[str] = []
    printer = TokenPrinter(tokenizer, pieces.append)
    for byte in text.encode():
        printer(torch.tensor([byte]))
    printer.end()
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "z", "\n"]


def test_text_that_ends_inside_a_character_is_printed_as_it_is():
    pieces: list[str] = []
    printer = TokenPrinter(Tokenizer(list, lambda ids: bytes(ids).decode("utf-8", errors="replace")), pieces.append)
    printer(torch.tensor(["€".encode()[0]]))
    printer.end()
    assert "".join(pieces) == "\ufffd\n"
