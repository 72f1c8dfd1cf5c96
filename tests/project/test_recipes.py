"""The recipes of docs/extend.md, each followed once: what they name is enough. Number formats are in tests/quantization."""

from dataclasses import dataclass, replace

import pytest
import torch

from cospadi.errors import UserError
from cospadi.factorization import cost
from cospadi.factorization.factors import STORAGE_DTYPES, SparseDictionary, stored_bits
from cospadi.factorization.methods import alone, factorize, factorize_groups
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import CoSpaDiConfig, FactorizationConfig
from cospadi.factorization.solver_table import SOLVERS, Solver
from cospadi.factorization.solvers.htp import largest, relative_error
from cospadi.factorization.solvers.solution import Solution
from cospadi.factorization.work import Work
from cospadi.models import find_projections
from cospadi.sources.checkpoints import prepare_model
from cospadi.sources.settings import ModelConfig
from cospadi.tables import cells
from cospadi.tables.cells import Cell, summary
from cospadi.tables.metrics import METRICS, Metric
from cospadi.tables.numbers import percent
from cospadi.tables.overview import overview
from cospadi.tables.render import paper_table


def problem(d_in=32, d_out=24):
    draw = torch.Generator().manual_seed(0)
    return Problem(torch.randn(d_in, d_out, generator=draw), torch.eye(d_in, dtype=torch.float64), torch.ones(d_in))


@dataclass
class FirstRowsConfig(FactorizationConfig):
    """Keeps the first inputs and drops the others."""


def first_rows(config: FirstRowsConfig, problem: Problem):
    kept = int((16 * (1 - config.compression_ratio) - 1) / 16 * len(problem.weight))
    sparse = problem.weight.clone()
    sparse[kept:] = 0
    return SparseDictionary.of_sparse_weight(sparse, STORAGE_DTYPES[config.storage_dtype])


def test_a_method_is_a_settings_class_a_function_and_its_work():
    config = FirstRowsConfig(name="first_rows", title="First rows", compression_ratio=0.5)
    with pytest.raises(UserError, match="No factorization method is registered for FirstRowsConfig"):
        factorize(config, problem())
    with pytest.raises(UserError, match="Nothing is known about the work of FirstRowsConfig"):
        cost.factorize(config, 32, 24)
    alone(first_rows)

    @cost.own_work.register
    def first_rows_work(config: FirstRowsConfig, d_in: int, d_out: int, members: int) -> Work:
        return Work(memory=4 * d_in * d_out)

    factors = factorize(config, problem())
    assert stored_bits(factors) <= 0.5 * 16 * 32 * 24
    assert cost.factorize(config, 32, 24).memory == 4 * 32 * 24
    with pytest.raises(UserError, match="FirstRowsConfig shares nothing"):
        next(factorize_groups(config, [[problem(), problem()]]))


def threshold(target: torch.Tensor, atoms: int, sparsity: int) -> Solution:
    """The unit basis, and the largest entries of every column."""
    basis = torch.eye(len(target))[:, :atoms]
    codes = target.T @ basis
    codes *= largest(codes, sparsity)
    return Solution(basis, codes.T, [relative_error(target, basis @ codes.T)])


def test_a_solver_is_a_function_and_a_row(monkeypatch):
    with pytest.raises(UserError, match="solver=threshold is not known"):
        CoSpaDiConfig(name="t", title="t", solver="threshold")
    row = Solver(
        f"{__name__}:threshold",
        rounds=1,
        work=lambda config, sizes, rounds: Work(product=2 * sizes.d_in * sizes.d_out * sizes.atoms),
        reports_progress=False,
        within_eigenbasis=True,
    )
    monkeypatch.setitem(SOLVERS, "threshold", row)
    config = CoSpaDiConfig(name="t", title="t", solver="threshold", compression_ratio=0.3)
    factors = factorize(config, problem())
    assert stored_bits(factors) <= 0.7 * 16 * 32 * 24
    assert (factors.weight() - problem().weight).norm() < problem().weight.norm()
    assert cost.factorize(config, 32, 24).product > 0


def test_a_model_family_is_settings(tmp_path):
    """Phi-3 has fused projections, and needs their names alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModelConfig(
        name="tiny_phi3",
        title="Phi-3",
        source="random:phi3",
        architecture=sizes | {"num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 64},
        shared_inputs=[["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
        attended=[],
    )
    prepare_model(config, tmp_path / "phi3")
    assert len(find_projections(tmp_path / "phi3", config)) == 2 * 4
    with pytest.raises(UserError, match=r"Set model\.blocks and model\.shared_inputs"):
        find_projections(tmp_path / "phi3", replace(config, shared_inputs=[["mlp.gate_proj"]]))


def test_a_metric_is_a_row(monkeypatch):
    metric = Metric(
        "top5_agreement", "Top-5", "Agreement within five", "%", "higher", percent, in_overview=True, of_dense=1.0
    )
    monkeypatch.setitem(METRICS, "top5_agreement", metric)
    monkeypatch.setattr(cells, "LEADING_COLUMNS", (*cells.LEADING_COLUMNS, "top5_agreement"))  # made when it is loaded
    measured = {"value": 0.873, "stderr": 0.01, "protocol": "of 100 tokens"}
    frame = summary([Cell("m", "M", "svd", "SVD", 0.2, evaluation={"top5_agreement": measured})])
    assert frame["top5_agreement"].tolist() == [0.873]
    assert "| Agreement within five (%) ↑ | 0.2 |" in overview(frame, "m")
    table = paper_table(frame, "m").markdown()
    assert "Top-5 % ↑" in table
    assert "87.3" in table
