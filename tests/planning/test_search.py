"""The search: equal to working out every candidate, within what is fixed, and honest where nothing fits."""

from __future__ import annotations

import dataclasses

import pytest

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import LayoutError, ParallelLayout
from deepseek_arch.planning.devices import DEVICES
from deepseek_arch.planning.schedules import SCHEDULES
from deepseek_arch.planning.search import candidate_layouts, search_inference, search_training
from deepseek_arch.planning.setup import RECOMPUTE, TrainingSetup
from deepseek_arch.planning.training import plan_training

MINI = da.DeepseekConfig.from_pretrained("mini")
V3 = da.DeepseekConfig.from_pretrained("deepseek-v3")
SETUP = TrainingSetup(batch=64, sequence=1024, precision="bf16")


def every_plan(config, devices, device, setup):
    """All plans, one by one, without any bound."""
    plans = []
    for layout in candidate_layouts(config, devices, device.per_node, setup.sequence, {}):
        schedules = SCHEDULES if layout.pp > 1 else ("1f1b", "dualpipev")
        for schedule in schedules:
            for zero in (1, 2, 3):
                for recompute in RECOMPUTE:
                    chunks = 2 if schedule == "interleaved" else 1
                    changes = {"schedule": schedule, "chunks": chunks, "zero": zero, "recompute": recompute}
                    try:
                        plans.append(plan_training(config, layout, device, dataclasses.replace(setup, **changes)))
                    except LayoutError:
                        continue
    return plans


@pytest.mark.parametrize("memory", [80e9, 1.2e9])
def test_bounds_lose_nothing(memory):
    """With little memory, too, where most candidates are refused."""
    device = dataclasses.replace(DEVICES["h100"], memory=memory)
    fitting = [plan for plan in every_plan(MINI, 4, device, SETUP) if plan.fits]
    assert len(fitting) > 10
    best = sorted(plan.seconds.total for plan in fitting)[:5]
    found = search_training(MINI, 4, device, SETUP, top=5)
    assert [plan.seconds.total for plan in found.plans] == pytest.approx(best, rel=1e-12)
    assert all(plan.fits for plan in found.plans) and found.smallest is None


def test_all_that_fit_are_returned_where_bounds_are_exact():
    """With links and memory of no cost, plans without a pipeline take just the time of their lower bound."""
    free_of_cost = {"nvlink": 1e18, "network": 1e18, "memory_rate": 1e18}
    device = dataclasses.replace(DEVICES["h100"], **free_of_cost)
    found = search_training(MINI, 4, device, SETUP, fixed={"pp": 1}, top=10_000)
    assert len(found.plans) == found.considered > 50 and found.refused == 0


def test_fixed_axes_and_choices_stay():
    setup = dataclasses.replace(SETUP, schedule="1f1b")
    found = search_training(MINI, 16, "h100", setup, fixed={"pp": 2, "tp": 2}, free=("zero",))
    assert found.plans
    for plan in found.plans:
        assert (plan.layout.pp, plan.layout.tp, plan.layout.world_size) == (2, 2, 16)
        assert (plan.setup.schedule, plan.setup.recompute) == ("1f1b", "selective")


def test_candidates_divide_and_tensor_parallelism_stays_in_a_node():
    layouts = list(candidate_layouts(V3, 64, 8, 4096, {}))
    assert len(layouts) == len(set(layouts)) > 50
    for layout in layouts:
        layout.validate(V3)
        assert layout.world_size == 64 and layout.tp <= 8 and layout.cp == 1
    assert any(layout.cp > 1 for layout in candidate_layouts(V3, 64, 8, 131072, {}))


def test_where_nothing_fits_the_smallest_is_shown():
    found = search_training(V3, 8, "h200", TrainingSetup(), fixed={"pp": 1, "tp": 1})
    assert found.plans == () and not found.smallest.fits
    # Weights, gradients and optimizer states of 14 bytes a parameter exceed what eight devices have.
    assert found.smallest.memory_total > 14 * 671e9 / 8


def test_deepseek_s_layout_is_within_a_tenth_of_the_best():
    own = plan_training(V3, ParallelLayout(pp=16, ep=64).for_devices(2048), "h800")
    found = search_training(V3, 2048, "h800", TrainingSetup(), fixed={"tp": 1}, free=("zero",), top=3)
    assert len(found.plans) == 3
    assert found.plans[0].seconds.total <= own.seconds.total <= 1.1 * found.plans[0].seconds.total


def test_the_only_layout_s_problem_is_told():
    with pytest.raises(LayoutError, match="expected dp x micro_batch = 8 x 1 to divide the batch of 3 sequences"):
        search_training(MINI, 8, "h100", TrainingSetup(batch=3), fixed={"pp": 1, "tp": 1, "ep": 1, "etp": 1})
    with pytest.raises(LayoutError, match="expected a layout of 8 devices that divides the model, found none"):
        search_training(MINI, 8, "h100", SETUP, fixed={"ep": 3})


def test_serving_prefers_what_fits_and_is_fastest():
    plans = search_inference(V3, 32, "h100")
    assert all(plan.layout.world_size == 32 for plan in plans)
    rates = [plan.decode_tokens_per_second for plan in plans if plan.fits]
    assert rates == sorted(rates, reverse=True) and rates
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits, reverse=True)
