"""A W&B workspace as code: the panels that compare the methods of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cospadi.tables.style import colours
from cospadi.tracking.mode import Reach
from cospadi.tracking.runs import Run
from cospadi.tracking.settings import TrackingConfig


def build(study: str, title: str, runs: Sequence[Run], tracking: TrackingConfig):
    """Quality against ratio and size, errors layer by layer, costs. A method has one colour in all panels, as in the figures."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    tasks = sorted({name for run in runs for name in run.summary if f"{name}_stderr" in run.summary})
    ratio, size = wr.Config("compression_ratio"), wr.SummaryMetric("stored_mb")
    named = "${run:displayName}"

    def points(metric: str, against, words: str, log: bool = False):
        return wr.ScatterPlot(
            title=f"{metric.replace('_', ' ').capitalize()} against {words}",
            x=against,
            y=wr.SummaryMetric(metric),
            log_y=log,
            legend_template=named,
        )

    def lines(metric: str):
        return wr.LinePlot(
            title=f"Output error per layer, {metric.replace('_', ' ')}",
            x="layer",
            y=[f"output_error/{metric}"],
            title_x="layer",
            max_runs_to_show=len(runs),
            legend_template=named,
        )

    def bars(metric: str):
        return wr.BarPlot(
            title=metric.replace("_", " ").capitalize(),
            metrics=[metric],
            max_runs_to_show=len(runs),
            max_bars_to_show=100,
        )

    projections = dict.fromkeys(
        key.partition("/")[2] for run in runs for row in run.layers for key in row if "/" in key
    )
    methods = [run.config["method"] for run in runs if run.job_type == "cell"]
    palette = colours(list(dict.fromkeys(methods)))
    return ws.Workspace(
        entity=tracking.entity or "",
        project=tracking.project,
        name=f"{study}: {title}"[:128],
        sections=[
            ws.Section(
                name="Quality",
                is_open=True,
                panels=[
                    points("token_perplexity", ratio, "ratio", log=True),
                    points("average_accuracy", ratio, "ratio"),
                    points("token_perplexity", size, "megabytes of projections", log=True),
                    points("kl_to_dense", ratio, "ratio", log=True),
                    bars("token_perplexity"),
                    bars("average_accuracy"),
                ],
            ),
            ws.Section(name="Error per layer", is_open=True, panels=[lines(name) for name in projections]),
            ws.Section(name="Tasks and measurements", panels=[points(name, ratio, "ratio") for name in tasks]),
            ws.Section(
                name="Cost", panels=[bars(name) for name in ("stored_mb", "factorize_seconds", "peak_memory_mb")]
            ),
        ],
        settings=ws.WorkspaceSettings(max_runs=max(10, len(runs))),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Config("study") == study),
            pinned_columns=["config:compression_ratio", "summary:token_perplexity", "summary:average_accuracy"],
            run_settings={
                run.id: ws.RunSettings(color=palette[run.config["method"]]) for run in runs if run.job_type == "cell"
            },
        ),
    )


def definition(workspace: Any) -> dict[str, Any]:
    """What W&B stores of it: entity, project, name and ``spec``."""
    view = workspace._to_model()  # nothing public gives it; ``save`` sends exactly this
    return {
        "entity": view.entity,
        "project": view.project,
        "name": view.display_name,
        "spec": view.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def save(workspace: Any, url: str | None, reach: Reach) -> dict[str, str | None]:
    """Make the view in W&B, or bring the one at ``url`` up to date; its address, or why there is none."""
    import wandb_workspaces.workspaces as ws

    try:
        workspace.entity = workspace.entity or reach.entity or ""
        if url:
            known = ws.Workspace.from_url(url)
            for part in ("name", "sections", "settings", "runset_settings"):
                setattr(known, part, getattr(workspace, part))
            workspace = known
        return {"url": workspace.save().url, "why": None}
    except Exception as error:  # noqa: BLE001 - whatever W&B raises, the definition is in the file
        return {"url": url, "why": f"W&B did not take it ({type(error).__name__}: {error})"}
