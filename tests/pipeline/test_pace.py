"""Time left: counted work at first, finished jobs of the same rule afterwards."""

import pytest

from cospadi.factorization.work import ONE_CORE
from cospadi.pipeline.pace import UNKNOWN, Pace
from cospadi.pipeline.plan import START, seconds_per_job
from cospadi.pipeline.study import Study


def test_a_rule_without_finished_jobs_costs_what_was_counted():
    pace = Pace({"factorize": 100.0})
    assert pace.job("factorize") == 100.0
    assert pace.job("tabulate") == UNKNOWN


def test_finished_jobs_of_a_rule_replace_what_was_counted():
    pace = Pace({"factorize": 7200.0})
    pace.learn("factorize", 4.0)
    pace.learn("factorize", 6.0)
    assert pace.job("factorize") == 5.0


def test_other_rules_learn_how_much_longer_jobs_take():
    pace = Pace({"factorize": 1000.0, "evaluate": 50.0})
    pace.learn("factorize", 3000.0)
    assert pace.job("evaluate") == pytest.approx(150.0, rel=0.05)


def test_jobs_of_the_smoke_study_are_counted_as_little_more_than_their_start():
    counted = seconds_per_job(Study("smoke"), ONE_CORE)
    of_the_loss = {"fisher", "expect_losses"}
    assert set(counted) == {"calibrate", *of_the_loss, "factorize", "quantize", "evaluate_dense", "evaluate"}
    assert all(START <= seconds < START + 5 for rule, seconds in counted.items() if rule != "quantize"), counted
