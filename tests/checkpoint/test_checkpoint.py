"""Compressed checkpoints: smaller, whole, bit for bit, and refused in a sentence when something is wrong with them."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
import torch
from cases import cases
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import cospadi
from cospadi import cli
from cospadi.api import compress_to
from cospadi.calibration.collect import draw_samples
from cospadi.checkpoint import ledger
from cospadi.checkpoint import write as checkpoint
from cospadi.checkpoint.checksums import CHECKSUMS
from cospadi.checkpoint.checksums import checksum as checksum_of
from cospadi.checkpoint.linear import CompressedLinear
from cospadi.checkpoint.specs import layer_of
from cospadi.checkpoint.transformers_plugin import CoSpaDiQuantizer
from cospadi.errors import UserError
from cospadi.factorization import budget, groups
from cospadi.factorization.factors import KINDS, LowRank, SparseDictionary, SparsePlusLowRank, stored_bits
from cospadi.factorization.methods import factorize_groups
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import CoSpaDiConfig, OATSConfig, PlainConfig, SVDLLMConfig, WandaConfig
from cospadi.models import Checkpoint, find_projections
from cospadi.pipeline import chain
from cospadi.pipeline.stages import allocation, calibration, factorization, sources
from cospadi.quantization.methods import quantize
from cospadi.quantization.settings import QuantizationConfig
from cospadi.sources.checkpoints import prepare_model
from cospadi.sources.settings import ModelConfig

pytestmark = pytest.mark.slow

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
METHODS = {
    "cospadi": CoSpaDiConfig(name="cospadi", title="", compression_ratio=0.3),
    "paper": CoSpaDiConfig(
        name="paper", title="", compression_ratio=0.3, solver="one_shot", accounting="paper", storage_dtype="bfloat16"
    ),
    "svd_llm": SVDLLMConfig(name="svd_llm", title="", compression_ratio=0.3),
    "wanda": WandaConfig(name="wanda", title="", compression_ratio=0.3),
    "oats": OATSConfig(name="oats", title="", compression_ratio=0.3, n_rounds=5),
    "plus_int4": CoSpaDiConfig(
        name="plus", title="", compression_ratio=0.3, fixed_atoms="identity", learned_atoms=0.25, n_rounds=4
    ),
    "cospadi_int3": CoSpaDiConfig(name="cospadi", title="", compression_ratio=0.3, n_rounds=4),
    "oats_int8": OATSConfig(name="oats", title="", compression_ratio=0.3, n_rounds=5),
    "svd_llm_int8": SVDLLMConfig(name="svd_llm", title="", compression_ratio=0.3, storage_dtype="bfloat16"),
    "plain_int4": PlainConfig(name="plain", title=""),
    "plain_float8": PlainConfig(name="plain", title=""),
}


def factors_of(folder, model, method):
    """What ``method`` makes of every projection, inputs taken as white."""
    dense = Checkpoint(folder)
    for projection in find_projections(folder, model):
        problem = Problem(dense.weight(projection), torch.eye(projection.d_in).double(), torch.ones(projection.d_in))
        (factors,) = next(factorize_groups(METHODS[method], [[problem]]))
        if bits := re.search("int.|float8", method):
            config = QuantizationConfig(name="", title="", dictionary=bits[0], values=bits[0], group_size=32)
            (factors,) = quantize(config, [factors], [problem])
        yield projection.name, factors


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A function: family and method -> (dense folder, compressed folder), made once."""
    parent, known = tmp_path_factory.mktemp("checkpoints"), {}

    def make(family="llama", method="cospadi", **options):
        key = (family, method, *sorted(options.items()))
        if key not in known:
            model = ModelConfig(name=family, title=family, source=f"random:{family}", architecture=TINY)
            dense, out = parent / family, parent / f"{family}-{method}-{len(known)}"
            if not dense.exists():
                prepare_model(model, dense)
            record = {"factorization": asdict(METHODS[method])}
            checkpoint.write(out, dense, factors_of(dense, model, method), record, **options)
            known[key] = dense, out
        return known[key]

    return make


@pytest.fixture
def own(made, tmp_path):
    """A compressed checkpoint to spoil."""
    shutil.copytree(made()[1], tmp_path / "own")
    return tmp_path / "own"


def tokens(length=20):
    return torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(0))


def logits(model, ids=None):
    with torch.inference_mode():
        return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits


def in_memory(dense, model, method):
    """The dense model with its projections multiplied out again: what the compressed one must compute."""
    network = AutoModelForCausalLM.from_pretrained(dense)
    for name, factors in factors_of(dense, model, method):
        network.get_submodule(name).weight.data.copy_(factors.weight().T)
    return network.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", cases(["llama", "qwen2", "qwen3"], {"llama"}))
