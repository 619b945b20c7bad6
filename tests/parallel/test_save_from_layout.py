"""`save` of a model that is cut over ranks: the files of one process, whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

import deepseek_arch as da
from deepseek_arch.checkpoint.files import staging, writer
from deepseek_arch.layout.parallel_layout import ParallelLayout
from support import small_models
from support.cut_models import FP8_SIZES
from support.ranks import RankError, run_ranks

CONFIG = small_models.config(
    "v3", **FP8_SIZES, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]}
)
# Fewer experts than shards: FSDP cuts inside of them.
FEW = CONFIG.replace(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1)
MANY = CONFIG.replace(n_routed_experts=32)
AXES = [
    ({"tp": 2, "ep": 2}, 2),
    ({"dp_shard": 2, "ep": 2}, 2),
    ({"dp_shard": 2, "tp": 2, "ep": 2}, 4),
    ({"dp_replicate": 2, "dp_shard": 2}, 4),
]


def contents(folder):
    """Every tensor of a checkpoint as bytes, by name, and its config."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).view(torch.uint8) for name in list(opened.keys())}
    return found, (Path(folder) / "config.json").read_text()


def assert_same_files(folder, other):
    (found, config), (wanted, wanted_config) = contents(folder), contents(other)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert config == wanted_config


def whole_model(config, fp8, dtype=torch.float32):
    model = small_models.model(config).to(dtype)
    return da.keep_fp8(model, (16, 16)) if fp8 else model


FORMATS = [(False, "bf16"), (False, "fp8"), (True, "fp8"), (True, "bf16")]


def saved(rank, config, axes, formats, folder):
    reports = []
    for fp8, format in formats:
        model = da.parallelize(whole_model(config, fp8), ParallelLayout(**axes))
        model.generation_config = {"temperature": 0.5}
        report = da.save(model, folder / f"{fp8} {format}", format, max_shard_size="40KB")
        reports.append((report.tensors, report.nbytes, report.quantized, [file.name for file in report.files]))
    return reports


@pytest.mark.parametrize(("axes", "world"), AXES, ids=str)
def test_files_are_those_of_one_process(tmp_path, axes, world):
    """Values, FP8 kept, quantized and dequantized, in shards of 40 kB."""
    ranks = run_ranks(saved, world, CONFIG, axes, FORMATS, tmp_path)
    assert all(reports == ranks[0] for reports in ranks)
    for (fp8, format), (*counts, files) in zip(FORMATS, ranks[0], strict=True):
        model, folder = whole_model(CONFIG, fp8), tmp_path / f"{fp8} {format}"
        model.generation_config = {"temperature": 0.5}
        expected = da.save(model, tmp_path / f"one {folder.name}", format)
        assert_same_files(folder, expected.path)
        assert counts == [expected.tensors, expected.nbytes, expected.quantized]
        assert sorted(files) == sorted(file.name for file in folder.iterdir())
        assert (folder / "generation_config.json").is_file()


def test_experts_that_are_cut_inside(tmp_path):
    run_ranks(saved, 4, FEW, {"dp_shard": 4}, [(False, "fp8")], tmp_path)
    expected = da.save(small_models.model(FEW), tmp_path / "one", "fp8")
    assert_same_files(tmp_path / "False fp8", expected.path)


def moved(rank, source, axes, fp8, format, target):
    da.save(da.load(source, fp8=fp8, layout=ParallelLayout(**axes)), target, format)


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_from_layout_to_layout_to_one_process(tmp_path, format):
    """EP 2 -> EP 4 -> TP 2 -> one process, bit for bit, in BF16 and in FP8."""
    da.save(whole_model(CONFIG, format == "fp8", torch.bfloat16), tmp_path / "0", format)
    chain = [({"dp_shard": 2, "ep": 2}, 2), ({"dp_shard": 4, "ep": 4}, 4), ({"tp": 2}, 2)]
    for i, (axes, world) in enumerate(chain):
        run_ranks(moved, world, tmp_path / str(i), axes, "keep", format, tmp_path / str(i + 1))
    da.save(da.load(tmp_path / "3"), tmp_path / "4", format)
    for i in range(1, 5):
        assert_same_files(tmp_path / str(i), tmp_path / "0")


