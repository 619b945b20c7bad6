"""Mutations of checkpoint folders: what torn copies, other tools and mistakes make of them, each chosen at random.

Each takes the folder and a source of randomness and changes files in place; some leave a folder that means the same or
another model, most one that means none.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.checkpoint_files import INDEX

__all__ = ["MUTATIONS"]

Header = dict[str, Any]
DEEP = "[" * 100_000 + "]" * 100_000
# Raw JSON in the place of numbers.
NUMBERS = ("1" + "0" * 5000, "1" + "0" * 4000, "1e400", "NaN", "Infinity", "-0", "1e2", '"\\ud800"', DEEP)
VALUES: tuple[Any, ...] = (
    *(
        None,
        1,
        -1,
        1.5,
        "x",
        [],
        {},
        [None],
        [-1, 2],
        [1, 2, 3],
        True,
        [True, 2],
        10**30,
        [10**30, 10**30],
        [0, 10**30],
    ),
    *("F32", "f32", "F4", "F8_E5M2", "U8", "I64", "BOOL", [[1], [2]], {"a": 1}, "12", [0, 0], [2**63, 2**63], [1] * 70),
)
QUANTIZATIONS: tuple[Any, ...] = (
    *({}, {"quant_method": "fp8"}, {"quant_method": "awq"}, {"quant_method": ["fp8"]}, {"weight_block_size": [16, 12]}),
    *(
        {"quant_method": "fp8", "weight_block_size": size}
        for size in ([16, 8], [10**30, 1], [True, True], [0, 1], "16")
    ),
    {"quant_method": "fp8", "weight_block_size": [16, 12], "scale_fmt": "ue8m0"},
)
FIELDS: tuple[tuple[str, Any], ...] = (
    *(("num_hidden_layers", n) for n in (2, 4, 10_000, 10**9)),
    *(("n_routed_experts", n) for n in (4, 16, 100_000, 0, None)),
    *(("num_nextn_predict_layers", n) for n in (0, 2, 10_000)),
    *(("hidden_size", n) for n in (64, 2**20, 10**15)),
    *(("vocab_size", 62), ("vocab_size", 2**31 - 1), ("tie_word_embeddings", True), ("q_lora_rank", None)),
    *(("first_k_dense_replace", 0), ("first_k_dense_replace", 99), ("moe_layer_freq", 2), ("n_shared_experts", 2)),
    *(("torch_dtype", "float32"), ("torch_dtype", None), ("dtype", "float8"), ("scoring_func", "softmax")),
    *(
        ("model_type", "deepseek_v2"),
        ("model_type", []),
        ("index_topk", 4),
        ("architectures", 1),
        ("qk_rope_head_dim", 2),
    ),
)
SHARD_NAMES: tuple[Any, ...] = (
    *("../../etc/passwd", "/etc/passwd", "..", ".", "", "config.json", "a\0b.safetensors", "\ud800.safetensors"),
    *("a" * 5000, 1, None, ["x"], "absent.safetensors", INDEX, "a\\b", "~", "nested/x.safetensors"),
)
TENSOR_NAMES = (
    *(
        "",
        " ",
        "\ud800",
        "\x1b[31mred\x1b[0m",
        "a" * 100_000,
        "extra.weight",
        "model.layers.9.x",
        "lm_head.bias",
        "[/]",
    ),
    *("model.layers." + "9" * 5000 + ".a.b", "model.layers.\u0661.input_layernorm.weight", "model.layers.-1.x.y"),
    *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.4.eh_proj.weight"),
    *("model.layers.1.mlp.experts.gate_up_proj", "model.embed_tokens.weight_scale_inv"),
)


def read(file: Path) -> tuple[Header, bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(file: Path, header: Header, data: bytes, raw: str | None = None) -> None:
    """Writes a file; `raw` is JSON in the place of the value "@@"."""
    text = json.dumps(header)
    encoded = (text if raw is None else text.replace('"@@"', raw, 1)).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def a_shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def an_entry(folder: Path, rng: random.Random) -> tuple[Path, Header, bytes, str]:
    file = a_shard(folder, rng)
    header, data = read(file)
    return file, header, data, rng.choice([name for name in header if name != "__metadata__"])


def cut(folder: Path, rng: random.Random) -> None:
    file = a_shard(folder, rng)
    size = file.stat().st_size
    os.truncate(file, rng.choice([0, 1, 7, 8, 9, rng.randrange(size), size - 1, size + 1, size + 4096]))


def flip_bits(folder: Path, rng: random.Random) -> None:
    file = a_shard(folder, rng)
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    first, last = rng.choice([(0, 8), (8, 8 + length), (8 + length, len(content))])
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def header_length(folder: Path, rng: random.Random) -> None:
    file = a_shard(folder, rng)
    content = bytearray(file.read_bytes())
    content[:8] = struct.pack("<Q", rng.choice([2**64 - 1, 2**63, 2**40, 10**8, 32_000_000, 0, 1]))
    file.write_bytes(content)
    if rng.random() < 0.5:
        os.truncate(file, 2**40)  # of holes: as long as the header says


def entry(folder: Path, rng: random.Random) -> None:
    file, header, data, name = an_entry(folder, rng)
    field = rng.choice(["dtype", "shape", "data_offsets", None])
    if field is None:
        header[name] = rng.choice(VALUES)
    else:
        header[name][field] = rng.choice(VALUES)
    write(file, header, data)


def raw_number(folder: Path, rng: random.Random) -> None:
    file, header, data, name = an_entry(folder, rng)
    place = rng.choice(["shape", "data_offsets", "entry", "__metadata__", "new"])
    if place in ("shape", "data_offsets"):
        header[name][place] = ["@@", 2]
    else:
        header[name if place == "entry" else place] = "@@"
    write(file, header, data, rng.choice(NUMBERS))


def rename(folder: Path, rng: random.Random) -> None:
    file, header, data, name = an_entry(folder, rng)
    similar = (name.upper(), f"{name} ", name.replace("layers.", "layers.0"), f"{name}_scale_inv", f"../{name}")
    new = rng.choice((*TENSOR_NAMES, *similar))
    header[new] = header.pop(name)
    write(file, header, data)
    edit_index(folder, rng, lambda names: names.update({new: names.pop(name)}))


def remove(folder: Path, rng: random.Random) -> None:
    file, header, data, name = an_entry(folder, rng)
    first, last = header.pop(name)["data_offsets"]
    for info in header.values():
        if "data_offsets" in info and info["data_offsets"][0] >= last:
            info["data_offsets"] = [offset - (last - first) for offset in info["data_offsets"]]
    write(file, header, data[:first] + data[last:])
    edit_index(folder, rng, lambda names: names.pop(name))


def edit_index(folder: Path, rng: random.Random, change: Callable[[dict], object]) -> None:
    """Changes the index as well, or leaves it behind."""
    file = folder / INDEX
    if file.exists() and rng.random() < 0.5:
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))


def add(folder: Path, rng: random.Random) -> None:
    file, header, data, name = an_entry(folder, rng)
    size = rng.choice([0, 8])
    new = rng.choice((*TENSOR_NAMES, f"{name}2", f"{name}_scale_inv"))
    header[new] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(data), len(data) + size]}
    write(file, header, data + bytes(size))


def move(folder: Path, rng: random.Random) -> None:
    """Gives a tensor the place of another, swaps two, or leaves a gap."""
    file, header, data, name = an_entry(folder, rng)
    other = rng.choice([other for other in header if other not in ("__metadata__", name)] or [name])
    case = rng.randrange(3)
    if case == 0:
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif case == 1:
        header[name], header[other] = header[other], header[name]
    else:
        header[name]["data_offsets"] = [offset + 16 for offset in header[name]["data_offsets"]]
    write(file, header, data)


def retype(folder: Path, rng: random.Random) -> None:
    file, header, data, name = an_entry(folder, rng)
    shape, sizes = header[name]["shape"], {"BF16": ("F16", "I16"), "F32": ("I32",)}
    if rng.random() < 0.5:
        others = sizes.get(header[name]["dtype"], ("F8_E5M2", "U8", "I8", "F8_E8M0"))
        header[name]["dtype"] = rng.choice(others)
    else:
        header[name]["shape"] = rng.choice([shape[::-1], [1, *shape], [*shape, 1], [0], shape[:1]])
    write(file, header, data)


def values(folder: Path, rng: random.Random) -> None:
    """Values that are not finite or far off, in weights and scales."""
    file, header, data, name = an_entry(folder, rng)
    first, last = header[name]["data_offsets"]
    if last - first >= 4:
        at = first + 4 * rng.randrange((last - first) // 4)
        value = struct.pack("<f", rng.choice([float("nan"), float("inf"), -0.0, -1.0, 1e38, 1e-45]))
        data = data[:at] + rng.choice([value, b"\x7f\xff\x7f\xff"]) + data[at + 4 :]
    write(file, header, data)


def in_two_shards(folder: Path, rng: random.Random) -> None:
    _, header, data, name = an_entry(folder, rng)
    other = a_shard(folder, rng)
    other_header, other_data = read(other)
    first, last = header[name]["data_offsets"]
    place = [len(other_data), len(other_data) + last - first]
    write(other, other_header | {name: header[name] | {"data_offsets": place}}, other_data + data[first:last])


def config_field(folder: Path, rng: random.Random) -> None:
    config = json.loads((folder / "config.json").read_text())
    name, value = rng.choice((*FIELDS, *(("quantization_config", value) for value in QUANTIZATIONS)))
    config[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def index_text(folder: Path, rng: random.Random) -> None:
    file = folder / INDEX
    index = json.loads(file.read_text()) if file.exists() else {"weight_map": {"lm_head.weight": "absent"}}
    names = index["weight_map"]
    whole = (
        "",
        "[]",
        "null",
        '{"weight_map": null}',
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "{}",
        DEEP,
        "1" * 5001,
    )
    if rng.random() < 0.3:
        file.write_text(rng.choice(whole))
    elif rng.random() < 0.1:
        file.write_text(json.dumps({"weight_map": names | {f"x{i}": "absent.safetensors" for i in range(100_000)}}))
    else:
        names[rng.choice(list(names))] = rng.choice((*SHARD_NAMES, a_shard(folder, rng).name))
        file.write_text(json.dumps(index))


def kind_of_file(folder: Path, rng: random.Random) -> None:
    """Another kind of file in the place of one: a folder, a FIFO, a device, a link into nowhere or to itself."""
    file = rng.choice([a_shard(folder, rng), folder / "config.json", folder / INDEX, folder / "generation_config.json"])
    file.unlink(missing_ok=True)
    case = rng.randrange(6)
    if case == 0:
        file.mkdir()
    elif case == 1:
        os.mkfifo(file)
    elif case < 5:
        file.symlink_to((file.name, "nowhere", "/dev/zero")[case - 2])


def other_files(folder: Path, rng: random.Random) -> None:
    file = a_shard(folder, rng)
    name = rng.choice(["zz", "adapter_model", "consolidated.00", ".hidden", "model"])
    other = folder / f"{name}.safetensors"
    case = rng.randrange(4)
    if case == 0:
        (folder / INDEX).unlink(missing_ok=True)
    elif case == 1 and other != file:
        shutil.copy(file, other)
    elif case == 2 and other != file:
        other.write_bytes(rng.randbytes(rng.choice([0, 1000])))
    else:
        (folder / "generation_config.json").write_text(rng.choice(["{}", "[]", "", DEEP, '{"eos_token_id": 3}']))


MUTATIONS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(cut, flip_bits, header_length, entry, raw_number, rename, remove, add, move, retype, values, in_two_shards),
    *(config_field, index_text, kind_of_file, other_files),
)
