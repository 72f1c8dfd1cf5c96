"""Experts: taken apart they compute what the fused ones do, and each has the gram of the tokens that the router sends to it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cospadi import models, settings
from cospadi.calibration.collect import collect, gather
from cospadi.calibration.settings import CalibrationConfig
from cospadi.calibration.statistics import InputStatistics, tensors_of
from cospadi.errors import UserError
from cospadi.experts import Experts, experts_apart, unfuse, weight_of
from cospadi.sources.checkpoints import prepare_model
from cospadi.sources.families import fitted
from cospadi.sources.settings import ModelConfig
from cospadi.sources.shapes import shape_of

D = 16
SIZES = {"hidden_size": D, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
MIXTURES = {
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": SIZES | {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2},
    "olmoe": SIZES | {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": SIZES
    | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module", params=MIXTURES)
def prepared(request, tmp_path_factory):
    """Settings and folder of a mixture with two blocks."""
    family = request.param
    config = ModelConfig(family, family, f"random:{family}", architecture=dict(MIXTURES[family]), n_layers=2)
    folder = tmp_path_factory.mktemp("mixtures") / family
    prepare_model(config, folder)
    return fitted(config, family), folder


def tokens(n_samples, length):
    return torch.randint(1, 200, (n_samples, length), generator=torch.Generator().manual_seed(3))


def calibration(**chosen):
    return CalibrationConfig(name="c", batch_size=2, device="cpu", **chosen)


def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model


def slow_grams(folder, sample):
    """Grams and counts of every expert, token by token, from what transformers' own fused modules receive."""
    model = loaded(folder)
    grams, counts = {}, {}

    def hear(layer):
        def add(experts, args):
            for x, chosen, weights in zip(*args, strict=True):
                for e, w in zip(chosen.tolist(), weights.double(), strict=True):
                    gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
                    hidden = (experts.act_fn(gate) * up).double()
                    for name, value in (("gate_proj", x.double()), ("down_proj", hidden)):
                        gram, weight, n = grams.get((layer, e, name), (0, 0, 0))
                        added = gram + w**2 * torch.outer(value, value)
                        grams[layer, e, name] = added, weight + w**2, n + 1
                    counts[layer, e] = counts.get((layer, e), 0) + 1

        return add

    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_pre_hook(hear(layer))
    with torch.inference_mode():
        for row in sample:
            model(input_ids=row[None], use_cache=False)
    return {key: gram * (n / weight) for key, (gram, weight, n) in grams.items()}, counts


def test_experts_apart_compute_what_fused_ones_do(prepared):
    _, folder = prepared
    fused, apart = loaded(folder), loaded(folder)
    assert len(unfuse(apart)) == 2
    assert len([m for m in apart.modules() if isinstance(m, Experts)]) == 2
    with torch.no_grad():
        torch.testing.assert_close(apart(tokens(2, 20)).logits, fused(tokens(2, 20)).logits, rtol=1e-5, atol=1e-6)


def test_a_projections_weight_is_the_experts_part_of_the_file(prepared):
    config, folder = prepared
    apart = loaded(folder)
    unfuse(apart)
    checkpoint = models.Checkpoint(folder)
    projections = models.find_projections(folder, config)
    assert {p.projection for p in projections} >= {
        f"mlp.experts.{e}.{name}" for e in range(4) for name in ("gate_proj", "up_proj", "down_proj")
    }
    for p in projections:
        weight = checkpoint.weight(p)
        assert weight.T.equal(apart.get_submodule(p.name).weight)
        assert weight.shape == (p.d_in, p.d_out)


def test_a_gram_is_that_of_the_tokens_routed_to_the_expert(prepared):
    config, folder = prepared
    sample = tokens(4, 40)
    expected, counts = slow_grams(folder, sample)
    found = dict(collect(folder, config, calibration(attention=False), sample))
    in_memory = {}
    with experts_apart(model := loaded(folder)):
        for names, statistics in gather(model, config, calibration(attention=False), sample):
            in_memory[names[0]] = statistics
    assert len(counts) == 2 * 4
    assert min(counts.values()) >= D  # otherwise the grams are filled up
    for (layer, e, name), gram in expected.items():
        path = f"mlp.experts.{e}.{name}"
        for statistics in (found[layer][path], in_memory[f"model.layers.{layer}.{path}"]):
            assert statistics.routed == statistics.n_tokens == counts[layer, e]
            torch.testing.assert_close(statistics.gram, gram, rtol=1e-4, atol=1e-5 * float(gram.abs().max()))
    assert int(tensors_of(found[0])["mlp.experts.1.gate_proj.n_tokens"]) == counts[0, 1]
    assert not any(name.startswith("mlp.experts.") and name.count(".") == 2 for name in found[0])