def test_a_loaded_model_computes_what_its_factors_say(made, family, method):
    dense, folder = made(family, method)
    model = ModelConfig(name=family, title=family, source=f"random:{family}", architecture=TINY)
    compressed = cospadi.load(folder)
    assert sum(isinstance(m, CompressedLinear) for m in compressed.modules()) == 14
    expected = logits(in_memory(dense, model, method))
    torch.testing.assert_close(logits(compressed), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_few_tokens_and_many_give_the_same(made, method):
    model = cospadi.load(made("llama", method)[1])
    ids = tokens()
    one_by_one, cache = [], None
    with torch.inference_mode():
        for position in range(ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            one_by_one.append(out.logits)
    torch.testing.assert_close(torch.cat(one_by_one, dim=1), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_saving_and_loading_again_changes_no_bit(made, tmp_path, method):
    _, folder = made("qwen2", method)
    first = cospadi.load(folder)
    first.save_pretrained(tmp_path / "again")
    second = cospadi.load(tmp_path / "again")
    assert logits(first).equal(logits(second))
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) and before[name].dtype == after[name].dtype for name in before)
    old, new = (ledger.ledger(f) for f in (folder, tmp_path / "again"))
    assert old["projection_bytes"] == new["projection_bytes"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_keep_the_stored_factors(made, tmp_path, dtype):
    model = cospadi.load(made()[1], dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.dictionary.dtype, layer.values.dtype) == (torch.float16, torch.float16)
    assert model.model.embed_tokens.weight.dtype == dtype
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    model.save_pretrained(tmp_path / "again")
    again = cospadi.load(tmp_path / "again")
    assert logits(model).equal(logits(again))
    expected = logits(cospadi.load(made()[1]))
    assert (logits(model).float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_shards_hold_the_same_and_each_its_own_checksums(made):
    whole, parts = made()[1], made(shard_bytes=20_000)[1]
    assert len(list(parts.glob("model-*.safetensors"))) > 3
    assert (parts / "model.safetensors.index.json").is_file()
    assert logits(cospadi.load(whole)).equal(logits(cospadi.load(parts)))
    assert ledger.ledger(whole)["projection_bytes"] == ledger.ledger(parts)["projection_bytes"]


def test_plain_transformers_reads_it_wherever_cospadi_was_imported(made):
    model = AutoModelForCausalLM.from_pretrained(made()[1], device_map="cpu")
    assert logits(model.eval()).equal(logits(cospadi.load(made()[1])))
    for order in ("import cospadi; import transformers", "import transformers; import cospadi"):
        code = f"{order}\nfrom transformers import AutoModelForCausalLM as M\n"
        code += f"m = M.from_pretrained({str(made()[1])!r})\nprint(type(m.model.layers[0].mlp.up_proj).__name__)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "SparseDictionaryLinear"


def test_the_stub_lets_a_stranger_load_it(made, tmp_path):
    folder = made(stub=True)[1]
    code = "from transformers import AutoModelForCausalLM as M\n"
    code += f"m = M.from_pretrained({str(folder)!r}, trust_remote_code=True)\nprint(type(m.model.layers[0].mlp.up_proj).__name__)"
    modules = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=modules, check=False)
    assert run.stdout.strip() == "SparseDictionaryLinear", run.stderr
    blind = code.replace("from", "import sys; sys.modules['cospadi'] = None\nfrom", 1)
    run = subprocess.run([sys.executable, "-c", blind], capture_output=True, text=True, env=modules, check=False)
    assert "cospadi" in run.stderr
    assert run.returncode != 0


def test_lm_eval_takes_it(made):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(made()[1]), device="cpu", batch_size=2)
    assert isinstance(model.model.model.layers[0].mlp.up_proj, CompressedLinear)
    run = subprocess.run(
        [sys.executable, "-m", "cospadi.lm_eval", "--help"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0
    assert "usage" in run.stdout.lower()


def test_importing_cospadi_does_not_import_transformers():
    code = "import sys, cospadi; print('transformers' in sys.modules, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False False"


@pytest.mark.parametrize("method", METHODS)
def test_the_densified_model_agrees(made, tmp_path, method):
    _, folder = made("qwen2", method)
    checkpoint.densify(folder, tmp_path / "dense", "float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(m, CompressedLinear) for m in plain.modules())
    expected = logits(cospadi.load(folder))
    assert (logits(plain.eval()) - expected).norm() <= 1e-4 * expected.norm()
    unpacked = cospadi.load(folder).dequantize(torch.float32)
    assert (logits(unpacked) - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_ledger_counts_the_files_and_keeps_the_budget(made, method):
    dense, folder = made("llama", method)
    found = ledger.ledger(folder)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        sizes = {n: t.numel() * t.element_size() for n in tensors.keys() for t in [tensors.get_tensor(n)]}  # noqa: SIM118
    projections = sum(size for name, size in sizes.items() if "_proj." in name)
    assert found["projection_bytes"] == projections
    assert found["other_bytes"] == sum(sizes.values()) - projections
    for row in found["projections"]:
        assert 8 * row["bytes"] <= budget.budget_bits(row["d_in"], row["d_out"], 0.3)
    assert found["file_bytes"] < sum(f.stat().st_size for f in dense.glob("*.safetensors"))


def test_no_layer_keeps_more_in_memory_than_its_checkpoint_stores(made):
    model = cospadi.load(made()[1])
    held = sum(
        tensor.numel() * tensor.element_size()
        for layer in model.modules()
        if isinstance(layer, CompressedLinear)
        for tensor in [*layer.parameters(), *layer.buffers()]
    )
    assert held == ledger.ledger(made()[1])["projection_bytes"]


# --- what is refused


def edited(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"], config)
    (folder / "config.json").write_text(json.dumps(config))


def refused_by_both(folder, sentence):
    """By `cospadi.load`, and by plain transformers before it returns a model."""
    with pytest.raises(UserError, match=sentence) as told:
        cospadi.load(folder)
    assert str(told.value).count(" it again.") <= 1  # advice is given once
    with pytest.raises(Exception, match=r".") as refusal:
        AutoModelForCausalLM.from_pretrained(folder)
    assert refusal.value is not None


def test_a_truncated_shard_is_refused(own):
    file = own / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused_by_both(own, "damaged or cut short")


@pytest.mark.parametrize("place", [-1, -5000, -40000])
def test_a_flipped_byte_is_refused(own, place):
    file = own / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(bytes(data))
    refused_by_both(own, "differ from their checksums")


def test_a_damaged_header_is_refused(own):
    file = own / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[30] ^= 255
    file.write_bytes(bytes(data))
    refused_by_both(own, "damaged")


def test_a_missing_shard_is_refused(made, tmp_path):
    shutil.copytree(made(shard_bytes=20_000)[1], tmp_path / "own")
    next((tmp_path / "own").glob("model-00002-*")).unlink()
    refused_by_both(tmp_path / "own", "is missing")


def test_a_newer_format_is_refused(own):
    edited(own, lambda found, _: found.update(format_version=99))
    refused_by_both(own, "has format_version 99, this cospadi reads up to 3")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.update({"model.layers.7.mlp.up_proj": m["model.layers.1.mlp.up_proj"]}), "names model.layers.7"),
        (lambda m: m.update({"model.norm": m["model.layers.1.mlp.up_proj"]}), "which is a LlamaRMSNorm, not a Linear"),
        (lambda m: m["model.layers.1.mlp.up_proj"].update(d_in=31), "makes model.layers.1.mlp.up_proj 31×48"),
        (lambda m: m["model.layers.1.mlp.up_proj"].update(kind="magic"), "in a way this cospadi does not know"),
        (lambda m: m["model.layers.1.mlp.up_proj"].update(colour=3), "in a way this cospadi does not know"),
        (lambda m: m["model.layers.1.mlp.up_proj"].update(atoms=5), "transformers cannot load"),
        (
            lambda m: m["model.layers.1.mlp.up_proj"].update(storage_dtype="uint8"),
            "in a way this cospadi does not know",
        ),
        (
            lambda m: m["model.layers.1.mlp.up_proj"].update(fixed_atoms="idenity"),
            "in a way this cospadi does not know",
        ),
        (lambda m: m["model.layers.1.mlp.up_proj"].update(value_bits=20), "in a way this cospadi does not know"),
        (lambda m: m.pop("model.layers.1.mlp.up_proj"), "lack model.layers.1.mlp.up_proj.weight"),
        (lambda m: m.clear(), "names no compressed modules"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(own, change, sentence):
    edited(own, lambda found, _: change(found["modules"]))
    refused_by_both(own, sentence)


@pytest.mark.parametrize("lost", ["model.layers.0.mlp.up_proj.dictionary", "model.norm.weight"])
def test_a_lost_tensor_is_refused_not_made_up(own, lost):
    with safe_open(own / "model.safetensors", "pt") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys() if name != lost}  # noqa: SIM118
        save_file(kept, own / "model.safetensors.new", tensors.metadata())
    (own / "model.safetensors.new").rename(own / "model.safetensors")
    refused_by_both(own, f"lack {lost}")


def test_values_that_do_not_match_their_mask_are_refused(own):
    with safe_open(own / "model.safetensors", "pt") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    kept["model.layers.0.mlp.up_proj.mask"][:] = 255
    sums = {CHECKSUMS: json.dumps({name: checksum_of(tensor) for name, tensor in kept.items()}), "format": "pt"}
    save_file(kept, own / "model.safetensors", sums)
    refused_by_both(own, "bits set for")


def test_densify_and_info_refuse_a_lost_shard(made, tmp_path, capsys):
    shutil.copytree(made(shard_bytes=20_000)[1], tmp_path / "own")
    next((tmp_path / "own").glob("model-00002-*")).unlink()
    for words in (["info", str(tmp_path / "own")], ["densify", str(tmp_path / "own"), str(tmp_path / "out")]):
        assert cli.main(words) == 1
        assert "lacks model-00002" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_densify_refuses_what_does_not_fit_and_its_own_folder(made, tmp_path, capsys):
    dense = tmp_path / "dense"
    shutil.copytree(made()[0], dense)
    weights = load_file(dense / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] = 1e5
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    model = ModelConfig(name="llama", title="llama", source="random:llama", architecture=TINY)
    checkpoint.write(tmp_path / "small", dense, factors_of(dense, model, "svd_llm"), {})
    assert cli.main(["densify", str(tmp_path / "small"), str(tmp_path / "out"), "--dtype", "float16"]) == 1
    assert "does not fit torch.float16" in capsys.readouterr().err
    assert cli.main(["densify", str(tmp_path / "small"), str(tmp_path / "small")]) == 1
    assert "is the compressed checkpoint itself" in capsys.readouterr().err
    cospadi.load(tmp_path / "small")


@pytest.mark.parametrize("command", [["info"], ["generate", "PATH", "hello"], ["densify", "PATH", "OUT"]])
@pytest.mark.parametrize("what", ["nowhere", "empty", "dense", "file"])
def test_what_is_no_compressed_checkpoint_is_refused(made, tmp_path, command, what, capsys):
    path = {"nowhere": tmp_path / "nowhere", "empty": tmp_path, "dense": made()[0], "file": tmp_path / "file"}[what]
    (tmp_path / "file").write_text("{}")
    words = [{"PATH": str(path), "OUT": str(tmp_path / "out")}.get(word, word) for word in command]
    capsys.readouterr()  # making the model may print its progress
    assert cli.main(words if "PATH" in command else [*words, str(path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "not a checkpoint" in told or "is not compressed by cospadi" in told
    assert not (tmp_path / "out").exists()


def test_factors_of_another_model_are_refused(made, tmp_path):
    dense, _ = made()
    stranger = LowRank(torch.ones(4, 1).half(), torch.ones(1, 4).half())
    with pytest.raises(UserError, match=r"which .* does not hold"):
        checkpoint.write(tmp_path / "out", dense, [("model.layers.9.mlp.up_proj", stranger)], {})
    assert not (tmp_path / "out").exists()


# --- layers


@settings(max_examples=40)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(1, 40), st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from([14, 16]),
)  # fmt: skip
def test_a_layer_is_its_factors(d_in, d_out, atoms, density, rows, with_bias, dtype, value_bits):
    draw = torch.Generator().manual_seed(d_in * 41 + d_out)
    kept = torch.rand(atoms, d_out, generator=draw) < density
    factors = SparseDictionary.normalized(
        torch.randn(d_in, atoms, generator=draw), torch.randn(atoms, d_out, generator=draw) * kept, dtype, value_bits
    )
    bias = torch.randn(d_out, generator=draw) if with_bias else None
    layer = layer_of(factors, bias)
    inputs = torch.randn(rows, d_in, generator=draw)
    expected = inputs @ factors.weight() + (bias if with_bias else 0)
    with torch.inference_mode():
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer._many(inputs), inputs @ factors.weight(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.dense_weight(), factors.weight(), rtol=1e-5, atol=1e-6)
    bits = sum(8 * t.numel() * t.element_size() for n, t in layer.state_dict().items() if n != "bias")
    assert bits == stored_bits(factors)


@pytest.mark.parametrize("atoms", [0, 5])
@pytest.mark.parametrize("rows", [1, 30])
def test_identity_atoms_stand_before_the_learned_ones(atoms, rows):
    d_in, d_out = 12, 9
    draw = torch.Generator().manual_seed(atoms)
    codes = torch.randn(d_in + atoms, d_out, generator=draw) * (torch.rand(d_in + atoms, d_out, generator=draw) < 0.4)
    dictionary = torch.randn(d_in, atoms, generator=draw).half()
    factors = SparseDictionary(dictionary, codes.half(), identity=True)
    layer = layer_of(factors)
    back = SparseDictionary.from_tensors(factors.tensors() | {"d_out": torch.tensor(d_out)})
    assert back.identity
    assert back.coefficients.equal(factors.coefficients)
    weight = torch.cat([torch.eye(d_in), dictionary.float()], dim=1) @ codes.half().float()
    inputs = torch.randn(rows, d_in, generator=draw)
    with torch.inference_mode():
        torch.testing.assert_close(layer(inputs), inputs @ weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factors.weight(), weight, rtol=1e-5, atol=1e-6)


@given(
    st.integers(1, 24), st.integers(1, 24), st.integers(1, 6), st.floats(0, 1), st.integers(1, 40), st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_a_sparse_plus_low_rank_layer_is_its_factors(d_in, d_out, rank, density, rows, with_bias, dtype):
    draw = torch.Generator().manual_seed(d_in * 25 + d_out)
    sparse = torch.randn(d_in, d_out, generator=draw) * (torch.rand(d_in, d_out, generator=draw) < density)
    left, right = torch.randn(d_in, rank, generator=draw), torch.randn(rank, d_out, generator=draw)
    factors = SparsePlusLowRank(SparseDictionary.of_sparse_weight(sparse, dtype), LowRank.balanced(left, right, dtype))
    torch.testing.assert_close(factors.weight(), sparse + left @ right, rtol=0.05, atol=0.1)
    back = KINDS[factors.kind].from_tensors(factors.tensors() | {"d_out": torch.tensor(d_out)})
    assert back.weight().equal(factors.weight())
    assert back.sizes == factors.sizes
    assert factors.sizes["rank"] == rank
    bias = torch.randn(d_out, generator=draw) if with_bias else None
    layer = layer_of(factors, bias)
    inputs = torch.randn(rows, d_in, generator=draw)
    expected = inputs @ factors.weight() + (bias if with_bias else 0)
    with torch.inference_mode():
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer._many(inputs), inputs @ factors.weight(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.dense_weight(), factors.weight(), rtol=1e-5, atol=1e-6)
    bits = sum(8 * t.numel() * t.element_size() for n, t in layer.state_dict().items() if n != "bias")
    assert bits == stored_bits(factors)
    n_values = int((factors.sparse.coefficients != 0).sum())
    assert bits == budget.sparse_bits(d_in, d_out, n_values) + budget.low_rank_bits(d_in, d_out, rank)


def test_a_mask_that_disagrees_with_its_values_is_refused(made):
    layer = cospadi.load(made()[1]).model.layers[0].mlp.up_proj
    layer.mask[0] ^= 1
    with pytest.raises(UserError, match="bits set for"), torch.inference_mode():
        layer(torch.ones(1, 32))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cast", [torch.float32, torch.float64, torch.bfloat16])
def test_casting_a_layer_keeps_its_stored_bits(made, method, cast):
    layer = cospadi.load(made("qwen2", method)[1]).model.layers[0].self_attn.q_proj
    inputs, before = torch.randn(3, 32), {name: t.clone() for name, t in layer.state_dict().items() if name != "bias"}
    expected = inputs @ layer.dense_weight() + layer.bias
    layer.to(cast)
    assert layer.bias.dtype == cast
    assert all(layer.state_dict()[name].equal(tensor) for name, tensor in before.items())
    with torch.inference_mode():
        torch.testing.assert_close(layer(inputs.to(cast)).float(), expected, rtol=0.03, atol=0.03)


def test_what_is_derived_follows_what_is_loaded(made):
    first, second = (cospadi.load(made()[1]).model.layers[i].mlp.up_proj for i in (0, 1))
    inputs = torch.ones(1, 32)
    with torch.no_grad():
        first(inputs)
        first.load_state_dict(second.state_dict())
        assert first(inputs).equal(second(inputs))


def test_gradients_flow_through_to_the_inputs(made):
    layer = cospadi.load(made()[1]).model.layers[0].mlp.up_proj
    inputs = torch.randn(3, 32, requires_grad=True)
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, layer.dense_weight().sum(dim=1).expand(3, 32), rtol=1e-3, atol=1e-4)


# --- the commands


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """``cospadi compress`` of a tiny model, its work kept."""
    folder = tmp_path_factory.mktemp("compress")
    command = ["compress", "tiny_llama", str(folder / "out"), "--ratio", "0.3", "--keep-work"]
    assert cli.main([*command, "--set", "calibration=smoke"]) == 0
    return folder


def test_compress_writes_what_load_reads(compressed, capsys):
    model = cospadi.load(compressed / "out")
    assert sum(isinstance(m, CompressedLinear) for m in model.modules()) == 14
    found = ledger.ledger(compressed / "out")
    assert 0.3 <= found["removed"] < 0.35
    assert found["record"]["factorization"]["name"] == "cospadi_plus"
    assert cli.main(["info", str(compressed / "out")]) == 0
    assert "30." in capsys.readouterr().out
    assert cli.main(["info", str(compressed / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == found["removed"]


def test_compress_goes_on_where_it_was_cut_off(compressed, tmp_path, monkeypatch):
    shutil.copytree(compressed, tmp_path, dirs_exist_ok=True)

    def refuse(*_):
        raise AssertionError("this was finished")

    settings = ["factorization=cospadi_plus", "factorization.compression_ratio=0.3", "calibration=smoke"]
    settings += ["factorization.device=auto", "calibration.device=auto"]
    before = [(sources, "prepare_model"), (sources, "prepare_text"), (calibration, "calibrate")]
    for stage in (*before, (factorization, "factorize")):
        monkeypatch.setattr(*stage, refuse)
    compress_to("tiny_llama", tmp_path / "out", settings, keep_work=True, overwrite=True)
    monkeypatch.undo()
    for stage in before:
        monkeypatch.setattr(*stage, refuse)
    settings[1] = "factorization.compression_ratio=0.5"
    found = compress_to("tiny_llama", tmp_path / "out", settings, keep_work=True, overwrite=True)
    assert found["removed"] >= 0.5


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_compress_quantizes_and_its_files_are_as_large_as_its_ledger_says(compressed, tmp_path, bits, capsys):
    """What is finished is used again: only the rounding is new."""
    shutil.copytree(compressed / "out.work", tmp_path / "out.work")
    command = ["compress", "tiny_llama", str(tmp_path / "out"), "--ratio", "0.3", "--quantize", bits, "--keep-work"]
    assert cli.main([*command, "--set", "calibration=smoke"]) == 0
    found, before = ledger.ledger(tmp_path / "out"), ledger.ledger(compressed / "out")
    assert found["format_version"] == 3
    assert found["record"]["quantization"]["name"] == bits
    assert found["projection_bytes"] < {"int8": 0.82, "int4": 0.5}[bits] * before["projection_bytes"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    stored = sum(t.numel() * t.element_size() for t in tensors)
    assert stored == found["projection_bytes"] + found["other_bytes"]
    exact, rounded = (logits(cospadi.load(folder / "out")) for folder in (compressed, tmp_path))
    assert 0 < (exact - rounded).norm() / exact.norm() < {"int8": 0.02, "int4": 0.3}[bits]
    model = cospadi.load(tmp_path / "out")
    CoSpaDiQuantizer._dequantize(model.hf_quantizer, model)
    torch.testing.assert_close(logits(model), rounded, rtol=1e-4, atol=1e-4)  # what the codes stand for, in float32
    model = cospadi.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(cospadi.load(tmp_path / "again")), rounded)


def test_compress_in_memory_quantizes(made, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(made()[0])
    settings = ["calibration.n_samples=8", "calibration.sample_length=32", "calibration.damping=1e-3"]
    tokenizer = cospadi.models.load_tokenizer(made()[0])
    texts = ["A line is a document, and this one is repeated.\n" * 60]
    before = logits(network)
    cospadi.compress(network, tokenizer, 0.0, "plain", texts, settings, quantization="int8")
    assert sum(isinstance(m, CompressedLinear) for m in network.modules()) == 14
    after = logits(network)
    assert 0 < (after - before).norm() / before.norm() < 0.02
    network.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(cospadi.load(tmp_path / "out")), after)
    assert ledger.ledger(tmp_path / "out")["removed"] > 0.4


def test_compress_takes_a_folder_and_a_text_file(made, compressed, tmp_path):
    text = tmp_path / "my text's.txt"
    text.write_text("A line is a document, and this one is repeated.\n" * 60)
    settings = ["factorization=svd_llm", "calibration.n_samples=8", "calibration.sample_length=32"]
    found = compress_to(str(made()[0]), tmp_path / "out", [*settings, "calibration.damping=1e-3"], str(text))
    assert found["removed"] >= 0.2
    assert not (tmp_path / "out.work").exists()
    cospadi.load(tmp_path / "out")


def test_compress_leaves_a_strangers_folder_alone(made, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert cli.main(["compress", "tiny_llama", str(tmp_path / "mine"), "--set", "calibration=smoke"]) == 1
    assert "left alone" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_compress_takes_no_strangers_work_folder(tmp_path, capsys):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("years of work")
    assert cli.main(["compress", "tiny_llama", str(tmp_path / "out"), "--set", "calibration=smoke"]) == 1
    assert (tmp_path / "out.work" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    assert cli.main(["compress", "tiny_llama", str(tmp_path / "file"), "--set", "calibration=smoke"]) == 1
    assert "is a file or a link" in capsys.readouterr().err


def test_compress_notices_new_weights_and_a_new_text(made, tmp_path):
    shutil.copytree(made()[0], tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("A line is a document, and this one is repeated.\n" * 60)
    settings = ["factorization=svd_llm", "calibration.n_samples=8", "calibration.sample_length=32"]
    settings.append("calibration.damping=1e-3")

    def errors():
        compress_to(str(tmp_path / "dense"), tmp_path / "out", settings, str(text), keep_work=True, overwrite=True)
        return [
            row["output_error"]
            for record in sorted((tmp_path / "out.work/factorization").glob("*.json"))
            for row in json.loads(record.read_text())["projections"]
        ]

    first = errors()
    assert errors() == first
    text.write_text("Something else altogether stands here now, line by line.\n" * 60)
    second = errors()
    assert second != first
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.randn(48, 32)
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    assert errors() != second


def test_generate_prints_the_prompt_and_more(compressed, capsys):
    assert cli.main(["generate", str(compressed / "out"), "hello", "--tokens", "8"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("hello")
    assert cli.main(["generate", str(compressed / "out"), "hello", "--tokens", "8"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main(["generate", str(compressed / "out"), "", "--tokens", "8"]) == 1


def test_compress_in_python(made, tmp_path):
    from transformers import AutoTokenizer

    dense = made("qwen2")[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
    texts = ["The quick brown fox jumps over the lazy dog, again and again."] * 40
    settings = ["calibration.n_samples=8", "calibration.sample_length=64", "calibration.damping=1e-3"]
    smaller = cospadi.compress(model, tokenizer, compression_ratio=0.3, texts=texts, overrides=settings)
    expected = logits(smaller.eval())
    smaller.save_pretrained(tmp_path / "out")
    assert ledger.ledger(tmp_path / "out")["removed"] >= 0.3
    assert logits(cospadi.load(tmp_path / "out")).equal(expected)
    with pytest.raises(UserError, match="compressed already"):
        cospadi.compress(smaller, tokenizer, compression_ratio=0.3, texts=texts, overrides=settings)


# --- what belongs to the user stays his


SMALL = ["factorization=svd_llm", "calibration.n_samples=8", "calibration.sample_length=32", "calibration.damping=1e-3"]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("A line is a document, and this one is repeated.\n" * 60)
    return str(file)


def test_a_second_run_neither_replaces_a_checkpoint_nor_deletes_a_file_beside_it(made, tmp_path, text):
    out = tmp_path / "out"
    compress_to(str(made()[0]), out, SMALL, text)
    with pytest.raises(UserError, match=r"holds a checkpoint\. Add --overwrite"):
        compress_to(str(made()[0]), out, SMALL, text)
    compress_to(str(made()[0]), out, SMALL, text, overwrite=True)
    (out / "README.md").write_text("my model card")
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")
    with pytest.raises(UserError, match=r"holds files that this project did not write \(\.git/HEAD, README\.md\)"):
        compress_to(str(made()[0]), out, SMALL, text, overwrite=True)
    with pytest.raises(UserError, match=r"did not write \(\.git/HEAD, README\.md\)"):
        checkpoint.densify(made()[1], out)
    assert (out / "README.md").read_text() == "my model card"
    cospadi.load(out)


def test_a_model_is_not_replaced_by_itself(made, text):
    dense = made()[0]
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is the model itself"):
            compress_to(str(dense), dense, SMALL, text, overwrite=overwrite)


def test_densify_replaces_a_checkpoint_only_when_told(made, tmp_path):
    out = tmp_path / "dense"
    checkpoint.densify(made()[1], out, "float32")
    with pytest.raises(UserError, match=r"holds a checkpoint\. Add --overwrite"):
        checkpoint.densify(made()[1], out, "float16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    checkpoint.densify(made()[1], out, "float16", overwrite=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


def test_two_runs_in_one_folder_are_refused(made, tmp_path, text):
    with FileLock(tmp_path / ".out.work.lock"), pytest.raises(UserError, match="Another cospadi compress is writing"):
        compress_to(str(made()[0]), tmp_path / "out", SMALL, text)
    compress_to(str(made()[0]), tmp_path / "out", SMALL, text)


def test_a_checkpoint_does_not_say_where_it_was_made(made, tmp_path, text):
    """And so two equal compressions are the same, wherever they were made."""
    folders = [tmp_path / "here" / "out", tmp_path / "there" / "out"]
    for folder in folders:
        compress_to(str(made()[0]), folder, SMALL, text)
    configs = [(folder / "config.json").read_text() for folder in folders]
    assert configs[0] == configs[1]
    assert str(tmp_path) not in configs[0]
    assert json.loads(configs[0])["quantization_config"]["record"]["calibration"]["text"] == "text.txt"


def test_a_path_is_a_path_and_a_name_that_is_both_is_refused(made, tmp_path, text, monkeypatch):
    shutil.copytree(made()[0], tmp_path / "tiny_qwen3")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"tiny_qwen3 is both .* Write \./tiny_qwen3"):
        compress_to("tiny_qwen3", tmp_path / "out", SMALL, text)
    compress_to("./tiny_qwen3", tmp_path / "out", SMALL, text)
    assert cospadi.load(tmp_path / "out").config.model_type == "llama"


# --- models that are handed over


def test_a_model_in_training_mode_is_calibrated_without_dropout_and_given_back_so(made):
    tokenizer = cospadi.models.load_tokenizer(made()[0])
    texts = ["A line is a document, and this one is repeated.\n" * 60]

    def outputs(training: bool) -> torch.Tensor:
        config = AutoConfig.from_pretrained(made()[0], attention_dropout=0.5)
        network = AutoModelForCausalLM.from_pretrained(made()[0], config=config).train(training)
        network.lm_head.eval()
        cospadi.compress(network, tokenizer, 0.3, "svd_llm", texts, SMALL[1:])
        assert network.model.layers[0].training is training
        assert not network.lm_head.training
        return logits(network.eval())

    assert torch.equal(outputs(True), outputs(False))


def test_what_is_handed_over_is_looked_at_first(made):
    network = AutoModelForCausalLM.from_pretrained(made()[0])
    tokenizer = cospadi.models.load_tokenizer(made()[0])
    with pytest.raises(UserError, match=r"texts is one string.*Give a list"):
        cospadi.compress(network, tokenizer, 0.3, "svd_llm", "one string", SMALL[1:])
    network.peft_config = {}
    with pytest.raises(UserError, match=r"adapter of peft.*merge_and_unload"):
        cospadi.compress(network, tokenizer, 0.3, "svd_llm", ["x"], SMALL[1:])
    del network.peft_config
    network.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UserError, match=r"is quantized \(fp8\)"):
        cospadi.compress(network, tokenizer, 0.3, "svd_llm", ["x"], SMALL[1:])
    del network.config.quantization_config
    network.model.layers[1].to("meta")
    with pytest.raises(UserError, match=r"layers\.1.* is not in memory.*cospadi compress"):
        cospadi.compress(network, tokenizer, 0.3, "svd_llm", ["x"], SMALL[1:])


def test_stored_bits_are_not_trained_before_and_after_loading(made, tmp_path):
    for method in ("cospadi", "svd_llm"):
        model = cospadi.load(made(method=method)[1])
        layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
        assert not any(p.requires_grad for layer in layers for p in layer.parameters())
        assert model.get_input_embeddings().weight.requires_grad


def test_the_dtype_that_transformers_4_wrote_is_read(made, tmp_path):
    _, compressed = made()
    config = json.loads((compressed / "config.json").read_text())
    shutil.copytree(compressed, tmp_path / "own")
    old = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": "bfloat16"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(old))
    checkpoint.densify(tmp_path / "own", tmp_path / "dense")
    written = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert "torch_dtype" not in written
    assert {t.dtype for t in load_file(tmp_path / "dense" / "model.safetensors").values()} == {torch.bfloat16}


# --- a factorization that is cut off


@pytest.mark.parametrize("method", ["svd_llm", "cospadi_plus"])
def test_a_factorization_goes_on_after_the_groups_it_had_finished(made, tmp_path, text, monkeypatch, method):
    """And ends with the same bytes. Other settings start anew."""
    settings = [f"factorization={method}", *SMALL[1:]]
    solved = []
    whole = groups.factorize_groups

    def counted(config, problems):
        for group, factors in zip(problems, whole(config, problems), strict=True):
            solved.append(len(group))
            yield factors

    monkeypatch.setattr(groups, "factorize_groups", counted)
    compress_to(str(made()[0]), tmp_path / "whole", settings, text)
    in_all = len(solved)
    assert in_all > 6

    solved.clear()
    steps = []

    def cut(self, label, *_):
        steps.append(label)
        if solved and label.startswith("model.layers.1.self_attn"):  # not in the trials of an allocation
            raise KeyboardInterrupt

    monkeypatch.setattr(factorization.Progress, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        compress_to(str(made()[0]), tmp_path / "out", settings, text)
    monkeypatch.setattr(factorization.Progress, "step", lambda *_: None)
    before = len(solved)
    compress_to(str(made()[0]), tmp_path / "out", settings, text)
    assert 0 < before < in_all
    assert len(solved) == in_all
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    assert not list(tmp_path.glob("*.work"))


def test_trials_of_an_allocation_go_on_after_those_that_were_done(made, tmp_path, text, monkeypatch):
    settings = ["factorization=cospadi_fast", *SMALL[1:]]
    done, tried = [], allocation.tried

    def cut(config, problem):
        done.append(tried(config, problem))
        if len(done) == 6:
            raise KeyboardInterrupt
        return done[-1]

    monkeypatch.setattr(allocation, "tried", cut)
    with pytest.raises(KeyboardInterrupt):
        compress_to(str(made()[0]), tmp_path / "out", settings, text)
    compress_to(str(made()[0]), tmp_path / "out", [*settings, "factorization.compression_ratio=0.3"], text)
    assert len(done) == 14 + 1  # of 14 projections, that in which it was cut off twice; whatever the ratio

    # What the losses depend on is not taken from trials under other settings.
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        compress_to(str(made()[0]), tmp_path / "other", settings, text)
    compress_to(str(made()[0]), tmp_path / "other", [*settings, "calibration.fisher.blend=0.2"], text)
    assert len(done) == 6 + 14
    compress_to(str(made()[0]), tmp_path / "whole", [*settings, "factorization.compression_ratio=0.3"], text)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


@pytest.mark.parametrize("method", ["svd_llm", "cospadi_plus", "basis_sharing"])
def test_a_model_larger_than_a_block_is_factorized_in_parts(made, tmp_path, text, monkeypatch, method):
    """With the same result: no more than a block's factors are in memory, and groups stay whole."""
    settings = [f"factorization={method}", *SMALL[1:], "quantization=int8"]
    compress_to(str(made()[0]), tmp_path / "whole", settings, text)
    monkeypatch.setattr(chain, "BLOCK_BYTES", 1)
    compress_to(str(made()[0]), tmp_path / "parts", settings, text, keep_work=True)
    blocks = sorted(file.name for file in (tmp_path / "parts.work/factorization").glob("*.safetensors"))
    together = ["000-001.safetensors"]  # a basis is shared by two layers
    assert blocks == (together if method == "basis_sharing" else ["000-000.safetensors", "001-001.safetensors"])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    records = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["record"]
        for name in ("whole", "parts")
    ]
    assert records[0]["output_error_mean"] == pytest.approx(records[1]["output_error_mean"])


# --- tensors that transformers passes over


def test_tensors_that_transformers_does_not_load_are_left_out_with_a_word(made, tmp_path, text, capsys):
    shutil.copytree(made()[0], tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.ones(4, 4)}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    compress_to(str(tmp_path / "dense"), tmp_path / "out", SMALL, text)
    assert "Left out, as transformers does not load them: 1 tensors (mtp.fc.weight)." in capsys.readouterr().out
    assert "mtp.fc.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    cospadi.load(tmp_path / "out")


def test_a_copy_of_a_tied_weight_is_stored_once(made, tmp_path, text):
    network = AutoModelForCausalLM.from_pretrained(made()[0])
    network.config.tie_word_embeddings = True
    network.tie_weights()
    dense = tmp_path / "dense"
    shutil.copytree(made()[0], dense)
    network.save_pretrained(dense)
    tensors = load_file(dense / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, dense / "model.safetensors", {"format": "pt"})
    compress_to(str(dense), tmp_path / "out", SMALL, text)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = cospadi.load(tmp_path / "out")
    assert torch.equal(model.get_output_embeddings().weight, embedding)


# --- what it cost, and the card


def test_compress_ends_by_measuring_and_writes_a_card(made, tmp_path, text, capsys):
    command = [
        "compress",
        str(made()[0]),
        str(tmp_path / "out"),
        "--method",
        "svd_llm",
        "--ratio",
        "0.5",
        "--calibration",
        text,
    ]
    command += [word for setting in SMALL[1:] for word in ("--set", setting)]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert re.search(r"On 8 × 32 tokens of text file that calibration did not see:", told)
    before, after = map(float, re.search(r"perplexity +(\S+) before, (\S+) after", told).groups())
    divergence = float(re.search(r"KL to dense +(\S+) nats", told)[1])
    assert divergence > 0
    assert "Add --dtype bfloat16 to store embeddings and head in 16 bits" in told  # the model is in float32
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| perplexity, 8 × 32 tokens | {before:.2f} | {after:.2f} |" in card
    assert "base_model" not in card  # it is not on a hub
    assert str(tmp_path) not in card

    # By hand: the same windows, through both models.
    documents = [line for line in Path(text).read_text().splitlines() if line]
    drawn = draw_samples(cospadi.models.load_tokenizer(made()[0]), documents, 16, 32, 42)[8:]
    for folder, load, perplexity in (
        (made()[0], AutoModelForCausalLM.from_pretrained, before),
        (tmp_path / "out", cospadi.load, after),
    ):
        with torch.no_grad():
            logits = load(folder)(drawn).logits[:, :-1].flatten(end_dim=1)
        loss = torch.nn.functional.cross_entropy(logits, drawn[:, 1:].flatten())
        assert float(loss.exp()) == pytest.approx(perplexity, rel=1e-3)

    assert cli.main([*command, "--overwrite", "--no-measure", "--dtype", "bfloat16"]) == 0  # the card is ours
    assert "before" not in capsys.readouterr().out.split("Next:")[0].split("removed")[-1]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert cospadi.load(tmp_path / "out").dtype == torch.bfloat16


def test_a_text_that_calibration_used_up_is_a_line(made, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A line is a document, and this one is repeated.\n" * 6)
    settings = ["factorization=svd_llm", "calibration.n_samples=9", "calibration.sample_length=32", SMALL[-1]]
    sizes = compress_to(str(made()[0]), tmp_path / "out", settings, str(text), measure=True)
    assert sizes["outcome"] is None
    assert "Not measured: text file has no tokens that calibration did not see." in capsys.readouterr().out
    assert "before" not in (tmp_path / "out" / "README.md").read_text()


# --- over HTTP


def test_a_compressed_model_is_served(made):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = str(made()[1])
    command = [sys.executable, "-m", "cospadi", "serve", folder, "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = f"http://localhost:{port}"
        for _ in range(240):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/health", timeout=1).is_success:
                    break
            assert server.poll() is None, server.stdout.read()
            time.sleep(0.25)
        asked = {"model": folder, "prompt": "abc", "max_tokens": 3, "temperature": 0}
        answer = httpx.post(f"{address}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["text"]
        listed = httpx.get(f"{address}/v1/models", timeout=60).json()["data"]
        assert [model["id"] for model in listed] == [folder]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
    tokenizer = cospadi.models.load_tokenizer(Path(folder))
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    written = cospadi.load(folder).generate(ids, max_new_tokens=3, do_sample=False)
    assert text == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_port_that_nobody_can_listen_on_is_told_before_the_model_is_loaded(made, capsys):
    folder = str(made()[1])
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", folder, "--port", str(port)]) == 1
        assert f"--port={port}: Address already in use" in capsys.readouterr().err
    for port in ("0", "65536"):
        assert cli.main(["serve", folder, "--port", port]) == 1
        assert f"--port={port} is not between 1 and 65535" in capsys.readouterr().err


def test_a_folder_that_is_not_compressed_is_not_served(made, capsys):
    assert cli.main(["serve", str(made()[0])]) == 1
    assert "is not compressed by cospadi" in capsys.readouterr().err


# --- other classes, other places


def test_other_classes_load_a_compressed_checkpoint(made):
    """As they load a dense one: the decoder alone, and with a head that is yet to be trained."""
    for method in ("cospadi", "svd_llm"):
        _, compressed = made(method=method)
        ids = torch.arange(20)[None]
        whole = cospadi.load(compressed)
        with torch.no_grad():
            hidden = whole.model(ids).last_hidden_state
            assert torch.equal(AutoModel.from_pretrained(compressed)(ids).last_hidden_state, hidden)
            labelled = AutoModelForSequenceClassification.from_pretrained(compressed)
            assert torch.equal(labelled.model(ids).last_hidden_state, hidden)
        assert labelled.score.weight.isfinite().all()


def test_a_checkpoint_without_its_embeddings_is_refused_by_every_class(made, tmp_path):
    shutil.copytree(made()[1], tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    rest = {name: tensor for name, tensor in load_file(file).items() if "embed_tokens" not in name}
    save_file(rest, file, metadata)
    for kind in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(UserError, match="embed_tokens"):
            kind.from_pretrained(tmp_path / "out")


def test_a_source_saved_without_its_head_is_understood_or_refused(made, tmp_path, text):
    """As transformers does: tied embeddings are the head; another head would be random."""
    dense, _ = made()
    config = AutoConfig.from_pretrained(dense)
    tied = AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | {"tie_word_embeddings": True}))
    for name, model in (("tied", tied), ("untied", AutoModelForCausalLM.from_pretrained(dense))):
        model.model.save_pretrained(tmp_path / name)
        cospadi.models.load_tokenizer(dense).save_pretrained(tmp_path / name)
        assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / name / "model.safetensors")
    compress_to(str(tmp_path / "tied"), tmp_path / "out", SMALL, text)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        far = (cospadi.load(tmp_path / "out")(ids).logits - tied.eval()(ids).logits).norm() / tied(ids).logits.norm()
    assert far < 1
    with pytest.raises(UserError, match=r"lack lm_head\.weight.*random numbers.*Save the whole LlamaForCausalLM"):
        compress_to(str(tmp_path / "untied"), tmp_path / "out2", SMALL, text)


ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
ON_DISK |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


def test_a_model_that_is_partly_on_disk_is_saved_and_not_multiplied_out(made, tmp_path):
    _, compressed = made(method="svd_llm")
    expected = logits(cospadi.load(compressed))
    model = AutoModelForCausalLM.from_pretrained(compressed, device_map=ON_DISK, offload_folder=tmp_path / "off")
    assert torch.equal(logits(model), expected)
    with pytest.raises(UserError, match=r"model\.layers\.1.* is offloaded to disk"):
        model.dequantize()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(cospadi.load(tmp_path / "saved")), expected)


def test_layers_that_share_are_not_loaded_to_disk(made, tmp_path, text):
    compress_to(str(made()[0]), tmp_path / "out", ["factorization=cospadi_outputs", *SMALL[1:]], text)
    with pytest.raises(UserError, match=r"shares its dictionary or basis .* offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=ON_DISK, offload_folder=tmp_path / "off")