def wrapped(rank, folder):
    from torch.distributed.fsdp import fully_shard

    model = small_models.model(CONFIG)
    for layer in model.model.layers:
        fully_shard(layer)
    da.save(fully_shard(model), folder)


def test_a_model_that_fsdp2_alone_has_cut(tmp_path):
    da.save(small_models.model(CONFIG), tmp_path / "one")
    run_ranks(wrapped, 2, tmp_path / "ranks")
    assert_same_files(tmp_path / "ranks", tmp_path / "one")


def experts_stay(rank, folder):
    """Bytes that this rank sends while it saves."""
    sent, send = [0], dist.send

    def counting(tensor, *args):
        sent[0] += tensor.nbytes
        send(tensor, *args)

    model = da.parallelize(small_models.model(MANY), ParallelLayout(dp_shard=2, ep=2))
    dist.send = counting
    da.save(model, folder)
    experts = sum(p.to_local().nbytes for name, p in model.named_parameters() if ".experts." in name)
    rest = sum(p.to_local().nbytes for name, p in model.named_parameters() if ".experts." not in name)
    files = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    return sent[0], experts, rest, len(files)


def test_experts_are_written_where_they_are(tmp_path):
    for sent, experts, rest, files in run_ranks(experts_stay, 2, tmp_path / "x"):
        assert 0 < sent < 2 * rest < experts  # the embedding and the head stand twice in the files
        assert files == 2


def broken(rank, folder, how):
    model = da.parallelize(small_models.model(CONFIG), ParallelLayout(dp_shard=2, ep=2))
    if rank == 1 and how == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    if rank == 1 and how == "nan":
        model.model.layers[1].mlp.experts.down_proj.to_local().detach()[0, 0, 0] = float("nan")
    if rank == 0 and how == "rename":

        def failing(*args):
            raise PermissionError(13, "no", "file")

        staging.os.replace = failing
    from deepseek_arch.checkpoint import save

    try:
        save(model, folder, "fp8" if how == "nan" else "bf16")
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("disk", "OSError", "File too large"),
        ("nan", "ValueError", "expected finite"),
        ("rename", "PermissionError", "no"),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all_and_changes_nothing(tmp_path, how, kind, text):
    """TRAPS S4."""
    da.save(small_models.model(CONFIG, seed=1), tmp_path / "x")
    before = {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()}
    first, second = run_ranks(broken, 2, tmp_path / "x", how, seconds=60)
    assert first == second
    assert first[0] == kind and text in first[1]
    assert {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()} == before


def refused(rank, folder):
    model = da.parallelize(small_models.model(CONFIG), ParallelLayout(tp=2))
    try:
        da.save(model, folder)
    except ValueError as error:
        return str(error)


def test_a_folder_that_another_process_writes_to_is_refused_alike(tmp_path):
    lock = staging.FolderLock(tmp_path / "x")
    try:
        first, second = run_ranks(refused, 2, tmp_path / "x", seconds=60)
    finally:
        lock.release()
    assert first == second and "expected no other process to write to" in first


def killed(rank, victim, kind, at, folder, sharded):
    """The victim is killed in call number `at` of a kind; the others raise, whatever it is."""
    model = da.parallelize(small_models.model(CONFIG), ParallelLayout(dp_shard=2, ep=2))
    if rank == victim:
        calls, owner = [0], writer.ShardFiles if kind == "write" else os
        function = getattr(owner, kind)

        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(owner, kind, counted)
    (da.save_sharded if sharded else da.save)(model, folder)


