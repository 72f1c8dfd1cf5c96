# snakemake --cores N                                     the default study
# snakemake --cores N --config study=smoke                another study of conf/study
# snakemake --cores N --config overrides='evaluation.n_windows=4 factorization.rho=2'
from snakemake.exceptions import WorkflowError

from cospadi.errors import UserError
from cospadi.study import Study, parse_overrides


configfile_keys = {"study", "overrides"}
if set(config) - configfile_keys:
    raise WorkflowError(
        f"--config knows study=… and overrides=…, not {', '.join(sorted(set(config) - configfile_keys))}. "
        "Settings are Hydra's: --config overrides='calibration.n_samples=32'."
    )
try:
    study = Study(config.get("study", "default"), parse_overrides(config.get("overrides")))
except UserError as error:
    raise WorkflowError(str(error)) from None


wildcard_constraints:
    **study.wildcards,


# A GPU serves one job at a time unless --resources gpu=N says there are more.
workflow.global_resources.setdefault("gpu", 1)


report: "workflow/report/workflow.rst"


include: "workflow/rules/sources.smk"
include: "workflow/rules/calibration.smk"
include: "workflow/rules/factorization.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/tables.smk"


rule all:
    default_target: True
    input:
        f"results/tables/{study.name}/summary.csv",
