"""`deepseek-arch place`: what it prints, and its exit codes; and the planner's nodes."""

from __future__ import annotations

import json

import pytest
import torch

from deepseek_arch.moe.expert_load import ExpertLoad, LoadHistory
from deepseek_arch.moe.placement import plan_placement

COMMAND = ("place",)


@pytest.fixture
def loads(tmp_path):
    """One step's loads of two layers of four experts."""
    path = tmp_path / "loads.json"
    ExpertLoad({"one": torch.tensor([90, 10, 10, 10]), "two": torch.tensor([5, 5, 5, 5])}).save(path)
    return path


def test_place_prints_the_imbalance_and_the_devices(cli, loads):
    code, out, err = cli(loads, "--devices", 2, "--redundant", 2)
    assert (code, err) == (0, "")
    # Experts 0 and 1 before: 100 of 120; after: half of expert 0 on each device.
    assert "one: imbalance (largest load / mean) 1.667 before, 1." in out
    assert "two: imbalance (largest load / mean) 1.000 before" in out
    plan = plan_placement([90.0, 10.0, 10.0, 10.0], 2, 2)
    for number, experts in enumerate(plan.devices):
        assert f"device {number}: load {plan.loads[number]:g}, experts {', '.join(map(str, experts))}" in out
    assert "worst of 2 layers: 1.667 before" in out


def test_place_as_json_and_for_one_layer(cli, loads):
    code, out, _ = cli(loads, "--devices", 2, "--redundant", 2, "--layer", "one", "--json")
    found = json.loads(out)
    assert code == 0 and found.keys() == {"one"}
    plan = plan_placement([90.0, 10.0, 10.0, 10.0], 2, 2)
    assert found["one"]["imbalance_before"] == pytest.approx(200 / 120)
    assert found["one"]["imbalance"] == pytest.approx(plan.imbalance)
    assert [tuple(experts) for experts in found["one"]["devices"]] == list(plan.devices)


def test_place_by_the_last_steps_of_a_history(cli, tmp_path):
    history = LoadHistory()
    for load in ([8, 0, 0, 0], [0, 4, 4, 0]):
        history.add(ExpertLoad({"layer": torch.tensor(load)}))
    history.save(tmp_path / "history.json")
    _, out, _ = cli(tmp_path / "history.json", "--devices", 2, "--json")
    assert json.loads(out)["layer"]["contiguous"] == [3.0, 1.0]
    _, out, _ = cli(tmp_path / "history.json", "--devices", 2, "--last", 1, "--json")
    assert json.loads(out)["layer"]["contiguous"] == [2.0, 2.0]


@pytest.mark.parametrize(
    "args, message",
    [
        (("--devices", 3), "devices that divide the number of experts and copies, got 4 experts, 0 copies, 3 devices"),
        (("--devices", 2, "--redundant", 2, "--nodes", 4), "expected nodes that divide 4 experts, 2 devices"),
        (("--devices", 2, "--layer", "three"), "--layer to be some of one, two, got three"),
    ],
)
def test_placements_that_cannot_be(cli, loads, args, message):
    code, out, err = cli(loads, *args)
    assert (code, out) == (1, "") and message in err and err.startswith("error: ")


def test_files_that_cannot_be_placed_by(cli, tmp_path):
    code, _, err = cli(tmp_path / "absent.json", "--devices", 2)
    assert code == 1 and "absent.json" in err
    (tmp_path / "other.json").write_text("[]")
    code, _, err = cli(tmp_path / "other.json", "--devices", 2)
    assert code == 1 and "neither loads nor shares" in err


@pytest.mark.parametrize("args", [(), ("--devices", 0), ("--devices", 2, "--redundant", -1)])
def test_wrong_usage_exits_with_2(cli, loads, args):
    assert cli(loads, *args)[0] == 2


@pytest.mark.parametrize("experts, devices, redundant, nodes", [(16, 4, 4, 2), (256, 32, 32, 8), (8, 4, 0, 4)])
def test_nodes_keep_their_experts(experts, devices, redundant, nodes):
    work = torch.rand(experts) ** 4 * 1000
    plan = plan_placement(work, devices, redundant, nodes)
    held = [expert for device in plan.devices for expert in device]
    assert len(held) == experts + redundant and set(held) == set(range(experts))
    for number, (device, load) in enumerate(zip(plan.devices, plan.loads, strict=True)):
        node = number // (devices // nodes)
        assert {expert // (experts // nodes) for expert in device} == {node}
        assert load == pytest.approx(sum(float(work[e]) / held.count(e) for e in device))
    assert sum(plan.contiguous) == pytest.approx(float(work.sum()), rel=1e-5)
    assert plan.contiguous == pytest.approx(plan_placement(work, devices, redundant).contiguous)
    assert 1 - 1e-6 <= plan.imbalance <= plan.imbalance_before * (1 + 1e-6)