# The first rank moves its 4 files out of the ranks' folder, then 3 old ones away and 4 new ones in, then the journal.
@pytest.mark.parametrize(
    ("victim", "kind", "at"),
    [(0, "write", 3), (1, "write", 3), (0, "replace", 7), (0, "replace", 11), (0, "replace", 12)],
)
def test_a_rank_that_is_killed_in_save_loses_nothing(tmp_path, victim, kind, at):
    da.save(small_models.model(CONFIG, seed=1), tmp_path / "old")
    da.save(small_models.model(CONFIG, seed=1), tmp_path / "x")
    with pytest.raises(RankError, match=f"rank {victim}: no answer: it was killed"):
        run_ranks(killed, 2, victim, kind, at, tmp_path / "x", False, seconds=60)
    assert (tmp_path / "x" / "config.json").exists() == (kind == "write" or at == 12)
    staging.FolderLock(tmp_path / "x").release()  # as the next writer's, which puts the folder in order
    assert_same_files(tmp_path / "x", tmp_path / "old")
    assert not (tmp_path / "x" / staging.SAVING).exists()


# The first rank moves 3 files out of the ranks' folder, then into their places, .metadata last.
@pytest.mark.parametrize(("victim", "kind", "at"), [(0, "fsync", 1), (1, "fsync", 1), (0, "replace", 6)])
def test_a_rank_that_is_killed_in_save_sharded_loses_nothing(tmp_path, victim, kind, at):
    """The folder holds no checkpoint, and can be written to again."""
    with pytest.raises(RankError, match=f"rank {victim}: no answer: it was killed"):
        run_ranks(killed, 2, victim, kind, at, tmp_path / "x", True, seconds=60)
    with pytest.raises(ValueError, match="expected a folder that save_sharded wrote"):
        da.load_sharded(small_models.model(CONFIG), tmp_path / "x")
    da.save_sharded(small_models.model(CONFIG), tmp_path / "x")
    model = small_models.model(CONFIG, seed=1)
    da.load_sharded(model, tmp_path / "x")
    expected = small_models.model(CONFIG).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------- stages of a pipeline

LAYERS = CONFIG.replace(num_hidden_layers=4)
TIED = LAYERS.replace(num_nextn_predict_layers=0, tie_word_embeddings=True)
STAGES = [
    (LAYERS, {"pp": 2}, 2, {"schedule": "1F1B"}),
    (LAYERS, {"pp": 2}, 2, {"schedule": "Interleaved1F1B"}),
    (LAYERS, {"pp": 2, "dp_shard": 2, "ep": 2}, 4, {"schedule": "1F1B"}),
    (LAYERS, {"pp": 2, "dp_shard": 2, "ep": 2}, 4, {"schedule": "DualPipeV"}),
    (LAYERS, {"pp": 2, "tp": 2, "ep": 2}, 4, {"schedule": "ZBVZeroBubble"}),
    (TIED, {"pp": 2}, 2, {"schedule": "1F1B", "stage_layers": [3, 1]}),
    # FSDP leaves an embedding of two stages alone, which tensor parallelism has cut.
    (LAYERS, {"pp": 2, "dp_shard": 2, "tp": 2}, 8, {"schedule": "DualPipeV"}),
    # The last rank has neither FP8 layers nor the embedding, whose dtype dequantized weights get.
    (TIED.replace(tie_word_embeddings=False), {"pp": 2}, 2, {"schedule": "1F1B", "stage_layers": [4, 0]}),
]


def staged(config, fp8, axes, options):
    return da.pipeline(whole_model(config, fp8).train(), ParallelLayout(**axes), microbatches=4, **options)


