"""Which projections share a dictionary: the same one of consecutive layers, those of one input, or the two closest.

A group is a tuple of projections of equal shape. The first one stores what all share. Every projection is in exactly one
group, most often alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import networkx
import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.factorization.factors import Factors
from cospadi.factorization.methods import factorize_groups
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import MATCHED, SAME_INPUT, FactorizationConfig, GroupedConfig, layers_together
from cospadi.factorization.solvers.whitening import whitener
from cospadi.models import Projection

Group = tuple[Projection, ...]
"""Projections that share; most often one alone."""
SKETCH = 128
"""Columns of a sketch: distances between sketches are those between the matrices within some ten percent."""


def problems_from(
    weight_of: Callable[[Projection], Tensor],
    statistics_of: Callable[[Projection], tuple[Tensor, Tensor]],
    damping: float,
    ranks: Mapping[str, int | None] | None = None,
    metric_of: Callable[[Projection, Tensor], tuple[Tensor, Tensor | None]] | None = None,
    ratios: Mapping[str, float] | None = None,
) -> Callable[[Projection], Problem]:
    """A function that makes problems; those that read the same input share its whitener while any of them is in use.

    Args:
        weight_of: the weight of a projection, ``d_in × d_out``.
        statistics_of: gram and mean absolute activation of its input.
        damping: of the whitener.
        ranks: of every projection, ``None`` where it stays dense; by default from the ratio.
        metric_of: from a projection and its gram, the gram and the roots of column weights that the loss asks for.
        ratios: of every projection; by default that of the settings.
    """
    beside: WeakValueDictionary[tuple[int, str, bool], Problem] = WeakValueDictionary()

    def problem_of(projection: Projection) -> Problem:
        key = projection.layer, projection.shared_input, projection.attended
        columns = None
        try:
            if metric_of is not None:  # of every projection its own: siblings have none in common
                gram, absolute_mean = statistics_of(projection)
                gram, columns = metric_of(projection, gram)
                root = whitener(gram, damping)
            elif (sibling := beside.get(key)) is not None:
                root = sibling.whitener
                absolute_mean = sibling.absolute_mean
            else:
                gram, absolute_mean = statistics_of(projection)
                root = whitener(gram, damping)
            rank = ranks[projection.name] if ranks else None
            keep_dense = ranks is not None and rank is None
            ratio = ratios[projection.name] if ratios else None
            problem = Problem(weight_of(projection), root, absolute_mean, rank, keep_dense, columns, ratio)
        except UserError as error:
            raise UserError(f"{projection.name}: {error}") from error
        beside[key] = problem
        return problem

    return problem_of


def factorized(
    config: FactorizationConfig,
    groups: Iterable[Sequence[Group]],
    problem_of: Callable[[Projection], Problem],
) -> Iterator[tuple[Group, list[Problem], list[Factors]]]:
    """Every group with its problems and its factors. ``groups`` come in runs that are in memory together.

    Raises:
        UserError: naming the projections that cannot be factorized.
    """
    for run in groups:
        problems = [[problem_of(projection) for projection in group] for group in run]
        solved = factorize_groups(config, problems)
        for group, members in zip(run, problems, strict=True):
            try:
                factors = next(solved)
            except UserError as error:
                raise UserError(f"{', '.join(p.name for p in group)}: {error}") from error
            yield group, members, factors
        # A model's problems do not fit into memory together: these go before those of the next run are made.
        del problems, solved, members, factors


def groups_of(
    config: FactorizationConfig, projections: Sequence[Projection], problem_of: Callable[[Projection], Problem]
) -> list[Group]:
    """The groups that a method makes of these projections, in the order of their first members.

    ``projections`` are those of whole groups (`require_whole_groups`). Problems are only read where closeness is asked for.

    Raises:
        UserError: projections of a group differ in shape.
    """
    if not isinstance(config, GroupedConfig) or not config.shares:
        return [(p,) for p in projections]
    if config.pairing == MATCHED:
        named = config.grouped or {p.projection for p in projections}
        return matched(projections, _sketches([p for p in projections if p.projection in named], problem_of))
    grouped = config.grouped or shared_by_default(projections)
    return consecutive(projections, config.group_size, grouped, siblings=config.pairing == SAME_INPUT)


def consecutive(
    projections: Sequence[Projection], size: int, grouped: Sequence[str], siblings: bool = False
) -> list[Group]:
    """Same-named projections of ``size`` consecutive layers, counted from layer 0; the rest at the end is a smaller group.

    With ``siblings`` those of equal shape that read the same input, weighted alike, are in one group, too.

    Raises:
        UserError: those of a group differ in shape.
    """
    groups: dict[tuple[Any, ...], list[Projection]] = {}
    for p in projections:
        kind = (p.shared_input, p.attended, _shape(p)) if siblings else (p.projection,)
        key = (p.layer // size, *kind) if p.projection in grouped else (p.name,)
        groups.setdefault(key, []).append(p)
    for group in groups.values():
        first = group[0]
        for p in group:
            if (p.d_in, p.d_out) != (first.d_in, first.d_out):
                raise UserError(
                    f"{first.name} is {first.d_in}×{first.d_out} and {p.name} {p.d_in}×{p.d_out}: they cannot share. "
                    f"Leave {p.projection} out of factorization.grouped, or set factorization.group_size=1."
                )
    return [tuple(group) for group in groups.values()]


def shared_by_default(projections: Sequence[Projection]) -> list[str]:
    """Projections whose input feeds several, none of which is wider.

    A narrow one saves little by sharing: with grouped-query attention k and v stay private, as do o and down, which have
    their inputs to themselves.
    """
    widths: dict[tuple[int, str], list[int]] = {}
    for p in projections:
        widths.setdefault((p.layer, p.shared_input), []).append(p.d_out)

    def private(p: Projection) -> bool:
        beside = widths[p.layer, p.shared_input]
        return len(beside) < 2 or p.d_out < max(beside)

    return sorted({p.projection for p in projections} - {p.projection for p in projections if private(p)})


def matched(projections: Sequence[Projection], sketches: Mapping[str, Float[Tensor, "d_in n"]]) -> list[Group]:
    """Pairs of equal shape with the least sum of distances, of those that have a sketch; as many pairs as there can be.

    Minimum-weight perfect matching on the complete graph of every shape (as GeoPair pairs layers); where their number is
    odd, one stays alone.
    """
    order = {p.name: i for i, p in enumerate(projections)}
    groups: list[Group] = [(p,) for p in projections if p.name not in sketches]
    candidates = sorted((p for p in projections if p.name in sketches), key=_shape)
    for _, run in itertools.groupby(candidates, _shape):
        members = list(run)
        graph = networkx.Graph()
        graph.add_nodes_from(range(len(members)))
        vectors = torch.stack([sketches[p.name].flatten() for p in members]).double().cpu()
        apart = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        for i, j in itertools.combinations(range(len(members)), 2):
            graph.add_edge(i, j, weight=-float(apart[i, j]))
        pairs = networkx.max_weight_matching(graph, maxcardinality=True)
        groups += [tuple(sorted((members[i], members[j]), key=lambda p: order[p.name])) for i, j in pairs]
        groups += [(members[i],) for i in set(graph) - set(itertools.chain.from_iterable(pairs))]
    return sorted(groups, key=lambda group: order[group[0].name])


@torch.no_grad()
def gram_root(whitener: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in d_in"]:
    """The symmetric ``G^½`` of ``G = RᵀR``."""
    values, vectors = torch.linalg.eigh(whitener.mT @ whitener)
    return vectors * values.clamp_min(0).sqrt() @ vectors.mT


@torch.no_grad()
def sketch(weight: Float[Tensor, "d_in d_out"], root: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in n"]:
    """``A Ω`` for ``A = G^½ W Wᵀ G^½ / ‖…‖_F``, ``G = RᵀR``, and a fixed Gaussian ``Ω``: what distances are taken between.

    ``A`` says which input directions, in units of output, the columns of a weight span and how much of it lies in each:
    what a shared dictionary has to hold. It does not change when outputs are permuted or rotated among themselves, and the
    symmetric root, unlike a Cholesky factor, gives all layers the same coordinates. ``‖A_i − A_j‖² = 2 − 2 CKA`` of the two
    whitened weights (arXiv:1905.00414). That GeoPair matches on a distance between whitened weights is the paper's; this
    distance is ours. The sketch keeps it within some ten percent (Johnson-Lindenstrauss) at ``SKETCH / d_in`` of the memory.
    """
    spanned = root @ weight.to(root.dtype)
    n = min(SKETCH, len(spanned))
    draw = torch.randn(len(spanned), n, generator=torch.Generator().manual_seed(0), dtype=root.dtype).to(root.device)
    scale = (spanned.mT @ spanned if spanned.shape[0] > spanned.shape[1] else spanned @ spanned.mT).norm()
    return (spanned @ (spanned.mT @ draw) / scale.clamp_min(torch.finfo(root.dtype).tiny) / n**0.5).float()


def _sketches(projections: Sequence[Projection], problem_of: Callable[[Projection], Problem]) -> dict[str, Tensor]:
    """Sketches of all weights. Those of one input come one after another, to share its whitener and the root of its gram."""
    sketches = {}
    for _, run in itertools.groupby(projections, key=lambda p: (p.layer, p.shared_input)):
        members = list(run)
        problems = [problem_of(p) for p in members]
        root = gram_root(problems[0].whitener)
        sketches |= {p.name: sketch(problem.weight, root) for p, problem in zip(members, problems, strict=True)}
    return sketches


def runs_in_memory(
    config: FactorizationConfig, groups: Sequence[Group], device: torch.device
) -> Iterator[Sequence[Group]]:
    """Runs of groups whose problems are in memory together.

    On a CPU these are groups of one shared input, which have their whiteners in common. A GPU takes as many layers as it
    has room for, groups of one shape side by side, so that they are solved as one batch. Matched pairs come one by one.
    """
    if not groups:
        return iter(())
    if isinstance(config, GroupedConfig) and config.pairing == MATCHED:
        return ([group] for group in groups)
    layers = config.group_size if isinstance(config, GroupedConfig) else 1
    if device.type == "cuda":
        return _that_fit(groups, layers, torch.cuda.mem_get_info(device)[0])
    return _by_shared_input(groups, layers)


def _by_shared_input(groups: Sequence[Group], layers: int) -> Iterator[list[Group]]:
    """Groups of the same ``layers`` consecutive layers that read the same inputs."""
    order: dict[str, int] = {}
    for position, group in enumerate(groups):
        order.setdefault(group[0].shared_input, position)
    ordered = sorted(groups, key=lambda group: (group[0].layer // layers, order[group[0].shared_input]))
    runs = itertools.groupby(ordered, key=lambda group: (group[0].layer // layers, group[0].shared_input))
    return (list(run) for _, run in runs)


def _that_fit(groups: Sequence[Group], layers: int, free_bytes: int) -> Iterator[list[Group]]:
    """Groups of as many times ``layers`` layers as half the free memory has room for, sorted by shape."""
    blocks = [list(run) for _, run in itertools.groupby(groups, lambda group: group[0].layer // layers)]
    # A gram and a whitener in float64; then weight, target, factors and the solver's state.
    needed = max(sum(16 * p.d_in**2 + 64 * p.d_in * p.d_out for group in block for p in group) for block in blocks)
    at_once = max(1, int(free_bytes / 2 // needed))
    for first in range(0, len(blocks), at_once):
        window = itertools.chain.from_iterable(blocks[first : first + at_once])
        yield sorted(window, key=lambda group: (len(group), *_shape(group[0])))


def require_whole_groups(config: FactorizationConfig, first: int, last: int, n_layers: int) -> None:
    """
    Raises:
        UserError: when layers ``first`` to ``last`` of ``n_layers`` cut a group.
    """
    step = layers_together(config, n_layers)
    if first % step == 0 and ((last + 1) % step == 0 or last >= n_layers - 1):
        return
    begin = first - first % step
    end = min((last // step + 1) * step, n_layers) - 1
    why = f"factorization.pairing={MATCHED}" if config.pairing == MATCHED else f"factorization.group_size={step}"
    raise UserError(
        f"--layers {first:03d}-{last:03d} cuts a group of layers that share ({why}). "
        f"Set --layers {begin:03d}-{end:03d}."
    )


def _shape(p: Projection) -> tuple[int, int]:
    return p.d_in, p.d_out
