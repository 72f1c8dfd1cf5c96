"""A W&B workspace as code: the panels that compare the methods of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from cospadi.tables.metrics import AVERAGE, METRICS
from cospadi.tables.style import colours
from cospadi.tracking.mode import Reach
from cospadi.tracking.runs import Run
from cospadi.tracking.settings import TrackingConfig

RUN_NAME = "${run:displayName}"
"""Template of a legend's entries."""
RATIO = wr.Config("compression_ratio")
SIZE = wr.SummaryMetric("stored_mb")
HEADLINES = ("token_perplexity", AVERAGE.name)
"""Metrics that are pinned, and drawn as bars too."""
COSTS = ("stored_mb", "factorize_seconds", "peak_memory_mb")


def build(study: str, title: str, runs: Sequence[Run], tracking: TrackingConfig) -> ws.Workspace:
    """Quality against ratio and size, errors layer by layer, costs. A method has one colour in all panels."""
    cells = [run for run in runs if run.job_type == "cell"]
    palette = colours(list(dict.fromkeys(run.config["method"] for run in cells)))
    return ws.Workspace(
        entity=tracking.entity or "",
        project=tracking.project,
        name=f"{study}: {title}"[:128],
        sections=_sections(runs),
        settings=ws.WorkspaceSettings(max_runs=max(10, len(runs))),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Config("study") == study),
            pinned_columns=["config:compression_ratio", *(f"summary:{name}" for name in HEADLINES)],
            run_settings={run.id: ws.RunSettings(color=palette[run.config["method"]]) for run in cells},
        ),
    )


def _sections(runs: Sequence[Run]) -> list[ws.Section]:
    measured = sorted({name for run in runs for name in run.summary if f"{name}_stderr" in run.summary})
    projections = dict.fromkeys(
        key.partition("/")[2] for run in runs for row in run.layers for key in row if "/" in key
    )
    quality = [
        _points("token_perplexity", RATIO, "ratio", METRICS["token_perplexity"].is_logarithmic),
        _points(AVERAGE.name, RATIO, "ratio", AVERAGE.is_logarithmic),
        _points("token_perplexity", SIZE, "megabytes of projections", METRICS["token_perplexity"].is_logarithmic),
        _points("kl_to_dense", RATIO, "ratio", METRICS["kl_to_dense"].is_logarithmic),
        *(_bars(name, len(runs)) for name in HEADLINES),
    ]
    errors = [_lines(name, len(runs)) for name in projections]
    return [
        ws.Section(name="Quality", is_open=True, panels=quality),
        ws.Section(name="Error per layer", is_open=True, panels=errors),
        ws.Section(name="Tasks and measurements", panels=[_points(name, RATIO, "ratio") for name in measured]),
        ws.Section(name="Cost", panels=[_bars(name, len(runs)) for name in COSTS]),
    ]


def _points(metric: str, against: wr.Config | wr.SummaryMetric, label: str, log: bool = False) -> wr.ScatterPlot:
    return wr.ScatterPlot(
        title=f"{metric.replace('_', ' ').capitalize()} against {label}",
        x=against,
        y=wr.SummaryMetric(metric),
        log_y=log,
        legend_template=RUN_NAME,
    )


def _lines(projection: str, n_runs: int) -> wr.LinePlot:
    return wr.LinePlot(
        title=f"Output error per layer, {projection.replace('_', ' ')}",
        x="layer",
        y=[f"output_error/{projection}"],
        title_x="layer",
        max_runs_to_show=n_runs,
        legend_template=RUN_NAME,
    )


def _bars(metric: str, n_runs: int) -> wr.BarPlot:
    return wr.BarPlot(
        title=metric.replace("_", " ").capitalize(),
        metrics=[metric],
        max_runs_to_show=n_runs,
        max_bars_to_show=100,
    )


def definition(workspace: ws.Workspace) -> dict[str, Any]:
    """A workspace as W&B stores it: entity, project, name and ``spec``."""
    view = workspace._to_model()  # nothing public gives it; ``save`` sends exactly this
    return {
        "entity": view.entity,
        "project": view.project,
        "name": view.display_name,
        "spec": view.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def save(workspace: ws.Workspace, url: str | None, reach: Reach) -> dict[str, str | None]:
    """Make the view in W&B, or bring the one at ``url`` up to date; its address, or why there is none."""
    try:
        workspace.entity = workspace.entity or reach.entity or ""
        if url:
            saved = ws.Workspace.from_url(url)
            for part in ("name", "sections", "settings", "runset_settings"):
                setattr(saved, part, getattr(workspace, part))
            workspace = saved
        return {"url": workspace.save().url, "why": None}
    except Exception as error:  # noqa: BLE001 - whatever W&B raises, the definition is in the file
        return {"url": url, "why": f"W&B did not take it ({type(error).__name__}: {error})"}
