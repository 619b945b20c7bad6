"""Mutated config files: each one is read and means what it says, or is refused by an error that names the field.

Seeded. A few hundred cases run with every test run, ten thousand with `-m fuzz`.
"""

from __future__ import annotations

import copy
import dataclasses
import decimal
import fractions
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_arch.cli.memory_plan import plan_memory
from deepseek_arch.config.deepseek_config import ConfigError, DeepseekConfig
from deepseek_arch.config.presets import read_preset

NAMES = ("tiny", "deepseek-v3", "deepseek-v2-lite", "glm-4.7-flash", "kimi-k2-instruct", "deepseek-v3.2")
BASES = {name: json.loads(read_preset(name)) for name in NAMES}
DEEP = "[" * 2000 + "]" * 2000
# Raw JSON, as a file may have it anywhere.
VALUES = (
    *("null", "true", "false", "0", "-1", "1", "2", "3", "7", "0.5", "-0.0", "1e400", "-1e400", "NaN", "Infinity"),
    *("1" + "0" * 30, "1" + "0" * 400, "1" + "0" * 5000, "-1" + "0" * 400, "2147483648", "9223372036854775808"),
    *('""', '"8"', '"silu"', '"\\ud800"', '"\\u0000"', '"\u202e\U0001f4a9"', '"bfloat16"', "1e-400", "1000000007"),
    *("[]", "[1]", "[null]", "[[]]", "[1,2]", "[[1,2],[3]]", "{}", '{"a":1}', '{"rope_type":"yarn"}', DEEP),
    '{"type":"yarn","factor":40}',
)
SMALL = ("0", "1", "2", "3", "4", "5", "6", "8", "16", "17", "32", "64", "null", "1.5", "-1", "true")
OTHERS = (
    *("torch_dtype", "rope_parameters", "mlp_layer_types", "layer_types", "num_experts", "num_local_experts"),
    *("num_mtp_layers", "mlp_bias", "pretraining_tp", "rope_interleave", "partial_rotary_factor", "head_dim"),
    *("qk_head_dim", "use_mla", "auto_map", "transformers_version", "ep_size", "use_cache"),
)
FIELDS = sorted({field.name for field in dataclasses.fields(DeepseekConfig)} | set(OTHERS))
NESTED = {
    "rope_scaling": ("type", "rope_type", "factor", "beta_fast", "mscale", "attention_factor", "rope_theta", "unknown"),
    "rope_parameters": ("type", "rope_type", "factor", "rope_theta", "partial_rotary_factor", "mscale"),
    "quantization_config": ("quant_method", "weight_block_size", "fmt", "activation_scheme", "scale_fmt"),
}
LONGEST = 2.0  # seconds of one thread


def use(folder: Path, text: str | bytes) -> bool:
    """Reads a config file, writes it and computes with it; returns False where it is refused as it should be."""
    file = folder / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    started = time.thread_time()
    try:
        config = DeepseekConfig.from_pretrained(file)
    except ConfigError as error:
        assert len(str(error)) < 5000, "the message is a page long"
        assert "expected" in str(error) or "missing" in str(error), error
        assert time.thread_time() - started < LONGEST
        return False
    written = json.dumps(config.to_dict())
    assert DeepseekConfig.from_dict(config.to_dict()) == config
    if "NaN" not in written:
        assert DeepseekConfig.from_dict(json.loads(written)) == config
    json.dumps(plan_memory(config).to_dict())
    assert time.thread_time() - started < LONGEST
    return True


def with_value(base: dict, key: str, value: str, inner: str | None = None) -> str:
    """The text of `base` with the raw JSON `value` under `key`, or under `inner` of it."""
    changed = copy.deepcopy(base)
    if key == "rope_parameters":  # a file has the one or the other
        changed.pop("rope_scaling", None)
    if inner is None:
        changed[key] = "@@"
    else:
        own = {"type": "yarn", "factor": 40} if key.startswith("rope") else {"quant_method": "fp8"}
        changed[key] = (changed[key] if isinstance(changed.get(key), dict) else own) | {inner: "@@"}
    return json.dumps(changed).replace('"@@"', value, 1)


def random_case(rng: random.Random) -> str | bytes:
    """One mutated config file."""
    kind = rng.random()
    base = BASES["tiny" if rng.random() < 0.8 else rng.choice(NAMES)]
    if kind < 0.3:
        return with_value(base, rng.choice(FIELDS), rng.choice(VALUES))
    if kind < 0.5:
        key = rng.choice(sorted(NESTED))
        return with_value(base, key, rng.choice(VALUES), rng.choice(NESTED[key]))
    if kind < 0.8:
        chosen = {key: rng.choice(SMALL if rng.random() < 0.9 else VALUES) for key in rng.sample(FIELDS, 2)}
        text = json.dumps(base | {key: f"@@{key}@@" for key in chosen})
        for key, value in chosen.items():
            text = text.replace(f'"@@{key}@@"', value, 1)
        return text
    if kind < 0.9:
        return json.dumps({key: value for key, value in base.items() if key != rng.choice(sorted(base))})
    text = bytearray(json.dumps(base).encode())
    for _ in range(rng.randint(1, 4)):
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text[: rng.randrange(len(text))] if rng.random() < 0.2 else text)


