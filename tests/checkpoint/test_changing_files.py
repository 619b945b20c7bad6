"""Folders that change while they are read, writers that are killed, and files that are none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.checkpoint import CheckpointError, inspect_checkpoint, load, loading, save
from deepseek_arch.checkpoint.conversion import workers
from deepseek_arch.checkpoint.files import staging, writer
from deepseek_arch.config.deepseek_config import ConfigError
from support import checkpoint_files as files
from support import small_models

SAVER = """
import itertools, sys, warnings
import torch
import deepseek_arch as da
torch.set_num_threads(1)
models = [da.load(path) for path in sys.argv[2:]]
for number in itertools.count():
    da.save(models[number % len(models)], sys.argv[1], max_shard_size="40KB")
    if number == 0:
        print("saved", flush=True)
"""


@pytest.fixture
def config():
    return small_models.config("v3", num_nextn_predict_layers=1)


@pytest.fixture
def model(config):
    return da.DeepseekLM(config)


@pytest.fixture
def folder(tmp_path, model):
    save(model, tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    return tmp_path / "model"


def state_bytes(model) -> bytes:
    return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in model.state_dict().values())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---------------------------------------------------------------- read beside a writer


@pytest.mark.parametrize("loads", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_load_beside_a_saver_is_one_of_its_models_or_an_error(tmp_path, config, loads):
    sources = [tmp_path / f"source{i}" for i in range(3)]
    for number, source in enumerate(sources):
        save(da.DeepseekLM(small_models.config("v3", initializer_range=0.02 * (number + 1))), source)
    whole = {state_bytes(load(source)) for source in sources}
    assert len(whole) == 3
    out = tmp_path / "out"
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(out), *map(str, sources)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    refused = complete = 0
    try:
        assert saver.stdout is not None and saver.stdout.readline() == b"saved\n"
        for _ in range(loads):
            try:
                assert state_bytes(load(out)) in whole, "a mixture of two models"
                complete += 1
            except (ValueError, FileNotFoundError):
                refused += 1
    finally:
        saver.kill()
        saver.wait()
    assert complete + refused == loads
    save(load(sources[0]), out)  # whatever the saver left
    assert state_bytes(load(out)) == state_bytes(load(sources[0]))


@pytest.mark.parametrize("moment", ["allocate", "_fill", "_compare_repeats"])
def test_a_save_in_the_middle_of_a_load_is_an_error(folder, config, monkeypatch, moment):
    step = getattr(loading, moment)

    def saving(*arguments):
        save(da.DeepseekLM(config), folder, max_shard_size="100KB")
        return step(*arguments)

    monkeypatch.setattr(loading, moment, saving)
    with pytest.raises(CheckpointError, match="files that changed while they were read"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", files.INDEX, "model-00001-of", "generation_config.json"])
@pytest.mark.parametrize("change", ["touched", "replaced", "removed", "added"])
def test_every_file_of_a_checkpoint_is_pinned(folder, monkeypatch, name, change):
    file = next((file for file in sorted(folder.iterdir()) if file.name.startswith(name)), folder / name)
    if file.exists() == (change == "added"):
        if change == "added":
            pytest.skip("it is there")
        file.write_text("{}")
    allocate = loading.allocate

    def changing(*arguments):
        allocate(*arguments)
        if change == "added":
            file.write_text("{}")
        elif change == "touched":
            os.utime(file, ns=(0, 0))
        elif change == "removed":
            file.unlink()
        else:
            content = file.read_bytes()
            file.with_suffix(".new").write_bytes(content)
            os.replace(file.with_suffix(".new"), file)

    monkeypatch.setattr(loading, "allocate", changing)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    (changed,) = caught.value.problems.values()
    assert changed == [file.name]


def test_a_conversion_of_files_that_change_writes_nothing(folder, tmp_path, monkeypatch):
    process = workers._Converter.process

    def changing(self, *arguments):
        os.utime(folder / "config.json", ns=(0, 0))
        return process(self, *arguments)

    monkeypatch.setattr(workers._Converter, "process", changing)
    with pytest.raises(CheckpointError, match=r"files that changed while they were read.*config\.json"):
        da.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_slice_of_files_that_change_writes_nothing(folder, tmp_path, monkeypatch):
    write = writer.CheckpointWriter.write

    def changing(self, *arguments):
        os.utime(folder / files.INDEX, ns=(0, 0))
        return write(self, *arguments)

    monkeypatch.setattr(writer.CheckpointWriter, "write", changing)
    with pytest.raises(CheckpointError, match=r"files that changed while they were read.*index\.json"):
        da.slice_checkpoint(folder, tmp_path / "out", layers=[0])
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- one writer at a time


@pytest.mark.skipif(staging.fcntl is None, reason="needs locks of folders")
@pytest.mark.parametrize("second", ["save", "convert", "slice"])
def test_a_second_writer_is_refused(folder, tmp_path, model, monkeypatch, second):
    out = tmp_path / "out"
    write, inside = (
        {
            "save": lambda: save(model, out),
            "convert": lambda: da.convert(folder, out),
            "slice": lambda: da.slice_checkpoint(folder, out, layers=[0]),
        }[second],
        [],
    )
    commit = writer.CheckpointWriter.commit

    def writing(self, *arguments):
        if not inside:
            inside.append(True)
            with pytest.raises(ValueError, match=r"expected no other process to write to .*out', found one"):
                write()
        return commit(self, *arguments)

    monkeypatch.setattr(writer.CheckpointWriter, "commit", writing)
    save(model, out)
    assert inside and state_bytes(load(out)) == state_bytes(model)
    write()  # the lock is gone


def test_two_threads_that_save_at_once_leave_one_of_the_models(tmp_path, config):
    models = [da.DeepseekLM(config) for _ in range(3)]
    out, errors = tmp_path / "out", []

    def saving(model):
        for _ in range(5):
            try:
                save(model, out, max_shard_size="100KB")
            except ValueError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=saving, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("found one" in error for error in errors)
    assert state_bytes(load(out)) in {state_bytes(model) for model in models}
    assert not [file.name for file in out.iterdir() if file.name.startswith(".")]


# ---------------------------------------------------------------- writers that are killed


def killed(function) -> None:
    """Runs a function in a child process that ends with SIGKILL."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            function()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("renames", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("then", ["save", "fail"])
