import pytest

from moe_runtime.train.recipe import TrainSection
from moe_runtime.train.schedule import first_difference, learning_rate_share


def shares(steps, **options):
    section = TrainSection(steps=steps, **options)
    return [learning_rate_share(step, steps, section) for step in range(steps)]


def test_the_schedules():
    assert shares(3, schedule="constant") == [1.0, 1.0, 1.0]
    assert shares(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    assert shares(4, schedule="cosine") == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert shares(4, schedule="linear", warmup_steps=2) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])


def test_every_restart_begins_a_whole_cycle():
    first = shares(4, schedule="linear", warmup_steps=1)
    second = shares(5, schedule="linear", warmup_steps=1)
    assert shares(9, schedule="linear", warmup_steps=1, restarts=(4,)) == first + second


def test_a_cycle_shorter_than_its_warm_up_only_warms_up():
    assert shares(3, warmup_steps=5) == pytest.approx([1 / 4, 2 / 4, 3 / 4])


def test_a_longer_run_keeps_its_rates_only_if_the_old_end_is_a_restart():
    short = TrainSection(steps=6, schedule="linear")
    assert first_difference(short, TrainSection(steps=9, schedule="linear"), 6, 9, 6) == 1
    assert first_difference(short, TrainSection(steps=9, schedule="linear", restarts=(6,)), 6, 9, 6) is None
    assert first_difference(short, TrainSection(steps=9, schedule="linear"), 6, 9, 1) is None