def run(folder: Path, cases: int, seed: int) -> None:
    rng = random.Random(seed)
    outcomes = [use(folder, random_case(rng)) for _ in range(cases)]
    # Mutations that never fail, or always, would try nothing.
    assert 0.2 * cases < sum(outcomes) < 0.8 * cases


def test_mutated_files(tmp_path):
    run(tmp_path, 600, seed=0)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_mutated_files(tmp_path, seed):
    run(tmp_path, 1000, seed)


TINY = read_preset("tiny")
BODY = json.dumps(BASES["tiny"])[:-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ("[" * 100_000 + "]" * 100_000, "at most 100 levels"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "at most 100 levels"),
        (BODY + ',"zzz":' + "[" * 900 + "]" * 900 + "}", "at most 100 levels deep, got more in zzz"),
        (b"\xef\xbb\xbf" + TINY.encode(), "BOM"),
        (TINY.encode("utf-16"), "expected JSON in UTF-8"),
        (b"\0" * 100, "expected JSON"),
        (
            BODY + ',"hidden_size":1' + "0" * 5000 + "}",
            "hidden_size to be an integer of at most 4000 digits, got one of",
        ),
        (BODY + ',"extra":{"a":[1' + "0" * 5000 + "]}}", "extra.a to be an integer of at most 4000 digits"),
        (BODY + ',"num_hidden_layers":1e400}', "num_hidden_layers to be an integer >= 1, got inf"),
        (BODY + ',"num_hidden_layers":1000000000}', "num_hidden_layers to be an integer <= 10000, got 1000000000"),
        (BODY + ',"num_nextn_predict_layers":1000000000}', "num_nextn_predict_layers to be an integer <= 10000"),
        (BODY + ',"n_routed_experts":1000000000}', "n_routed_experts to be an integer <= 100000"),
        (BODY + ',"rms_norm_eps":1' + "0" * 400 + "}", "rms_norm_eps to be a finite number >= 0, got an integer of"),
        (BODY + ',"rope_theta":1' + "0" * 400 + "}", "rope_theta to be a finite number >= 0, got an integer of"),
        (BODY + ',"model_type":[]}', r"model_type to be one of .*, got \[\]"),
        (BODY + ',"architectures":1}', "architectures to be a list of names, got 1"),
        (BODY + ',"architectures":[1]}', r"architectures to be a list of names, got \[1\]"),
        (BODY + ',"extra":1}', "extra to be a mapping, got 1"),
        (BODY + ',"mlp_layer_types":1}', "mlp_layer_types to be a list, got 1"),
        (BODY + ',"eos_token_id":"</s>"}', "eos_token_id to be an integer >= 0, got '</s>'"),
        (BODY + ',"eos_token_id":[1,"x"]}', r"eos_token_id to be a list of token ids, got \[1, 'x'\]"),
        (BODY + ',"bos_token_id":1.5}', "bos_token_id to be an integer >= 0, got 1.5"),
        (BODY + ',"pad_token_id":true}', "pad_token_id to be an integer >= -1, got True"),
        (BODY + ',"seq_aux":1}', "seq_aux to be true or false, got 1"),
        (BODY + ',"use_mla":false}', "use_mla to be True, got False"),
        (BODY + ',"num_experts":7}', "n_routed_experts and num_experts to be the same, got 16 and 7"),
        (BODY + ',"num_mtp_layers":7}', "num_nextn_predict_layers and num_mtp_layers to be the same, got 1 and 7"),
        (BODY + ',"torch_dtype":"bfloat16","dtype":"float32"}', "dtype and torch_dtype to be the same"),
    ],
    ids=str,
)
def test_what_is_refused_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        DeepseekConfig.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 1000


def test_names_that_agree_are_taken():
    base = BASES["tiny"]
    both = base | {"num_experts": base["n_routed_experts"], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert DeepseekConfig.from_dict(both) == DeepseekConfig.from_dict(base)


OBJECTS = (
    *(np.int64(3), np.float32(1.5), np.array([1, 2]), torch.tensor(3), decimal.Decimal(2), fractions.Fraction(1, 2)),
    *(b"x", (1, 2), {1, 2}, {1: 2}, object(), float("nan"), 10**400, 10**5000, range(3), Path("x"), 1j, type, ...),
)


@pytest.mark.parametrize("field", sorted(field.name for field in dataclasses.fields(DeepseekConfig)))
def test_python_objects_are_taken_or_refused_before_anything_is_computed(field):
    base = DeepseekConfig.from_pretrained("tiny")
    for value in OBJECTS:
        try:
            config = base.replace(**{field: value})
        except ConfigError as error:
            assert field in str(error) and len(str(error)) < 1000
        else:
            json.dumps(config.to_dict())


@pytest.mark.parametrize(
    "source", [None, 1, b"tiny", "", "/", "/dev/zero", "tiny\0", "TINY", "~", [], {}, {1: 2}, "tiny.json", "\ud800"]
)
def test_what_is_no_config_is_refused(source):
    with pytest.raises(ConfigError):
        DeepseekConfig.from_pretrained(source)
