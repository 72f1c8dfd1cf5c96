"""Models: projections are found by their settings, read in one orientation, and put back without a trace."""

import json
import re
import shutil

import pytest
import torch

from cospadi import models
from cospadi.errors import UserError
from cospadi.models import Checkpoint, check_loadable, find_projections, replace_weights
from cospadi.sources.checkpoints import prepare_model
from cospadi.sources.settings import ModelConfig

CPU = torch.device("cpu")
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = ["llama", "qwen3", "qwen2", "mistral"]


def config(model_type, **given_settings):
    return ModelConfig(**{"name": model_type, "title": model_type, "source": f"random:{model_type}", **given_settings})


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A prepared tiny checkpoint of each family."""
    parent = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        architecture = dict(TINY) | ({"head_dim": 16} if family == "qwen3" else {})
        prepare_model(config(family, architecture=architecture), parent / family)
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    prepare_model(config("gpt2", architecture=gpt2, n_layers=2), parent / "gpt2")
    return parent


@pytest.fixture
def llama(folders, tmp_path):
    """A Llama of one's own, to spoil."""
    shutil.copytree(folders / "llama", tmp_path / "llama")
    return tmp_path / "llama"


def logits(model, tokens):
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


def random_tokens():
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_found_and_nothing_else(folders, family):
    folder = folders / family
    found = find_projections(folder, config(family))
    model = models.load(folder, "float32", CPU)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert len(found) == 7 * TINY["num_hidden_layers"]
    assert {p.name for p in found} == set(linear)
    for p in found:
        assert (p.d_in, p.d_out) == (linear[p.name].in_features, linear[p.name].out_features)
        assert p.name == f"model.layers.{p.layer}.{p.projection}"
    assert [p.layer for p in found] == sorted(p.layer for p in found)
    shared = {p.projection: p.shared_input for p in found}
    assert shared["self_attn.k_proj"] == shared["self_attn.v_proj"] == "self_attn.q_proj"
    assert shared["mlp.up_proj"] == shared["mlp.gate_proj"] == "mlp.gate_proj"
    assert shared["self_attn.o_proj"] == "self_attn.o_proj"
    assert shared["mlp.down_proj"] == "mlp.down_proj"


def test_more_than_ten_blocks_come_in_the_order_of_their_numbers(tmp_path):
    deep = config("llama", architecture=TINY | {"num_hidden_layers": 11, "hidden_size": 8, "intermediate_size": 8})
    prepare_model(deep, tmp_path / "deep")
    assert [p.layer for p in find_projections(tmp_path / "deep", deep)][::7] == list(range(11))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_inputs_times_weight(folders, family):
    folder = folders / family
    model, checkpoint = models.load(folder, "float32", CPU), Checkpoint(folder)
    for p in find_projections(folder, config(family)):
        module, weight = model.get_submodule(p.name), checkpoint.weight(p)
        assert weight.shape == (p.d_in, p.d_out)
        assert weight.dtype == torch.float32
        inputs = torch.randn(4, p.d_in, generator=torch.Generator().manual_seed(0))
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(inputs), inputs @ weight + bias)
        chosen = torch.randn(p.d_in, p.d_out, generator=torch.Generator().manual_seed(1))
        replace_weights(model, [(p.name, chosen)])
        torch.testing.assert_close(module(inputs), inputs @ chosen + bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_weights_leave_the_logits_as_they_were(folders, family):
    folder = folders / family
    model, checkpoint = models.load(folder, "float32", CPU), Checkpoint(folder)
    projections = find_projections(folder, config(family))
    before = logits(model, random_tokens())
    replace_weights(model, ((p.name, torch.zeros(p.d_in, p.d_out)) for p in projections))
    assert not torch.allclose(logits(model, random_tokens()), before)
    replace_weights(model, ((p.name, checkpoint.weight(p)) for p in projections))
    assert logits(model, random_tokens()).equal(before)
    assert not model.training


def test_a_model_without_the_projections_says_what_it_has(folders):
    with pytest.raises(UserError) as told:
        find_projections(folders / "gpt2", config("gpt2"))
    for said in ("gpt2", "self_attn.q_proj", "under model.layers", "attn.c_attn", "mlp.c_fc", "model.shared_inputs"):
        assert said in str(told.value)
    with pytest.raises(UserError, match=r"lacks the projections self_attn\.q_proj.*c_attn"):
        find_projections(folders / "gpt2", config("gpt2", blocks="transformer.h"))


def test_settings_choose_the_projections(folders):
    some = config("llama", shared_inputs=[["mlp.gate_proj", "mlp.up_proj"]])
    assert {p.projection for p in find_projections(folders / "llama", some)} == {"mlp.gate_proj", "mlp.up_proj"}
    wrong = config("llama", shared_inputs=[["mlp.gate_proj", "mlp.typo_proj"]])
    with pytest.raises(UserError, match=r"lacks the projections mlp\.typo_proj under"):
        find_projections(folders / "llama", wrong)


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("model.layers.1.mlp.up_proj", r"the files lack model\.layers\.1\.mlp\.up_proj\.weight"),
        ("model.layers.1.", r"lacks the projections .*mlp\.up_proj"),
    ],
)
def test_a_projection_or_block_missing_in_the_middle_is_noticed(llama, lost, sentence):
    from safetensors.torch import load_file, save_file

    file = llama / "model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith(lost)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        check_loadable(llama, config("llama"))


def test_a_folder_without_safetensors_is_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no model.safetensors.*model.source"):
        Checkpoint(tmp_path)
    with pytest.raises(UserError, match="is not a checkpoint"):
        Checkpoint(tmp_path / "missing")


def test_a_sharded_checkpoint_is_read_like_a_whole_one(folders, tmp_path):
    models.load(folders / "llama", "float32", CPU).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert len(json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]) > 20
    whole, shards = Checkpoint(folders / "llama"), Checkpoint(tmp_path / "shards")
    assert sorted(whole.names) == sorted(shards.names)
    expected, found = (find_projections(f, config("llama")) for f in (whole.folder, shards.folder))
    assert found == expected
    for p in expected:
        assert shards.weight(p).equal(whole.weight(p))


def test_weights_of_half_precision_are_read_without_loss(folders, tmp_path):
    models.load(folders / "llama", "bfloat16", CPU).save_pretrained(tmp_path / "half")
    half = Checkpoint(tmp_path / "half")
    p = find_projections(tmp_path / "half", config("llama"))[0]
    assert half.read(f"{p.name}.weight").dtype == torch.bfloat16
    assert half.weight(p).equal(Checkpoint(folders / "llama").weight(p).bfloat16().float())


def test_a_checkpoint_that_transformers_cannot_load_is_refused_when_it_is_prepared(tmp_path):
    settings_of_model = config("llama", architecture=dict(TINY))
    for damage, told in (
        (lambda settings: settings | {"hidden_size": 64}, "config.json makes it"),
        (lambda settings: settings | {"num_hidden_layers": 4}, "config.json has 4 blocks, the weights have 3"),
        (lambda settings: settings | {"model_type": "nonesuch"}, "transformers cannot load model.source="),
        (lambda settings: settings | {"num_hidden_layers": "two"}, "transformers cannot load model.source="),
    ):
        folder = tmp_path / "checkpoint"
        prepare_model(settings_of_model, folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(damage(settings)))
        with pytest.raises(UserError, match=re.escape(told)):
            models.check_loadable(folder, settings_of_model)
    prepare_model(settings_of_model, folder)
    models.check_loadable(folder, settings_of_model)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer files"):
        models.check_loadable(folder, settings_of_model)
