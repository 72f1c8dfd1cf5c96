# snakemake --cores N                                     the default study
# snakemake --cores N --config study=smoke                another study of conf/study
# snakemake --cores N --config overrides='evaluation.n_windows=4 factorization.rho=2'
import os
import sys
from pathlib import Path

from cospadi.pipeline import forks, locks
from cospadi.errors import UserError
from cospadi.factorization.work import ONE_CORE
from cospadi.pipeline.plan import seconds_per_job
from cospadi.pipeline.study import Study, n_gpus, parse_overrides
from cospadi.tracking.mode import require_key

# Jobs run with the Python that runs snakemake, activated or not.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
locks.remove_stale(Path.cwd())

unknown = sorted(set(config) - {"study", "overrides"})
if unknown:
    sys.exit(
        f"error: --config knows study=… and overrides=…, not {', '.join(unknown)}. "
        "Settings are Hydra's: --config overrides='calibration.n_samples=32'."
    )
try:
    study = Study(
        str(config.get("study", "default")), parse_overrides(config.get("overrides"))
    )
    require_key(study.root.tracking)
except UserError as error:
    sys.exit(f"error: {error}")


wildcard_constraints:
    **study.wildcards,


onstart:
    locks.sign_in(Path.cwd())
    # Jobs of a GPU are long, and a card is not shared by forks.
    if not n_gpus():
        forks.start()
    # What --logger cospadi begins its estimate with; Snakemake's own logger prints no empty message.
    logger.info(
        None,
        extra={
            "expected": seconds_per_job(study, ONE_CORE),
            "cores": workflow.cores,
        },
    )


# Each GPU serves one job at a time; without any, cores are the only limit. --resources gpu=N overrules.
if n_gpus():
    workflow.global_resources.setdefault("gpu", n_gpus())


# Which jobs are stale: `recipe` holds the settings a job depends on, and Snakemake compares it. It does not compare
# params that take `output` (`overrides`): what is typed for one room leaves the others alone.
report: "workflow/report/workflow.rst"


include: "workflow/rules/sources.smk"
include: "workflow/rules/calibration.smk"
include: "workflow/rules/factorization.smk"
include: "workflow/rules/quantization.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/tracking.smk"


rule all:
    default_target: True
    input:
        study.outputs,