def test_a_killed_save_is_rolled_back_by_the_next(folder, config, monkeypatch, renames, then):
    (folder / "notes.txt").write_text("mine")
    before = snapshot(folder)
    new = da.DeepseekLM(config)
    replace, calls = os.replace, []

    def dying(source, target):
        if len(calls) == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(staging.os, "replace", dying)
        killed(lambda: save(new, folder, max_shard_size="100KB"))
    if renames == 0:
        files.assert_same_tensors(load(folder).state_dict(), da.load(folder).state_dict())
    else:
        with pytest.raises(ConfigError, match=r"The files from before are in .*\.saving/replaced"):
            load(folder)
    if then == "fail":  # the next writer fails: the first checkpoint is there again

        def failing(*_):
            raise OSError("no")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
            patch.setattr(writer.CheckpointWriter, "commit", failing)
            save(new, folder)
        assert snapshot(folder) == before
    else:
        save(new, folder, max_shard_size="100KB")
        assert state_bytes(load(folder)) == state_bytes(new)
        assert (folder / "notes.txt").read_text() == "mine"
        assert set(snapshot(folder)) == set(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_save_to_a_new_folder_is_cleaned_up(tmp_path, model, monkeypatch):
    out = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(writer.CheckpointWriter, "commit", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        killed(lambda: save(model, out))
    with pytest.raises(ConfigError, match="a process is writing to it, or was killed while it did"):
        load(out)
    save(model, out)
    assert {file.name for file in out.iterdir()} == {"config.json", files.INDEX, "model.safetensors"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("renames", [1, 2, 3, 4])
def test_a_killed_replacement_without_a_config_is_rolled_back(tmp_path, monkeypatch, renames):
    """The folder has a config.json all the while; killed right after a rename."""
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("old")
    before, replace, calls = snapshot(tmp_path), os.replace, []

    def dying(source, target):
        replace(source, target)
        calls.append(target)
        if len(calls) == renames:
            os.kill(os.getpid(), signal.SIGKILL)

    def replacing():
        with staging.replacing_files(tmp_path) as new:
            (new / "adapter_config.json").write_text("new")
            (new / "adapter_model.safetensors").write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(staging.os, "replace", dying)
        killed(replacing)
    staging.FolderLock(tmp_path).release()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("renames", range(1, 12))
@pytest.mark.parametrize("how", ["save", "replacing_files"])
def test_an_interrupted_swap_loses_nothing(folder, config, monkeypatch, how, renames, when, again):
    """Ctrl-C before or after a rename, and before or after every one of those that undo it (`again`)."""
    new, before, replace, calls = da.DeepseekLM(config), snapshot(folder), os.replace, []
    finished = shutil.copytree(folder, folder.parent / "finished")

    def interrupted(source, target):
        calls.append(target)
        stop = len(calls) == renames or (again and len(calls) > renames)
        if stop and when == "before":
            raise KeyboardInterrupt
        replace(source, target)
        if stop:
            raise KeyboardInterrupt

    def write(to):
        if how == "save":
            save(new, to)
        else:
            with staging.replacing_files(to) as made:
                (made / "config.json").write_text("new")
                (made / "model.safetensors").write_text("new")

    write(finished)
    with monkeypatch.context() as patch:
        patch.setattr(staging.os, "replace", interrupted)
        with contextlib.suppress(KeyboardInterrupt):  # the later ones are past the last rename
            write(folder)
    if not again:
        assert not (folder / staging.SAVING).exists()
    staging.FolderLock(folder).release()
    is_done = len(calls) < renames or ({staging.SAVING, "swapped.json"} <= set(calls[-1].parts) and when == "after")
    assert snapshot(folder) == (snapshot(finished) if is_done else before)
    assert not (folder / staging.SAVING).exists()


def test_old_files_that_cannot_be_put_back_stay_for_the_next_writer(folder, config, monkeypatch):
    before, replace = snapshot(folder), os.replace

    def failing(source, target):
        if Path(target) == folder / "model.safetensors":
            raise OSError("no room")
        if Path(source).parent.name == "replaced":
            raise OSError("not back")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="not back"):
        patch.setattr(staging.os, "replace", failing)
        save(da.DeepseekLM(config), folder)
    with pytest.raises(ConfigError, match=r"The files from before are in .*\.saving/replaced"):
        load(folder)
    staging.FolderLock(folder).release()
    assert snapshot(folder) == before


def test_old_files_without_a_journal_return_to_the_places_that_are_empty(tmp_path):
    aside = tmp_path / staging.SAVING / "replaced"
    aside.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (aside / name).write_text("old")
    (tmp_path / "config.json").write_text("new")
    staging.FolderLock(tmp_path).release()
    assert snapshot(tmp_path) == {"config.json": b"new", "model.safetensors": b"old"}


@pytest.mark.parametrize(
    "names",
    [["../mine.txt"], ["/mine.txt"], ["sub/../../mine.txt"], [3], "mine.txt", ["a\0b"], None],
    ids=repr,
)
@pytest.mark.parametrize("part", ["new", "leaving"])
def test_a_journal_that_came_with_a_folder_moves_no_file_outside_of_it(tmp_path, part, names):
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "model"
    aside = folder / staging.SAVING / "replaced"
    aside.mkdir(parents=True)
    (aside / "config.json").write_text("old")
    (folder / staging.SAVING / "swap.json").write_text(json.dumps({"new": [], "leaving": []} | {part: names}))
    staging.FolderLock(folder).release()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert snapshot(folder) == {"config.json": b"old"}  # as without a journal


# ---------------------------------------------------------------- what is no file


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop"])
@pytest.mark.parametrize("name", ["config.json", files.INDEX, "model-00001-of", "generation_config.json"])
def test_what_is_no_regular_file_is_refused_at_once(folder, name, kind):
    file = next((file for file in sorted(folder.iterdir()) if file.name.startswith(name)), folder / name)
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else file.name)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"expected|symbolic links"):
        load(folder)
    if file.name.startswith("model"):
        (problem,) = (p for ps in inspect_checkpoint(folder).problems.values() for p in ps if file.name in p)
        assert kind == "loop" or "expected a regular file, got a" in problem or file.name == files.INDEX
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "name", ["a\0b.safetensors", "\ud800.safetensors", "x" * 300, "", "..", "sub/a.safetensors", 3, None]
)
def test_names_in_the_index_that_no_file_can_have_are_named(folder, name):
    index = json.loads((folder / files.INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / files.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected the weight_map of .* to name files of the folder, got"):
        load(folder)


def test_an_index_without_bounds_is_an_error(folder):
    for content in (b"[" * 100_000, b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"1" * 5001):
        (folder / files.INDEX).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"expected .* to hold a weight_map"):
            load(folder)
    os.truncate(folder / files.INDEX, 2**40)  # of holes
    with pytest.raises(CheckpointError, match="expected JSON of at most"):
        load(folder)
