"""Problems of a stage, read from what the rooms before left on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cospadi.calibration.fisher import loss_metric, read_fisher
from cospadi.calibration.statistics import read_statistics
from cospadi.errors import UserError
from cospadi.factorization.groups import problems_from
from cospadi.factorization.problem import Problem
from cospadi.models import Checkpoint, Projection
from cospadi.settings import Config


def problems_of(
    config: Config,
    model: Path,
    grams: Path,
    fisher: Path | None,
    device: torch.device,
    ranks: Mapping[str, int | None] | None = None,
    ratios: Mapping[str, float] | None = None,
) -> Callable[[Projection], Problem]:
    """A function that makes the problem of a projection when its turn comes, in the metric that the method asks for.

    Raises:
        UserError: the method asks what the loss cares about, and ``fisher`` is not given.
    """
    checkpoint = Checkpoint(model)
    needs_fisher = config.factorization.needs_fisher
    if needs_fisher and fisher is None:
        raise UserError(
            "factorization.objective=loss needs --fisher, the folder that `cospadi fisher` writes. Give it, or set objective=output."
        )

    def metric_of(projection: Projection, gram: Tensor) -> tuple[Tensor, Tensor | None]:
        of_loss = read_fisher(fisher, projection.layer, projection.projection, device)
        return loss_metric(gram, *of_loss, config.calibration.fisher.blend)

    def statistics_of(projection: Projection) -> tuple[Tensor, Tensor]:
        attended = projection.attended and not needs_fisher  # whoever reads keys and values is in the gradients already
        return read_statistics(grams, projection.layer, projection.shared_input, device, attended)

    return problems_from(
        lambda p: checkpoint.weight(p).to(device),
        statistics_of,
        config.calibration.damping,
        ranks,
        metric_of if needs_fisher else None,
        ratios,
    )