def test_missing_tokens_are_average_ones_and_the_log_says_so(prepared, capsys):
    config, folder = prepared
    sample = tokens(1, 8)
    _, counts = slow_grams(folder, sample)
    statistics = dict(collect(folder, config, calibration(attention=False), sample))
    for layer, of_layer in statistics.items():
        for e in range(4):
            n = counts.get((layer, e), 0)
            inputs = of_layer[f"mlp.experts.{e}.gate_proj"]
            hidden = of_layer[f"mlp.experts.{e}.down_proj"]
            assert (inputs.routed, inputs.n_tokens, hidden.n_tokens) == (n, D, 12)
            assert int(torch.linalg.matrix_rank(hidden.gram)) == 12
    heard = [line for line in capsys.readouterr().out.splitlines() if "of 4 experts saw fewer tokens" in line]
    assert [line.split(":")[0] for line in heard] == ["model.layers.0", "model.layers.1"]
    fewest = min(counts.get((0, e), 0) for e in range(4))
    assert f"{fewest} of {D}" in heard[0]


def test_what_fills_up_a_gram():
    """Two channels, one token with a router weight of a half, and one average token for the one that is missing."""
    from cospadi.calibration.experts import _filled_up

    one = torch.tensor([[4.0, 0.0], [0.0, 0.0]]).double()
    mean = torch.tensor([[1.0, 0.0], [0.0, 9.0]]).double()
    seen = InputStatistics(one * 0.25, torch.tensor([2.0, 0.0]).double(), 1)
    average = InputStatistics(mean * 10, torch.tensor([10.0, 30.0]).double(), 10)
    inputs = _filled_up(seen, 0.25, average)
    assert inputs.gram.equal(one + mean)
    assert inputs.absolute.tolist() == [3.0, 3.0]
    hidden = _filled_up(seen, 0.25, None)
    assert hidden.gram.equal(one + 2 * torch.eye(2))
    assert hidden.absolute.tolist() == [3.0, 1.0]
    unseen = _filled_up(InputStatistics.zeros(2, torch.device("cpu")), 0.0, None)
    assert unseen.gram.equal(2 * torch.eye(2).double())
    assert unseen.routed == 0


def test_a_weight_is_replaced_in_the_fused_matrix(prepared):
    _, folder = prepared
    fused, apart = loaded(folder), loaded(folder)
    unfuse(apart)
    names = [f"model.layers.1.mlp.experts.2.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    new = [(name, torch.randn(weight_of(fused, name).T.shape)) for name in names]
    before = fused.model.layers[1].mlp.experts.gate_up_proj.clone()
    for model in (fused, apart):
        models.replace_weights(model, new)
    after = fused.model.layers[1].mlp.experts.gate_up_proj
    assert after[2].T.equal(torch.cat([new[0][1], new[1][1]], dim=1))
    assert after[[0, 1, 3]].equal(before[[0, 1, 3]])
    with torch.no_grad():
        torch.testing.assert_close(apart(tokens(1, 9)).logits, fused(tokens(1, 9)).logits, rtol=1e-5, atol=1e-6)


def test_an_error_leaves_the_experts_fused(prepared):
    _, folder = prepared
    model = loaded(folder)
    names = set(model.state_dict())

    def interrupted():
        with experts_apart(model):
            assert set(model.state_dict()) != names
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(model.state_dict()) == names


def test_experts_of_another_form_are_refused_by_name():
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_local_experts=2, head_dim=16
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="GptOssExperts"):
        unfuse(model)


def test_what_knows_no_experts_refuses_them(prepared):
    config, _ = prepared
    with pytest.raises(UserError, match="cannot be planned: its config has num_"):
        shape_of(config)
    family = config.name
    with pytest.raises(UserError, match="names experts, which cannot be chosen to share"):
        settings.load(
            [
                "model=any",
                f"model.source=random:{family}",
                "model.shared_inputs=[[mlp.experts.*.gate_proj]]",
                "factorization=basis_sharing",
                "factorization.grouped=[mlp.experts.*.gate_proj]",
            ]
        )
