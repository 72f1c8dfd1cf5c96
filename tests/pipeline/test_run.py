"""The progress lines that ``make reproduce`` prints from snakemake's output."""

import re

from cospadi.pipeline import run

LOG = """\
Building DAG of jobs...
Job stats:
job              count
-------------  -------
all                  1
evaluate             2
factorize            2
total                5

[Sun Nov 22 04:46:48 2026]
rule factorize:
    input: a
    jobid: 3
    wildcards: model=m, method=svd, ratio=0.2
[Sun Nov 22 04:46:48 2026]
Finished jobid: 3 (Rule: factorize)
1 of 5 steps (20%) done
rule evaluate:
    jobid: 4
    wildcards: model=m, method=svd, ratio=0.2
Finished jobid: 4 (Rule: evaluate)
Finished jobid: 9 (Rule: factorize)
"""


def told(log: str, cores: int = 2) -> tuple[list[str], run.Narrator]:
    narrator = run.Narrator(cores)
    return [line for line in map(narrator.read, log.splitlines()) if line], narrator


def test_every_finished_job_is_a_line_with_its_cell_and_the_time_left():
    lines, narrator = told(LOG)
    assert lines[0].startswith("4 jobs")
    assert [line.split()[:2] for line in lines[1:]] == [["1/4", "factorize"], ["2/4", "evaluate"], ["3/4", "factorize"]]
    assert "m svd 0.2" in lines[1]
    assert all(re.search(r"left \d", line) for line in lines[1:])
    assert narrator.remaining == {"evaluate": 1, "factorize": 0}


def test_the_time_left_shrinks_to_nothing():
    _, narrator = told(LOG + "Finished jobid: 5 (Rule: evaluate)\n")
    assert narrator._left() == 0


def test_a_failure_is_kept_word_for_word():
    lines, narrator = told(LOG + "Error in rule evaluate:\n    log: run.log\nerror: The text is too short.\n")
    assert len(lines) == 4
    assert narrator.trouble[0] == "Error in rule evaluate:"
    assert "error: The text is too short." in narrator.trouble


def test_settings_that_do_not_compose_are_shown_without_a_traceback(capsys):
    assert run.main(["-n", "--cores", "1", "--config", "study=nope"]) != 0
    said = capsys.readouterr().err
    assert "study=nope does not exist" in said
    assert "Traceback" not in said


def test_every_rule_has_an_estimate():
    from pathlib import Path

    rules = re.findall(
        r"^rule (\w+):", "\n".join(f.read_text() for f in Path("workflow/rules").glob("*.smk")), re.MULTILINE
    )
    assert sorted(run.SECONDS) == sorted(rules)
