"""Calibration: the block-by-block walk sees what the whole model sees, and text becomes samples without repetition."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from cospadi import models, settings
from cospadi.calibration.collect import collect, draw_samples, gather
from cospadi.calibration.statistics import InputStatistics, read_statistics, tensors_of
from cospadi.errors import UserError
from cospadi.models import BlockWalker
from cospadi.sources.checkpoints import prepare_model
from cospadi.sources.settings import ModelConfig

CPU = torch.device("cpu")
ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = ["tiny_llama", "tiny_qwen3", "qwen2", "mistral"]


def smoke(model):
    return settings.load(["study=smoke", f"model={model}"])


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """``kind -> (ModelConfig, folder)``, made once."""
    made = {}

    def prepare(kind):
        if kind not in made:
            if kind.startswith("tiny"):
                config = smoke(kind).model
            else:
                config = ModelConfig(kind, kind, f"random:{kind}", architecture=dict(ARCHITECTURE))
                if kind == "mistral":
                    config.architecture["sliding_window"] = 8
            folder = tmp_path_factory.mktemp("models") / kind
            prepare_model(config, folder)
            made[kind] = config, folder
            if kind == "qwen2":  # random models start with zero biases
                change(folder, lambda name, tensor: torch.randn_like(tensor) if name.endswith("bias") else tensor)
        return made[kind]

    return prepare


def change(folder, edit):
    """Rewrite the weights of a checkpoint."""
    torch.manual_seed(1)
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        edited = {name: edit(name, tensors.get_tensor(name)).contiguous() for name in tensors.keys()}  # noqa: SIM118
    save_file(edited, file, metadata={"format": "pt"})


def calibration(**given_settings):
    base = smoke("tiny_llama").calibration
    return replace(base, **{"device": "cpu", "gram_dtype": "float64", **given_settings})


def random_tokens(n_samples=5, length=24):
    return torch.randint(0, 256, (n_samples, length), generator=torch.Generator().manual_seed(0))


def naive_statistics(folder, config, tokens):
    """Every projection's own input, heard by hooks while the whole model reads one sample at a time."""
    model = models.load(folder, "float32", CPU)
    heard = {p.name: [] for p in models.find_projections(folder, config)}
    for name, inputs in heard.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2).double())
        )
    with torch.inference_mode():
        for sample in tokens:
            model(input_ids=sample[None], use_cache=False)
    return {name: torch.cat(inputs) for name, inputs in heard.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_grams_are_those_of_the_whole_model(prepared, kind, batch_size):
    config, folder = prepared(kind)
    tokens = random_tokens()
    naive = naive_statistics(folder, config, tokens)
    found = dict(collect(folder, config, calibration(batch_size=batch_size), tokens))
    projections = models.find_projections(folder, config)
    assert sorted(found) == sorted({p.layer for p in projections})
    for p in projections:  # also those that share another projection's gram
        inputs, statistics = naive[p.name], found[p.layer][p.shared_input]
        assert statistics.gram.dtype == torch.float64
        assert statistics.n_tokens == tokens.numel() == len(inputs)
        scale = float((inputs.T @ inputs).abs().max())
        torch.testing.assert_close(statistics.gram, inputs.T @ inputs, rtol=0, atol=2e-5 * scale)
        torch.testing.assert_close(statistics.absolute_mean, inputs.abs().mean(dim=0), rtol=2e-5, atol=1e-7)


def naive_attended(folder, config, tokens):
    """``Σ_j a_j x_j x_jᵀ`` of what k and v read, token by token, with the attention that the model itself says it pays."""
    model = models.load(folder, "float32", CPU)
    model.set_attn_implementation("eager")
    layers = len(model.get_submodule(config.blocks))
    heard = {}
    for layer in range(layers):
        projection = model.get_submodule(f"{config.blocks}.{layer}.self_attn.v_proj")
        projection.register_forward_pre_hook(lambda _, args, layer=layer: heard.update({layer: args[0][0].double()}))
    grams = [0.0] * layers
    for sample in tokens:
        with torch.inference_mode():
            attentions = model(input_ids=sample[None], use_cache=False, output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            for key, x in enumerate(heard[layer]):
                received = sum(float(head[:, key].sum()) for head in weights[0]) / weights.shape[1]
                grams[layer] = grams[layer] + received * x[:, None] * x
    return grams


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_weigh_tokens_by_the_attention_they_receive(prepared, kind):
    config, folder = prepared(kind)
    tokens = random_tokens(3, 20)
    found = dict(collect(folder, config, calibration(batch_size=2), tokens))
    in_memory = dict(enumerate(gathered_attended(folder, config, tokens)))
    for layer, expected in enumerate(naive_attended(folder, config, tokens)):
        statistics = found[layer]["self_attn.q_proj"]
        assert statistics.gram_of(attended=True) is statistics.attended
        assert statistics.gram_of(attended=False) is statistics.gram
        for gram in (statistics.attended, in_memory[layer]):
            torch.testing.assert_close(gram, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        assert found[layer]["mlp.gate_proj"].attended is None
        assert found[layer]["self_attn.o_proj"].attended is None


def gathered_attended(folder, config, tokens):
    model = models.load(folder, "float32", CPU)
    before = model.config._attn_implementation
    found = [s.attended for names, s in gather(model, config, calibration(), tokens) if "q_proj" in names[0]]
    assert model.config._attn_implementation == before
    return found


def test_attention_only_counts_where_it_is_asked_for(prepared, tmp_path):
    config, folder = prepared("tiny_llama")
    tokens, plain = random_tokens(2, 12), replace(config, attended=[])
    weighed, *others = (
        next(iter(collect(folder, model, how, tokens)))[1]["self_attn.q_proj"]
        for model, how in ((config, calibration()), (config, calibration(attention=False)), (plain, calibration()))
    )
    for statistics in others:
        assert statistics.attended is None
        assert statistics.gram_of(attended=True) is statistics.gram
        torch.testing.assert_close(statistics.gram, weighed.gram, rtol=1e-4, atol=1e-4)
    projections = models.find_projections(folder, config)
    assert {p.projection for p in projections if p.attended} == {"self_attn.k_proj", "self_attn.v_proj"}
    for statistics, expected in ((weighed, weighed.attended), (others[0], others[0].gram)):
        save_file(tensors_of({"self_attn.q_proj": statistics}), tmp_path / "000.safetensors")
        gram, _ = read_statistics(tmp_path, 0, "self_attn.q_proj", CPU, attended=True)
        assert gram.equal(expected)
        assert read_statistics(tmp_path, 0, "self_attn.q_proj", CPU)[0].equal(statistics.gram)


def test_an_attention_without_weights_is_refused_by_name(prepared):
    config, folder = prepared("tiny_llama")
    with pytest.raises(UserError, match=r"has no attn\. Set model\.attention .* or calibration\.attention=false"):
        next(iter(collect(folder, replace(config, attention="attn"), calibration(), random_tokens(1, 8))))
    with pytest.raises(UserError, match=r"does not tell its attention weights.*calibration\.attention=false"):
        next(iter(collect(folder, replace(config, attention="self_attn.o_proj"), calibration(), random_tokens(1, 8))))
    with pytest.raises(UserError, match=r"model\.attended=self_attn\.key is none of model\.shared_inputs"):
        replace(config, attended=["self_attn.key"])


def test_only_shared_inputs_have_a_gram(prepared):
    config, folder = prepared("tiny_llama")
    for _, statistics in collect(folder, config, calibration(), random_tokens()):
        assert sorted(statistics) == sorted(group[0] for group in config.shared_inputs)


@given(st.integers(0, 10**6), st.integers(1, 3000), st.integers(1, 6), st.floats(-3, 3))
@example(0, 2049, 6, 0.0)
def test_a_float32_gram_is_within_its_stated_bound(seed, n_tokens, d_in, magnitude):
    inputs = torch.randn(n_tokens, d_in, generator=torch.Generator().manual_seed(seed)) * 10**magnitude + 1
    fast, exact = InputStatistics.zeros(d_in, CPU), InputStatistics.zeros(d_in, CPU)
    fast.add(inputs, torch.float32)
    exact.add(inputs, torch.float64)
    torch.testing.assert_close(exact.gram, inputs.double().T @ inputs.double(), rtol=1e-12, atol=0)
    mass = inputs.double().abs().T @ inputs.double().abs()
    assert ((fast.gram - exact.gram).abs() <= 1024 * 2**-24 * mass).all()
    assert fast.absolute.equal(exact.absolute)
    assert fast.n_tokens == n_tokens


def test_no_tokens_have_a_mean_of_zero():
    assert InputStatistics.zeros(3, CPU).absolute_mean.equal(torch.zeros(3).double())


@pytest.mark.parametrize("kind", KINDS)
def test_one_blocks_weights_are_in_memory_at_a_time(prepared, kind):
    config, folder = prepared(kind)
    walker = BlockWalker(folder, config, CPU)
    hidden, arguments = walker.embed(random_tokens().split(2))

    def loaded():
        return [i for i, b in enumerate(walker.blocks) if any(p.device.type != "meta" for p in b.parameters())]

    assert loaded() == []
    for layer, block in walker.walk():
        assert loaded() == [layer]
        assert not any(p.is_meta for p in block.parameters())
        with torch.inference_mode():
            hidden = [block(h, *arguments[i][layer].further, **arguments[i][layer].named) for i, h in enumerate(hidden)]
    assert loaded() == []
    model = models.load(folder, "float32", CPU)
    with torch.inference_mode():
        expected = model.model(input_ids=random_tokens(), use_cache=False).last_hidden_state
        torch.testing.assert_close(walker.decoder.norm(torch.cat(hidden)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_layer_whose_activations_are_not_finite_is_named(tmp_path, bad):
    config = smoke("tiny_llama").model
    prepare_model(config, tmp_path / "m")

    def spoil(name, tensor):
        return tensor.fill_(bad) if name == "model.layers.1.input_layernorm.weight" else tensor

    change(tmp_path / "m", spoil)
    walk = collect(tmp_path / "m", config, calibration(), random_tokens())
    assert next(walk)[0] == 0
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.q_proj are not finite"):
        next(walk)


# --- samples


@pytest.fixture(scope="session")
def tokenizer(prepared):
    return models.load_tokenizer(prepared("tiny_llama")[1])


DOCUMENTS = [f"story {i}: " + "abc " * i for i in range(40)]


def test_samples_are_a_seeded_order_of_the_documents_without_repetition(tokenizer):
    tokens = draw_samples(tokenizer, DOCUMENTS, 12, 50, seed=3)
    assert tokens.shape == (12, 50)
    text = tokenizer.decode(tokens.flatten().tolist())
    whole = text.split("\n\n")[:-1]
    assert len(set(whole)) == len(whole) > 3
    assert set(whole) <= set(DOCUMENTS)
    assert any(document.startswith(text.split("\n\n")[-1]) for document in set(DOCUMENTS) - set(whole))
    assert whole != DOCUMENTS[: len(whole)]
    assert draw_samples(tokenizer, DOCUMENTS, 12, 50, seed=3).equal(tokens)
    assert not draw_samples(tokenizer, DOCUMENTS, 12, 50, seed=4).equal(tokens)
    assert draw_samples(tokenizer, DOCUMENTS, 6, 50, seed=3).equal(tokens[:6])


def test_samples_hold_no_special_tokens_and_use_up_to_the_last_token(tokenizer):
    n_tokens = sum(len(d) + 2 for d in DOCUMENTS)
    tokens = draw_samples(tokenizer, DOCUMENTS, 1, n_tokens, seed=0)
    assert not set(tokens.flatten().tolist()) & set(tokenizer.all_special_ids)
    with pytest.raises(UserError, match=r"calibration\.n_samples"):
        draw_samples(tokenizer, DOCUMENTS, 1, n_tokens + 1, seed=0)


def test_too_short_a_text_says_how_many_samples_there_are(tokenizer):
    with pytest.raises(UserError, match=r"calibration\.n_samples to 4 or less"):
        draw_samples(tokenizer, ["x" * 98] * 2 + ["x" * 18], 30, 50, seed=0)
    with pytest.raises(UserError, match=r"calibration\.n_samples and calibration\.sample_length"):
        draw_samples(tokenizer, ["short"], 30, 50, seed=0)
    with pytest.raises(UserError, match=r"calibration\.n_samples"):
        draw_samples(tokenizer, [], 30, 50, seed=0)
