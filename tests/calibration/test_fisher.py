"""What the loss cares about: block by block as through the whole model, and as by the definition."""

import json

import pytest
import torch

from cospadi.api import compress_to
from cospadi.calibration import fisher
from cospadi.calibration.collect import draw_samples
from cospadi.errors import UserError
from cospadi.kernels.next_token import drawn
from cospadi.models import load, load_tokenizer
from cospadi.settings import load as settings
from cospadi.sources.checkpoints import prepare_model

DOCUMENTS = [f"Line {i} of a text that says little, and says it {i % 7} times." for i in range(200)]
SETTINGS = ["calibration.n_samples=6", "calibration.sample_length=48", "calibration.device=cpu"]


@pytest.fixture(scope="module")
def config():
    return settings(["model=tiny_qwen3", *SETTINGS])


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    prepare_model(config.model, folder)
    return folder


@pytest.fixture(scope="module")
def tokens(folder):
    return draw_samples(load_tokenizer(folder), DOCUMENTS, 6, 48, 0)


@pytest.fixture
def network(folder):
    return load(folder, "float32", torch.device("cpu"))


def by_definition(network, name: str, tokens: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``Σ_t s_t x_t x_tᵀ`` and ``Σ_t g_tj²``, a token at a time."""
    draw = torch.Generator().manual_seed(seed)
    layer = network.get_submodule(name)
    gram = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
    columns = torch.zeros(layer.out_features, dtype=torch.float64)
    seen = {}
    hook = layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0].detach(), y=out))
    for ids in tokens:
        hidden = network.get_decoder()(input_ids=ids[None]).last_hidden_state[0].detach()
        labels, _ = drawn(hidden, network.lm_head, draw)  # the same labels
        log_p = network(input_ids=ids[None]).logits[0].log_softmax(-1)
        loss = -sum(log_p[t, label] for t, label in enumerate(labels))
        (gradient,) = torch.autograd.grad(loss, seen["y"])
        for x, g in zip(seen["x"][0].double(), gradient[0].double(), strict=True):
            gram += g.square().mean() * torch.outer(x, x)
            columns += g.square()
    hook.remove()
    return gram, columns


@pytest.mark.parametrize("projection", ["self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_factors_are_those_of_the_definition(projection, config, network, tokens):
    found = fisher.gather_fisher(network, config.model, config.calibration, tokens[:2])
    for layer in (0, 1):
        gram, columns = by_definition(
            network, f"model.layers.{layer}.{projection}", tokens[:2], config.calibration.fisher.seed
        )
        torch.testing.assert_close(found[layer][projection].gram, gram, rtol=1e-3, atol=1e-5 * float(gram.max()))
        torch.testing.assert_close(
            found[layer][projection].columns, columns, rtol=1e-3, atol=1e-5 * float(columns.max())
        )


def test_block_by_block_is_the_whole_model_at_once(config, folder, network, tokens):
    whole = fisher.gather_fisher(network, config.model, config.calibration, tokens)
    layers = []
    for layer, factors in fisher.fisher_factors(folder, config.model, config.calibration, tokens):
        layers.append(layer)
        assert factors.keys() == whole[layer].keys()
        for name, of_projection in factors.items():
            expected = whole[layer][name]
            assert of_projection.n_tokens == expected.n_tokens == tokens.numel()
            for part in ("gram", "columns"):
                wanted = getattr(expected, part)
                torch.testing.assert_close(
                    getattr(of_projection, part), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
                )
    assert layers == [1, 0]  # as the gradient comes back


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"])
def test_the_expected_loss_of_a_random_change_is_its_divergence(name, config, network, tokens):
    """Within a small factor: of random changes the two factors lose the terms of two tokens alone."""
    _, _, layer, projection = name.split(".", 3)
    factors = fisher.gather_fisher(network, config.model, config.calibration, tokens)[int(layer)][projection]
    gram, columns = factors.per_token
    weight = network.get_submodule(name).weight
    expected, measured = [], []
    with torch.no_grad():
        before = network(input_ids=tokens).logits.double().log_softmax(-1)
        for seed in range(12):
            change = 0.02 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight += change
            after = network(input_ids=tokens).logits.double().log_softmax(-1)
            weight -= change
            measured.append((before.exp() * (before - after)).sum(-1).mean())
            share = columns / columns.mean()
            delta = change.double()
            expected.append(0.5 * (share[:, None] * delta * (delta @ gram)).sum())
    assert sum(expected) / sum(measured) > 0.25
    assert sum(expected) / sum(measured) < 4


def test_the_model_is_left_as_it_was(config, network, tokens):
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    fisher.gather_fisher(network, config.model, config.calibration, tokens[:1])
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in network.named_parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_model_without_finite_predictions_is_refused(config, network, tokens):
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="predictions on the calibration text are not finite"):
        fisher.gather_fisher(network, config.model, config.calibration, tokens[:1])


def test_gradients_that_are_not_finite_name_the_layer(config, network, tokens, monkeypatch):
    def huge(hidden, head, draw):
        return None, torch.full_like(hidden, 1e30)

    monkeypatch.setattr(fisher, "drawn", huge)
    with pytest.raises(UserError, match=r"model\.layers\.0\.[\w.]+ are not finite.*factorization\.objective=output"):
        fisher.gather_fisher(network, config.model, config.calibration, tokens[:1])


def test_logits_that_are_more_than_the_head_are_taken_as_they_are(config, network, tokens):
    """Labels come from all logits then, and gradients are what the chain rule makes of them."""
    plain = fisher.gather_fisher(network, config.model, config.calibration, tokens)
    forward = network.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    network.forward = scaled
    found = fisher.gather_fisher(network, config.model, config.calibration, tokens)
    for layer in (0, 1):
        for name, factors in found[layer].items():
            share = float(factors.columns.sum() / plain[layer][name].columns.sum())
            assert 0.5 < share < 2, name  # other labels, of nearly the same distribution


def test_labels_are_drawn_from_the_distribution():
    head = torch.nn.Linear(4, 3000)
    hidden = torch.randn(4, generator=torch.Generator().manual_seed(0)).expand(20000, 4).contiguous()
    with torch.no_grad():
        head.weight.copy_(2 * torch.randn(3000, 4, generator=torch.Generator().manual_seed(1)))
        labels, gradient = drawn(hidden, head, torch.Generator().manual_seed(2))
        p = head(hidden[:1])[0].softmax(-1)
        counts = torch.bincount(labels, minlength=3000) / 20000
        assert float((counts - p).abs().max()) < 0.02
        assert float((p @ head.weight - head.weight[labels].mean(0)).abs().max()) < 0.1
        torch.testing.assert_close(gradient, p @ head.weight - head.weight[labels], rtol=1e-3, atol=1e-4)


def test_the_blend_has_the_size_of_the_fisher_gram():
    plain, weighted = torch.diag(torch.tensor([1.0, 3.0])).double(), torch.diag(torch.tensor([8.0, 0.0])).double()
    columns = torch.tensor([1.0, 3.0, 0.0]).double()
    gram, roots = fisher.loss_metric(plain, weighted, columns, 0.5)
    torch.testing.assert_close(gram, torch.diag(torch.tensor([5.0, 3.0])).double())
    assert float(gram.diagonal().mean()) == pytest.approx(float(weighted.diagonal().mean()))
    torch.testing.assert_close(roots.square(), torch.tensor([0.75, 2.25, fisher.LEAST_COLUMN]).double())
    nothing = fisher.loss_metric(plain, 0 * weighted, 0 * columns, 0.5)
    assert torch.equal(nothing[0], plain)
    assert nothing[1] is None


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen3"])
def test_compress_goes_by_the_loss(family, tmp_path):
    """Its projections have different ratios, and together the budget."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(DOCUMENTS))
    compress_to(
        family,
        tmp_path / "small",
        ["factorization=cospadi_fast", "factorization.compression_ratio=0.4", "calibration.damping=1e-3", *SETTINGS],
        str(text),
        keep_work=True,
    )
    (record,) = (tmp_path / "small.work" / "factorization").glob("*.json")
    rows = json.loads(record.read_text())["projections"]
    stored, dense = (sum(row[bits] for row in rows) for bits in ("stored_bits", "dense_bits"))
    assert 1 - stored / dense == pytest.approx(0.4, abs=0.01)
    assert stored <= sum(row["budget_bits"] for row in rows)
    assert len({round(row["stored_bits"] / row["dense_bits"], 2) for row in rows}) > 3
    assert all(row["expected_loss"] > 0 for row in rows)
