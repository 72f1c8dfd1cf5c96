"""What is shown of a running study."""

import io

import pytest
from rich.console import Console

from cospadi.pipeline import watch


@pytest.fixture
def told():
    stream = io.StringIO()
    shown = watch.Watch(Console(file=stream, width=200, soft_wrap=True, highlight=False))
    shown.begin({"all": 1, "factorize": 2, "evaluate": 1, "total": 4})
    shown.expect({"factorize": 100.0, "evaluate": 50.0}, cores=2)
    yield shown, stream
    shown.close()


def test_the_first_line_counts_jobs_and_time(told):
    assert told[1].getvalue() == "3 jobs, roughly 2.1 min on 2 cores\n"


def test_a_finished_job_is_a_line_with_its_cell_and_the_time_left(told, monkeypatch):
    shown, stream = told
    now = watch.time.monotonic()
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    shown.start(3, "factorize", {"model": "m", "method": "svd", "ratio": "0.2"}, ["run.log"], threads=1)
    now += 10
    shown.finish(3)
    line = stream.getvalue().splitlines()[-1]
    assert line.split() == ["1/3", "factorize", "m", "svd", "0.2", "took", "10.0", "s", "left", line.split()[-2], "s"]
    # one factorize of 10 s, as the finished one; one evaluate of 50 s times (10 + 30) / (100 + 30)
    assert shown.left() == pytest.approx((10 + 50 * 40 / 130) / 2)


def test_a_running_job_shows_its_last_line_and_its_log(told, tmp_path):
    shown, _ = told
    log = tmp_path / "run.log"
    log.write_text("1/8  layers.0  left 2 min\n2/8  layers.1  left 1 min\n\n")
    shown.start(4, "evaluate", {"model": "m"}, [str(log)], threads=1)
    (line,) = shown._jobs()
    assert "2/8  layers.1  left 1 min" in line
    assert line.endswith(f"log: {log}")


def test_a_failed_job_shows_the_end_of_its_log_and_where_it_is(told, tmp_path):
    shown, stream = told
    log = tmp_path / "run.log"
    log.write_text("".join(f"line {i}\n" for i in range(100)) + "error: The text is too short.\n")
    shown.start(4, "evaluate", {"model": "m"}, [str(log)], threads=1)
    shown.fail(4, "evaluate", [str(log)])
    said = stream.getvalue()
    assert "Failed: evaluate        m" in said
    assert "error: The text is too short." in said
    assert "line 50\n" not in said
    assert f"Its log: {log}" in said
    assert not shown.running


def test_a_file_is_never_silent_while_a_job_runs(monkeypatch):
    monkeypatch.setattr(watch, "SILENCE", 0.0)
    stream = io.StringIO()
    shown = watch.Watch(Console(file=stream, width=200))
    shown.begin({"evaluate": 1})
    shown.start(1, "evaluate", {"model": "m"}, None, threads=1)
    shown.expect({}, cores=1)
    shown._ended.wait(2.5)
    shown.close()
    assert "running  evaluate        m" in stream.getvalue()


def test_what_the_tables_say_is_shown_when_they_are_done(told, tmp_path):
    """Who won, and where the report is."""
    shown, stream = told
    shown.waiting["tabulate"] = 1
    log = tmp_path / "run.log"
    log.write_text("m, 30% of the bits removed: CoSpaDi comes nearest.\nReport: results/tables/s/report.html\n")
    shown.start(5, "tabulate", {"study": "s"}, [str(log)], threads=1)
    shown.finish(5)
    assert stream.getvalue().rstrip().endswith("CoSpaDi comes nearest.\nReport: results/tables/s/report.html")
