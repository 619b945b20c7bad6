"""`use_huge_pages`: where the memory lies changes, and nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import deepseek_arch as da
from deepseek_arch.models import huge_pages

MIB = 2**20
LINUX = pytest.mark.skipif(not huge_pages._available(), reason="the system has no huge pages to give")


def flags_at(address: int) -> list[str]:
    """Returns the flags of the mapping that an address lies in; "hg" is that of huge pages asked for."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", mapping)
        if found and int(found[1], 16) <= address < int(found[2], 16):
            return re.findall(r"^VmFlags: (.*)$", mapping, re.MULTILINE)[0].split()
    raise AssertionError(f"expected a mapping at {address:x}")


class Shared(nn.Module):
    """A parameter, another name of it, two views of one buffer, and a small parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1024, 4096))
        self.tied = self.weight
        both = torch.randn(4096, 1024)
        self.register_buffer("left", both[:1000])
        self.register_buffer("right", both[1000:].T)
        self.small = nn.Parameter(torch.randn(64))


@LINUX
def test_values_objects_and_sharing_stay():
    module = Shared()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    objects = [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    # Views keep the memory of before, so that no tensor can be moved into memory that another one has just left.
    kept = [tensor.detach() for tensor in (module.weight, module.left, module.right)]

    assert da.use_huge_pages(module) == 2 * 16 * MIB

    assert [id(tensor) for tensor in (*module.parameters(), *module.buffers())] == objects
    assert module.tied is module.weight
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
        assert tensor.stride() == before[name].stride() or name == "right"
    for tensor, view in zip((module.weight, module.left, module.right), kept, strict=True):
        assert tensor.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    assert module.left.untyped_storage().data_ptr() == module.right.untyped_storage().data_ptr()
    module.weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before["weight"] - 1)


@LINUX
def test_a_parameter_that_is_a_buffer_too_is_moved_once():
    module = nn.Module()
    for i in range(4):
        parameter = nn.Parameter(torch.full((4096, 1024), float(i)))
        module.register_parameter(f"weight_{i}", parameter)
        module.register_buffer(f"buffer_{i}", parameter)
    del parameter
    assert da.use_huge_pages(module) == 4 * 16 * MIB
    for i in range(4):
        assert module.get_parameter(f"weight_{i}").eq(i).all() and module.get_buffer(f"buffer_{i}").eq(i).all()


@LINUX
def test_the_system_is_asked_for_huge_pages():
    """The number that it gives depends on how much memory lies in one piece at the moment."""
    linear = nn.Linear(4096, 4096, bias=False)
    assert "hg" not in flags_at(linear.weight.data_ptr() + 32 * MIB)
    da.use_huge_pages(linear)
    assert "hg" in flags_at(linear.weight.data_ptr() + 32 * MIB)


@LINUX
def test_a_model_decodes_the_same():
    model = da.DeepseekLM(da.DeepseekConfig.from_pretrained("tiny").replace(vocab_size=40_000)).eval()
    ids = torch.randint(0, 40_000, (2, 9))
    expected = model(ids).logits
    assert da.use_huge_pages(model) > 0
    assert torch.equal(model(ids).logits, expected)
    assert da.use_huge_pages(model) > 0, "a second call is harmless"
    assert torch.equal(model(ids).logits, expected)


def test_small_and_foreign_tensors_stay():
    small = nn.Linear(100, 100)
    address = small.weight.data_ptr()
    assert da.use_huge_pages(small) == 0
    assert small.weight.data_ptr() == address
    assert da.use_huge_pages(nn.Linear(4096, 4096, device="meta")) == 0


def test_nothing_is_copied_elsewhere(monkeypatch, tmp_path):
    linear = nn.Linear(4096, 4096)
    address = linear.weight.data_ptr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert da.use_huge_pages(linear) == 0
    for text in ("always madvise [never]", None):
        setting = tmp_path / f"enabled-{text is None}"
        if text is not None:
            setting.write_text(text)
        monkeypatch.setattr(huge_pages, "_SETTING", setting)
        assert da.use_huge_pages(linear) == 0
    assert linear.weight.data_ptr() == address


def test_other_objects_are_refused():
    with pytest.raises(ValueError, match="module"):
        da.use_huge_pages(torch.zeros(3))