def saved_stages(rank, config, axes, options, formats, folder):
    reports = []
    for fp8, format in formats:
        pipe = staged(config, fp8, axes, options)
        if not fp8:  # after a step FSDP holds whole weights of a stage
            ids = small_models.tokens(config, 4, 9)
            pipe.step(ids, ids)
        pipe.model.generation_config = {"temperature": 0.5}
        report = da.save(pipe.model, folder / f"{fp8} {format}", format, max_shard_size="40KB")
        reports.append((report.tensors, report.nbytes, report.quantized, [file.name for file in report.files]))
    return reports


@pytest.mark.parametrize(
    ("config", "axes", "world", "options"), STAGES, ids=[f"{axes} {options}" for _, axes, _, options in STAGES]
)
def test_files_of_stages_are_those_of_one_process(tmp_path, config, axes, world, options):
    """Every layer is written by the ranks of its stage, MTP modules with the last stage's copy of the embedding."""
    formats = FORMATS if world < 8 else FORMATS[:1]
    ranks = run_ranks(saved_stages, world, config, axes, options, formats, tmp_path)
    assert all(reports == ranks[0] for reports in ranks)
    for (fp8, format), (*counts, files) in zip(formats, ranks[0], strict=True):
        model, folder = whole_model(config, fp8), tmp_path / f"{fp8} {format}"
        model.generation_config = {"temperature": 0.5}
        expected = da.save(model, tmp_path / f"one {folder.name}", format)
        assert_same_files(folder, expected.path)
        assert counts == [expected.tensors, expected.nbytes, expected.quantized]
        assert sorted(files) == sorted(file.name for file in folder.iterdir())
    assert set(da.load(tmp_path / "False bf16").state_dict()) == set(whole_model(config, False).state_dict())


def broken_stage(rank, folder, victim):
    model = staged(LAYERS, False, {"pp": 2}, {"schedule": "1F1B", "stage_layers": [3, 1]}).model
    if rank == victim:
        model.model.layers[(1, 3)[rank]].mlp.experts.down_proj.detach()[0, 0, 0] = float("nan")
    try:
        da.save(model, folder, "fp8")
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_of_one_stage_is_raised_on_all_and_changes_nothing(tmp_path, victim):
    """TRAPS S4: the stages have different numbers of layers."""
    da.save(small_models.model(LAYERS, seed=1), tmp_path / "x")
    before = {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()}
    first, second = run_ranks(broken_stage, 2, tmp_path / "x", victim, seconds=60)
    assert first == second and "expected finite" in first
    assert {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()} == before


def killed_stage(rank, folder):
    model = staged(LAYERS, False, {"pp": 2}, {"schedule": "1F1B"}).model
    if rank == 1:
        writer.ShardFiles.complete = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    da.save(model, folder)


def test_a_stage_that_is_killed_in_save_loses_nothing(tmp_path):
    da.save(small_models.model(LAYERS, seed=1), tmp_path / "old")
    da.save(small_models.model(LAYERS, seed=1), tmp_path / "x")
    with pytest.raises(RankError, match="rank 1: no answer: it was killed"):
        run_ranks(killed_stage, 2, tmp_path / "x", seconds=60)
    staging.FolderLock(tmp_path / "x").release()  # as the next writer's, which puts the folder in order
    assert_same_files(tmp_path / "x", tmp_path / "old")


# ---------------------------------------------------------------- memory


WIDE = CONFIG.replace(vocab_size=2**15, hidden_size=1024, num_nextn_predict_layers=0, quantization_config=None)


def peak(rank, folder):
    model = da.parallelize(da.DeepseekLM(WIDE, dtype=torch.float32), ParallelLayout(dp_shard=2, ep=2))

    def resident(field):
        return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    da.save(model, folder)
    return resident("VmHWM") - before, sum(p.to_local().nbytes for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_memory_beyond_the_shard_is_a_few_bands(tmp_path):
    """The embedding and the head have 128 MiB each, of which a rank holds half; gathered, one would add 192 MiB."""
    for beyond, shard in run_ranks(peak, 2, tmp_path / "x"):
        assert shard > 128 * 2**20
        assert beyond < 96 * 2**20
