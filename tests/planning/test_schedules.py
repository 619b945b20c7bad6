"""Pipeline schedules: complete, free of deadlocks, in PyTorch's order, with the published bubbles and memory."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from deepseek_arch.planning.schedules import (
    SCHEDULES,
    Part,
    check_schedule,
    operation_counts,
    rank_stages,
    schedule_operations,
    stage_count,
)
from deepseek_arch.planning.simulation import STEADY, peak_live, simulate, simulate_schedule


@st.composite
def settings_of_schedules(draw):
    """(schedule, pp, micro-batches, chunks) that every schedule can run."""
    schedule = draw(st.sampled_from(SCHEDULES))
    pp = draw(st.sampled_from([2, 4, 6]))
    chunks = {"interleaved": 2, "zero_bubble": draw(st.integers(1, 2))}.get(schedule, 1)
    micro_batches = pp * draw(st.integers(2, 5))
    if schedule in ("1f1b", "zbv"):
        micro_batches = draw(st.integers(1, 20))
    return schedule, pp, micro_batches, chunks


@st.composite
def durations_of(draw, stages):
    seconds = st.floats(0.2, 2.0)
    table = {kind: draw(st.lists(seconds, min_size=stages, max_size=stages)) for kind in "FIW"}

    def duration(operation):
        return sum(
            table["I"][stage] + table["W"][stage] if kind == "B" else table[kind][stage] for kind, stage, _ in operation
        )

    return duration


@given(settings_of_schedules())
def test_every_stage_sees_every_micro_batch_once_in_each_direction(setting):
    schedule, pp, micro_batches, chunks = setting
    forward, backward, weights = Counter(), Counter(), Counter()
    for rank, operations in enumerate(schedule_operations(*setting)):
        for operation in operations:
            for kind, stage, micro in operation:
                assert stage in rank_stages(schedule, pp, rank, chunks)
                forward[stage, micro] += kind == "F"
                backward[stage, micro] += kind in "BI"
                weights[stage, micro] += kind in "BW"
    expected = {(s, m): 1 for s in range(stage_count(schedule, pp, chunks)) for m in range(micro_batches)}
    assert forward == backward == weights == expected


@given(settings_of_schedules(), st.data())
def test_no_order_waits_for_itself_and_no_time_is_lost(setting, data):
    schedule, pp, _, chunks = setting
    stages = stage_count(schedule, pp, chunks)
    duration = data.draw(durations_of(stages))
    ranks = schedule_operations(*setting)
    run = simulate(ranks, stages, duration)
    work = [sum(map(duration, operations)) for operations in ranks]
    assert run.busy == pytest.approx(work)
    assert max(work) <= run.seconds + 1e-9 <= sum(work) + 1e-6
    assert simulate(ranks, stages, duration, hop=0.5).seconds >= run.seconds - 1e-9


def by_torch(schedule: str, pp: int, micro_batches: int, chunks: int, rank: int):
    """The order that PyTorch's schedule of the same name runs."""
    kinds = {
        "interleaved": torch_schedules.ScheduleInterleaved1F1B,
        "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
        "zbv": torch_schedules.ScheduleZBVZeroBubble,
        "dualpipev": torch_schedules.ScheduleDualPipeV,
    }
    made = object.__new__(kinds[schedule])  # its constructor needs stages with modules on process groups
    made.pp_group_size, made._n_microbatches, made.n_local_stages = pp, micro_batches, chunks
    made.num_stages = made._num_stages = pp * chunks
    made.number_of_rounds = max(1, micro_batches // pp)
    made.microbatches_per_round = micro_batches // made.number_of_rounds
    names = {
        torch_schedules.F: "F",
        torch_schedules.FULL_BACKWARD: "B",
        torch_schedules.I: "I",
        torch_schedules.W: "W",
    }
    actions = [action for action in made._calculate_single_rank_operations(rank) if action is not None]
    return tuple(
        tuple(
            Part(names[a.computation_type], a.stage_index, a.microbatch_index) for a in action.sub_actions or (action,)
        )
        for action in actions
    )


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1), ("zero_bubble", 2), ("zbv", 2), ("dualpipev", 2)],
)
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (2, 10), (4, 8), (4, 16), (8, 24)])
def test_orders_are_those_of_torch(schedule, chunks, pp, micro_batches):
    for rank, operations in enumerate(schedule_operations(schedule, pp, micro_batches, chunks)):
        assert operations == by_torch(schedule, pp, micro_batches, chunks, rank)


# --------------------------------------------------------------------- published


