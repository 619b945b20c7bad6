"""README's table of layouts for DeepSeek-V3: what the command in each row computes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepseek_arch.cli.app import app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| `(--gpus [^`]+)` \| (\S+) \| (\S+) of (\d+) \| ([^|]+) \|$", README, re.MULTILINE)


@pytest.mark.parametrize(("devices", "options", "layout", "memory", "room", "estimate"), ROWS, ids=str)
def test_a_row(devices, options, layout, memory, room, estimate):
    result = CliRunner().invoke(app, ["plan", "deepseek-v3", *shlex.split(options), "--json"])
    assert result.exit_code == 0, result.output
    plans = json.loads(result.output)
    serves = "serving" in devices
    plan = (plans["serving"] if serves else plans["training"])["plans"][0]
    sizes = plan["layout"]
    axes = [(name, sizes[name]) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")]
    assert ",".join(f"{name}={size}" for name, size in axes if size > 1) == layout
    assert plan["fits"]
    assert f"{plan['memory_total_bytes'] / 1e9:.1f}" == memory and plan["device"]["memory"] == float(room) * 1e9
    if serves:
        rate = plan["decode_tokens_per_second_per_device"]
        text = f"{plan['largest_batch']:,} sequences of 4,096 at most, {rate:,.0f} tokens/s a device"
    else:
        text = f"{plan['step_seconds']:.2f} s a step of 15,360 x 4,096 tokens"
    assert text == estimate


def test_the_rows_are_found():
    assert [row[0].split(",")[0] for row in ROWS] == ["8 H200", "32 H100", "2", "DeepSeek's own layout"]