def bubble(schedule: str, pp: int, micro_batches: int, chunks: int, times: dict[str, float]) -> float:
    def duration(operation):
        return sum(times[kind] for kind, _, _ in operation) if len(operation) == 1 else times["pair"]

    stages = stage_count(schedule, pp, chunks)
    run = simulate(schedule_operations(schedule, pp, micro_batches, chunks), stages, duration)
    return run.seconds - max(run.busy)


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_bubbles_are_the_published_ones(pp):
    """arXiv 2412.19437, table 2: 1F1B (PP-1)(F+B), ZB1P (PP-1)(F+B-2W); interleaving divides by the chunks."""
    times = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
    assert bubble("1f1b", pp, 4 * pp, 1, times) == pytest.approx((pp - 1) * 3)
    assert bubble("zero_bubble", pp, 4 * pp, 1, times) == pytest.approx((pp - 1) * 1)
    assert bubble("interleaved", pp, 4 * pp, 2, times) == pytest.approx((pp - 1) * 3)  # of chunks half as long
    # Its order has no gap: what is left is the last rank's later start, over stages half as long.
    assert bubble("zbv", pp, 4 * pp, 1, times) == pytest.approx(pp - 1)


def test_dualpipe_loses_what_its_authors_say():
    """(PP/2-1)(F&B+B-3W) where a pair takes as long as its parts; the first pair in the middle is taken apart."""
    for pp in (4, 8, 16):
        times = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "pair": 3.0}
        assert bubble("dualpipe", pp, 4 * pp, 1, times) == pytest.approx((pp / 2 - 1) * (3 + 2 - 3))


def test_micro_batches_in_flight_are_the_published_numbers():
    """1F1B rank r holds PP - r, DualPipe PP + 1 of either direction (arXiv 2412.19437, table 2)."""

    def in_flight(schedule, pp):
        ranks = schedule_operations(schedule, pp, 4 * pp)
        return [peak_live(operations, lambda stage: 1.0, lambda stage: 0.0) for operations in ranks]

    assert in_flight("1f1b", 8) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert in_flight("zero_bubble", 8) == [8] * 8
    assert in_flight("dualpipe", 8) == [9] * 8
    assert in_flight("dualpipev", 8) == [17] * 8
    assert in_flight("zbv", 8) == [16] * 8


@given(settings_of_schedules(), st.data())
def test_peak_memory_does_not_depend_on_further_micro_batches(setting, data):
    schedule, pp, _, chunks = setting
    sizes = data.draw(st.lists(st.floats(0.5, 2.0), min_size=12, max_size=12))
    few, many = (schedule_operations(schedule, pp, count * pp, chunks) for count in (4, 10))
    for a, b in zip(few, many, strict=True):
        one, other = (peak_live(ops, sizes.__getitem__, lambda stage: sizes[-stage]) for ops in (a, b))
        assert one == pytest.approx(other)


def extended_and_whole(setting, duration):
    schedule, pp, _, chunks = setting
    count = (STEADY + 9) * pp
    count += count % 2
    whole = simulate(
        schedule_operations(schedule, pp, count, chunks), stage_count(schedule, pp, chunks), duration, hop=0.1
    )
    return simulate_schedule(schedule, pp, count, chunks, duration, hop=0.1), whole


@given(settings_of_schedules(), st.lists(st.floats(0.5, 2.0), min_size=4, max_size=4))
def test_long_schedules_of_equal_stages_are_extended_exactly(setting, seconds):
    times = dict(zip("FBIW", seconds, strict=True))
    short, whole = extended_and_whole(setting, lambda operation: sum(times[kind] for kind, _, _ in operation))
    assert short.seconds == pytest.approx(whole.seconds, rel=1e-9)
    assert short.busy == pytest.approx(whole.busy, rel=1e-9)


@given(settings_of_schedules(), st.data())
def test_long_schedules_of_unequal_stages_are_extended_nearly(setting, data):
    """Busy time is exact; a wait that is slower by a little may determine rounds only after those that were run."""
    duration = data.draw(durations_of(stage_count(setting[0], setting[1], setting[3])))
    short, whole = extended_and_whole(setting, duration)
    assert short.seconds == pytest.approx(whole.seconds, rel=0.02)
    assert short.busy == pytest.approx(whole.busy, rel=1e-9)


def test_counts_are_those_of_the_operations():
    ranks = schedule_operations("dualpipe", 4, 12)
    for operations, counts in zip(ranks, operation_counts("dualpipe", 4, 12), strict=True):
        assert sum(counts.values()) == len(operations)
        assert sum(n for key, n in counts.items() if len(key) == 2) == sum(len(op) == 2 for op in operations)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpipe", 2, 4), "expected a schedule of 1f1b, .*, got 'gpipe'"),
        (("1f1b", 2, 0), "at least one micro-batch, got 0"),
        (("interleaved", 4, 8, 1), "at least 2 chunks"),
        (("interleaved", 4, 6, 2), "multiples of pp = 4"),
        (("dualpipe", 4, 6), "at least 2 pp = 8"),
        (("dualpipe", 3, 8), "even pp and micro-batches"),
        (("dualpipe", 4, 9), "even pp and micro-batches"),
    ],
)
def test_what_a_schedule_cannot_run_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(*arguments)


def test_orders_that_cannot_run_are_refused():
    ranks = [[(Part("F", 0, 0),), (Part("B", 0, 0),)], [(Part("B", 1, 0),), (Part("F", 1, 0),)]]
    with pytest.raises(ValueError, match=r"got ranks \[0, 1\] waiting"):
        simulate(ranks, 2, lambda operation: 1.0)
