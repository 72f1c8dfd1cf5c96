"""Room 6: every number against a slow, obvious computation with the same model."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cospadi.errors import UserError
from cospadi.evaluation import heldout, perplexity, task_names, tasks
from cospadi.evaluation import measure as evaluation
from cospadi.evaluation.settings import EvaluationConfig
from cospadi.kernels import next_token
from cospadi.records import write_json
from cospadi.sources.settings import TextConfig

pytestmark = pytest.mark.slow

MIRROR = Path(os.environ.get("COSPADI_MIRROR", Path(__file__).parents[3] / "shared" / "hub" / "datasets"))
NOUNS = ("river", "market", "engine", "teacher", "garden", "letter", "window", "captain", "summer", "village")
VERBS = ("crossed", "watched", "painted", "followed", "repaired", "forgot", "carried", "opened")
DOCUMENTS = [
    " ".join(
        f"The {NOUNS[(d * 3 + s) % 10]} {VERBS[(d + s * 5) % 8]} the old {NOUNS[(d + s * 7) % 10]} near {NOUNS[(s * s + d) % 10]}."
        for s in range(9)
    )
    for d in range(14)
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<|end|>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


def perturbed(model: LlamaForCausalLM, scale: float = 0.05) -> LlamaForCausalLM:
    """A stand-in for a compressed model: other projections, the same lm_head."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in changed.model.layers.named_parameters():
            if "proj" in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return changed


def settings(**changes) -> EvaluationConfig:
    text = TextConfig(name="text", title="text", source="text.txt", parser="lines")
    defaults = {
        "window": 48,
        "n_windows": 6,
        "n_perplexity_documents": 4,
        "document_words": 30,
        "n_cloze_documents": 9,
        "cloze_words": 12,
        "max_length": 64,
        "batch_size": 2,
        "device": "cpu",
    }
    return EvaluationConfig(name="test", text=text, **(defaults | changes))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def windows(tokenizer) -> torch.Tensor:
    return evaluation.token_windows(tokenizer, DOCUMENTS, 48, 6)


@pytest.fixture(scope="module")
def reference(model, windows, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    evaluation.measure_tokens(model, windows, write_reference=path)
    return path


def naive_log_probabilities(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].double().log_softmax(-1)


def log_likelihood(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Sum of the continuation's log-probabilities, and whether each of its tokens is the most likely one."""
    log_p = naive_log_probabilities(model, torch.tensor(context + continuation))[len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    return log_p.gather(-1, wanted[:, None]).sum().item(), bool((log_p.argmax(-1) == wanted).all())


# Windows


@given(
    documents=st.lists(st.text("abc é\n", min_size=1, max_size=40), min_size=1, max_size=8),
    window=st.integers(2, 12),
    n_windows=st.one_of(st.none(), st.integers(1, 6)),
)
def test_windows_are_the_consecutive_tokens_of_the_joined_documents(documents, window, n_windows):
    tokenizer = byte_tokenizer()
    ids = tokenizer("\n\n".join(documents))["input_ids"]
    available = len(ids) // window
    if available < (n_windows or 1):
        with pytest.raises(UserError, match=r"evaluation\.n_windows"):
            evaluation.token_windows(tokenizer, documents, window, n_windows)
        return
    found = evaluation.token_windows(tokenizer, documents, window, n_windows)
    assert found.shape == (n_windows or available, window)
    assert found.flatten().tolist() == ids[: found.numel()]


def test_a_too_short_text_names_both_settings(tokenizer):
    with pytest.raises(UserError, match=r"evaluation\.n_windows or evaluation\.window"):
        evaluation.token_windows(tokenizer, ["short"], 100, 3)


# Token perplexity, KL divergence, agreement


def test_token_perplexity_is_that_of_a_naive_loop(model, windows):
    found = evaluation.measure_tokens(model, windows)["token_perplexity"]
    means = []
    for ids in windows:
        log_p = naive_log_probabilities(model, ids)
        means.append(-sum(log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1)) / (len(ids) - 1))
    mean = sum(means) / len(means)
    variance = sum((m - mean) ** 2 for m in means) / (len(means) - 1)
    assert found["value"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert found["stderr"] == pytest.approx(math.exp(mean) * math.sqrt(variance / len(means)), rel=1e-4)
    assert "6 non-overlapping windows of 48 tokens" in found["protocol"]


@pytest.mark.parametrize("at_once", [1024, 100, 1])
def test_divergence_and_agreement_are_those_of_full_logits(model, windows, reference, monkeypatch, at_once):
    monkeypatch.setattr(next_token, "VOCABULARY_AT_ONCE", at_once)
    changed = perturbed(model)
    found = evaluation.measure_tokens(changed, windows, reference)
    divergences, agreements = [], []
    for ids in windows:
        log_p, log_q = (naive_log_probabilities(m, ids)[:-1] for m in (model, changed))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        agreements.append((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    for name, values in (("kl_to_dense", divergences), ("top1_agreement", agreements)):
        values = torch.stack(values)
        assert found[name]["value"] == pytest.approx(values.mean().item(), rel=1e-4)
        assert found[name]["stderr"] == pytest.approx(values.std().item() / math.sqrt(len(values)), rel=1e-3)
    assert found["kl_to_dense"]["value"] > 0.01
    assert 0 < found["top1_agreement"]["value"] < 1


def test_a_model_does_not_differ_from_itself(model, windows, reference):
    found = evaluation.measure_tokens(copy.deepcopy(model), windows, reference)
    assert found["kl_to_dense"]["value"] == 0.0
    assert found["top1_agreement"]["value"] == 1.0


def test_half_precision_does_not_differ_from_itself_either(model, windows, tmp_path):
    half = copy.deepcopy(model).to(torch.bfloat16)
    evaluation.measure_tokens(half, windows, write_reference=tmp_path / "half.safetensors")
    found = evaluation.measure_tokens(half, windows, tmp_path / "half.safetensors")
    assert found["kl_to_dense"]["value"] == 0.0
    assert found["top1_agreement"]["value"] == 1.0


def test_a_reference_of_hidden_states_alone_gives_the_same(model, windows, reference, tmp_path):
    """As version 0.1.0 wrote it."""
    tensors = load_file(reference)
    with safe_open(reference, framework="pt") as file:
        kept = {name: tensors[name] for name in ("hidden_states", "token_nll")}
        save_file(kept, tmp_path / "old.safetensors", file.metadata())
    changed = perturbed(model)
    old = evaluation.measure_tokens(changed, windows, tmp_path / "old.safetensors")
    new = evaluation.measure_tokens(changed, windows, reference)
    assert old["kl_to_dense"]["value"] == pytest.approx(new["kl_to_dense"]["value"], rel=1e-6)
    assert old["top1_agreement"] == new["top1_agreement"]


@given(st.integers(0, 10**6), st.sampled_from([1.0, 30.0]), st.booleans())
def test_distributions_are_those_of_a_softmax_in_float64(seed, scale, biased):
    draw = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(8, 2 * next_token.VOCABULARY_AT_ONCE + 13, bias=biased)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    hidden = scale * torch.randn(5, 8, generator=draw)
    targets = torch.randint(head.out_features, (5,), generator=draw)
    with torch.no_grad():
        found = next_token.next_tokens(hidden, head, targets, with_expected=True)
        logits = hidden.double() @ head.weight.double().T + (head.bias.double() if biased else 0.0)
    p = logits.softmax(-1)
    wanted = -logits.log_softmax(-1)[torch.arange(5), targets]
    torch.testing.assert_close(found.nll, wanted, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(found.log_total, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.expected, p @ head.weight.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.likeliest, logits.argmax(-1))


def test_without_a_reference_nothing_is_claimed(model, windows):
    found = evaluation.measure_tokens(model, windows)
    assert found["kl_to_dense"]["value"] is None
    assert "no reference" in found["kl_to_dense"]["protocol"]


def test_one_window_has_no_standard_error(model, windows):
    found = evaluation.measure_tokens(model, windows[:1])["token_perplexity"]
    assert found["stderr"] is None
    assert "no stderr" in found["protocol"]


@given(st.lists(st.floats(0, 50), min_size=2, max_size=30))
def test_errors_of_a_ratio_and_of_a_mean_agree_for_equal_sizes(values):
    mean, stderr = perplexity.mean_stderr(torch.tensor(values, dtype=torch.float64))
    ratio, ratio_stderr = perplexity.ratio_stderr(values, [1] * len(values))
    assert ratio == pytest.approx(mean, abs=1e-12)
    assert ratio_stderr == pytest.approx(stderr, abs=1e-9)


def test_standard_error_is_the_spread_of_repeated_measurements():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(50, 150, (2000, 40), generator=generator).double()
    totals = sizes * (3 + 0.3 * torch.randn(2000, 40, generator=generator).double())
    estimates = [perplexity.ratio_stderr(t.tolist(), s.tolist()) for t, s in zip(totals, sizes, strict=True)]
    spread = torch.tensor([ratio for ratio, _ in estimates]).std().item()
    typical = sum(stderr for _, stderr in estimates) / len(estimates)
    assert typical == pytest.approx(spread, rel=0.05)


# References that do not belong


def test_a_reference_of_another_text_is_refused(model, tokenizer, reference):
    other = evaluation.token_windows(tokenizer, DOCUMENTS[::-1], 48, 6)
    with pytest.raises(UserError, match="another text"):
        evaluation.measure_tokens(model, other, reference)


def test_a_reference_of_another_window_is_refused(model, tokenizer, reference):
    other = evaluation.token_windows(tokenizer, DOCUMENTS, 32, 6)
    with pytest.raises(UserError, match=r"windows 6x48 instead of 6x32"):
        evaluation.measure_tokens(model, other, reference)


def test_a_reference_of_another_model_is_refused(windows, reference):
    with pytest.raises(UserError, match="lm_head was changed"):
        evaluation.measure_tokens(tiny_model(seed=5), windows, reference)


def test_a_missing_or_damaged_reference_is_a_sentence(model, windows, reference, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        evaluation.measure_tokens(model, windows, tmp_path / "missing.safetensors")
    (tmp_path / "short.safetensors").write_bytes(reference.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        evaluation.measure_tokens(model, windows, tmp_path / "short.safetensors")


def test_logits_that_are_more_than_the_head_are_refused(model, windows):
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = torch.tanh(output.logits)
            return output

    capped = copy.deepcopy(model)
    capped.__class__ = Capped
    with pytest.raises(UserError, match="Capped changes its logits"):
        evaluation.measure_tokens(capped, windows)


# Broken models


@pytest.fixture(scope="module")
def exploding(model) -> LlamaForCausalLM:
    """Finite logits, yet a likelihood so low that its exponential does not fit a float."""
    changed = copy.deepcopy(model)
    changed.lm_head.weight.data *= 1e5
    return changed


@pytest.fixture(scope="module")
def undefined(model) -> LlamaForCausalLM:
    changed = copy.deepcopy(model)
    changed.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    return changed


def test_a_broken_model_is_recorded_as_such(model, exploding, undefined, windows, reference, tokenizer, tmp_path):
    assert evaluation.measure_tokens(exploding, windows)["token_perplexity"]["value"] == math.inf
    found = evaluation.measure_tokens(undefined, windows, reference)
    assert math.isnan(found["token_perplexity"]["value"])
    assert math.isnan(found["kl_to_dense"]["value"])
    assert found["top1_agreement"]["value"] == 0.0
    for broken, check in ((exploding, math.isinf), (undefined, math.isnan)):
        result, samples = evaluation.evaluate(broken, tokenizer, DOCUMENTS, settings(n_windows=2))
        assert check(result["word_perplexity"]["value"])
        assert result["word_perplexity"]["stderr"] is None
        assert check(result["tasks"]["heldout_cloze"]["all_metrics"]["perplexity"]["value"])
        write_json(tmp_path / "result.json", {"result": result, "samples": samples})
    assert "9 documents with non-finite likelihoods" in result["tasks"]["heldout_cloze"]["protocol"]


# Embedded tasks


def test_embedded_passages_are_disjoint_and_ours(tokenizer):
    config = settings()
    texts = heldout.perplexity_documents(DOCUMENTS, config.n_perplexity_documents, config.document_words)
    passages = heldout.cloze_passages(
        DOCUMENTS, config.n_cloze_documents, config.cloze_words, config.n_perplexity_documents, config.document_words
    )
    assert [len(text.split()) for text in texts] == [30] * 4
    assert all(document.startswith(text) for document, text in zip(DOCUMENTS, texts, strict=False))
    whole = [passage["context"] + passage["target"] for passage in passages]
    assert len(set(whole)) == 9
    rest = [document[len(text) :] for document, text in zip(DOCUMENTS, texts, strict=False)] + DOCUMENTS[4:]
    for text, passage in zip(whole, passages, strict=True):
        assert len(text.split()) == 12
        assert re.fullmatch(r" [A-Za-z]{3,}", passage["target"])
        assert any(text in part for part in rest)
    used = {next(i for i, part in enumerate(rest) if text in part) for text in whole}
    assert min(used) <= 3  # spread from the first
    assert max(used) >= 10  # to the last documents


@given(
    words=st.lists(st.sampled_from(["a", "the", "river", "x9", "stone.", "über"]), min_size=1, max_size=60),
    gap=st.sampled_from([" ", "  ", "\n"]),
    n_passages=st.integers(1, 4),
    cloze_words=st.integers(2, 6),
)
def test_cloze_passages_end_in_a_word_or_are_refused(words, gap, n_passages, cloze_words):
    text = gap.join(words)
    try:
        passages = heldout.cloze_passages([text], n_passages, cloze_words, skip_documents=0, skip_words=1)
    except UserError:
        return
    assert len(passages) == n_passages
    position = 0
    for passage in passages:
        whole = passage["context"] + passage["target"]
        position = text.index(whole, position) + len(whole)  # in order, no overlap
        assert len(whole.split()) == cloze_words
        assert passage["target"][1:].isalpha()


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"n_perplexity_documents": 15}, r"evaluation\.n_perplexity_documents=15.* 14 documents"),
        ({"n_cloze_documents": 500}, r"evaluation\.n_cloze_documents=500"),
        ({"cloze_words": 1000}, r"evaluation\.cloze_words=1000"),
    ],
)
def test_a_text_too_short_for_a_task_names_the_setting(model, tokenizer, changes, setting):
    with pytest.raises(UserError, match=setting):
        evaluation.evaluate(model, tokenizer, DOCUMENTS, settings(**changes))


def test_a_tokenizer_with_neither_bos_nor_eos_is_a_sentence(model):
    bare = byte_tokenizer()
    bare.bos_token = bare.eos_token = None
    with pytest.raises(UserError, match=r"neither a BOS nor an EOS token"):
        evaluation.evaluate(model, bare, DOCUMENTS, settings(n_windows=1))


def test_lengths_that_do_not_fit_name_the_setting(model, tokenizer):
    for setting in ("window", "max_length"):
        with pytest.raises(UserError, match=rf"evaluation\.{setting}=5000 is more than the 4096 positions"):
            evaluation.evaluate(model, tokenizer, DOCUMENTS, settings(**{setting: 5000}))
    config = settings(max_length=2, n_windows=1, embedded_tasks=["heldout_cloze"])
    with pytest.raises(UserError, match=r"heldout_cloze has an answer of \d+ tokens.*evaluation\.max_length=2"):
        evaluation.evaluate(model, tokenizer, DOCUMENTS, config)


@pytest.fixture(scope="module")
def evaluated(model, tokenizer, reference):
    return evaluation.evaluate(perturbed(model), tokenizer, DOCUMENTS, settings(), reference)


def test_cloze_is_the_likelihood_of_the_last_word(model, tokenizer, evaluated):
    result, samples = evaluated
    changed, config = perturbed(model), settings()
    passages = heldout.cloze_passages(DOCUMENTS, 9, 12, config.n_perplexity_documents, config.document_words)
    likelihoods, hits = [], []
    for passage, row in zip(passages, samples["heldout_cloze"], strict=True):
        context, target = (tokenizer(passage[key])["input_ids"] for key in ("context", "target"))
        context = (context + target)[-(config.max_length + 1) :][: -len(target)]  # cut from the left, like lm-eval
        likelihood, greedy = log_likelihood(changed, context, target)
        assert row["target"] == passage["target"]
        assert row["metrics"]["perplexity"] == pytest.approx(likelihood, rel=1e-4)
        assert row["metrics"]["acc"] == greedy
        likelihoods.append(likelihood)
        hits.append(float(greedy))
    entry = result["tasks"]["heldout_cloze"]
    logs = torch.tensor(likelihoods, dtype=torch.float64)
    assert entry["metric"] == "acc"
    assert entry["value"] == pytest.approx(sum(hits) / 9)
    assert entry["all_metrics"]["perplexity"]["value"] == pytest.approx(math.exp(-logs.mean()), rel=1e-4)
    assert entry["all_metrics"]["perplexity"]["stderr"] == pytest.approx(
        math.exp(-logs.mean()) * logs.std().item() / 3, rel=1e-3
    )
    assert entry["n_documents"] == 9


def test_rolling_perplexity_scores_every_token_once(model, tokenizer, evaluated):
    result, _ = evaluated
    changed, config = perturbed(model), settings()
    texts = heldout.perplexity_documents(DOCUMENTS, config.n_perplexity_documents, config.document_words)
    totals, words, sizes = [], [], []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        # the first window starts from the prefix token; the last one is filled up with context from the left
        totals.append(0.0)
        for start in range(0, len(ids), config.max_length):
            scored = ids[start : start + config.max_length]
            context = [tokenizer.bos_token_id]
            if start:
                context = ids[: start + len(scored)][-(config.max_length + 1) : -len(scored)]
            totals[-1] -= log_likelihood(changed, context, scored)[0]
        words.append(len(text.split()))
        sizes.append(len(text.encode()))
    metrics = result["tasks"]["heldout_perplexity"]["all_metrics"]
    nll, stderr = perplexity.ratio_stderr(totals, words)
    assert metrics["word_perplexity"]["value"] == pytest.approx(math.exp(nll), rel=1e-3)
    assert metrics["word_perplexity"]["stderr"] == pytest.approx(math.exp(nll) * stderr, rel=1e-3)
    assert metrics["byte_perplexity"]["value"] == pytest.approx(math.exp(sum(totals) / sum(sizes)), rel=1e-4)
    assert metrics["bits_per_byte"]["value"] == pytest.approx(sum(totals) / sum(sizes) / math.log(2), rel=1e-4)
    assert metrics["bits_per_byte"]["stderr"] == pytest.approx(
        perplexity.ratio_stderr(totals, sizes)[1] / math.log(2), rel=1e-3
    )


def test_the_result_has_the_layout_that_tables_read(evaluated):
    result, samples = evaluated
    assert set(result) == {
        *("token_perplexity", "word_perplexity", "kl_to_dense", "top1_agreement", "average_accuracy"),
        *("second_perplexity", "lambada_perplexity"),
        *("tasks", "continuations", "tokens", "text_hash", "limit"),
    }
    for name in ("word_perplexity", "second_perplexity", "lambada_perplexity"):
        assert set(result[name]) == {"value", "stderr", "protocol"}
    for name in ("token_perplexity", "kl_to_dense", "top1_agreement"):
        assert set(result[name]) == {"value", "stderr", "protocol", "per_window"}
    assert set(result["average_accuracy"]) == {"value", "stderr", "protocol", "tasks"}
    for entry in result["tasks"].values():
        assert set(entry) == {
            *("metric", "value", "stderr", "n_documents", "higher_is_better", "in_average", "protocol", "all_metrics"),
            "logged_as",
        }
    assert result["tokens"] == 6 * 47
    assert result["word_perplexity"]["value"] == result["tasks"]["heldout_perplexity"]["value"]
    assert "heldout_perplexity" in result["word_perplexity"]["protocol"]
    assert result["average_accuracy"]["tasks"] == ["heldout_cloze"]
    assert "no stock accuracy task" in result["average_accuracy"]["protocol"]
    protocol = result["tasks"]["heldout_cloze"]["protocol"]
    for part in (
        "lm-eval 0.",
        "version 1 (own task)",
        "0-shot",
        "acc",
        "max_length 64",
        "no BOS",
        "batch size 2",
        "float32",
    ):
        assert part in protocol
    assert "requests cut from the left" in protocol  # a byte is a token here
    json.dumps(result)
    json.dumps(samples)


def test_the_same_inputs_give_the_same_bits(model, tokenizer, reference, evaluated):
    again = evaluation.evaluate(perturbed(model), byte_tokenizer(), list(DOCUMENTS), settings(), reference)
    assert json.dumps(again) == json.dumps(evaluated)


def test_the_dense_evaluation_writes_the_reference_that_others_read(model, tokenizer, tmp_path):
    path = tmp_path / "deep" / "reference.safetensors"
    config = settings(embedded_tasks=[])
    dense, _ = evaluation.evaluate(model, tokenizer, DOCUMENTS, config, write_reference=path)
    assert dense["kl_to_dense"]["value"] == 0.0
    assert dense["tasks"] == {}
    assert dense["word_perplexity"]["value"] is None
    assert dense["average_accuracy"]["value"] is None
    found, _ = evaluation.evaluate(model, tokenizer, DOCUMENTS, config, path)
    assert found["token_perplexity"]["value"] == dense["token_perplexity"]["value"]
    assert found["kl_to_dense"]["value"] == 0.0


def test_threads_are_set_for_the_run_and_put_back(model, tokenizer):
    before = torch.get_num_threads()
    evaluation.evaluate(model, tokenizer, DOCUMENTS, settings(embedded_tasks=[], n_windows=1))
    assert torch.get_num_threads() == before


def test_an_average_adds_errors_in_squares():
    def entry(value, stderr):
        return {"metric": "acc", "value": value, "stderr": stderr, "in_average": True}

    found = tasks.average_accuracy({"one": entry(0.4, 0.03), "two": entry(0.6, 0.04)})
    assert found["value"] == pytest.approx(0.5)
    assert found["stderr"] == pytest.approx(0.025)
    assert tasks.average_accuracy({"one": entry(0.4, None), "two": entry(0.6, 0.04)})["stderr"] is None


def test_a_second_text_has_a_perplexity_of_its_own(model, tokenizer):
    config = settings(embedded_tasks=[], n_windows=2)
    alone, _ = evaluation.evaluate(model, tokenizer, DOCUMENTS, config)
    assert alone["second_perplexity"]["value"] is None
    assert alone["lambada_perplexity"]["value"] is None
    both, _ = evaluation.evaluate(model, tokenizer, DOCUMENTS, config, second_documents=DOCUMENTS[::-1])
    assert both["token_perplexity"] == alone["token_perplexity"]
    swapped, _ = evaluation.evaluate(model, tokenizer, DOCUMENTS[::-1], config)
    assert both["second_perplexity"] == swapped["token_perplexity"]


def test_a_continuation_is_the_most_likely_token_again_and_again(model, tokenizer):
    (found,) = evaluation.continuations(model, tokenizer, ["a word"], 12)
    ids = tokenizer("a word")["input_ids"]
    for _ in range(12):
        ids.append(naive_log_probabilities(model, torch.tensor(ids))[-1].argmax().item())
        if ids[-1] == 256:
            break
    assert found == {"prompt": "a word", "continuation": tokenizer.decode(ids[6:], skip_special_tokens=True)}
    assert evaluation.continuations(model, tokenizer, [], 12) == []


def test_windows_are_kept_for_comparisons(model, windows, reference):
    found = evaluation.measure_tokens(perturbed(model), windows, reference)
    for name, mean in (("token_perplexity", math.log), ("kl_to_dense", float), ("top1_agreement", float)):
        assert len(found[name]["per_window"]) == len(windows)
        assert sum(found[name]["per_window"]) / len(windows) == pytest.approx(mean(found[name]["value"]))


# Stock tasks


def test_an_unknown_task_is_refused_with_near_names(monkeypatch):
    index = SimpleNamespace(all_tasks=[*task_names.stock_tasks(), "mmlu"])
    monkeypatch.setattr(task_names, "stock_manager", lambda: index)  # the real one takes 15 s
    with pytest.raises(UserError, match=r"no task arc_eazy\. Did you mean .*arc_easy"):
        task_names.check_tasks(settings(tasks=["arc_eazy"]))
    with pytest.raises(UserError, match="heldout_close is not known"):
        task_names.check_tasks(settings(embedded_tasks=["heldout_close"]))
    task_names.check_tasks(settings(tasks=["arc_easy", "piqa", "lambada_openai", "wikitext", "mmlu"]))


def test_missing_data_is_one_sentence(model, tokenizer, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"task arc_easy \(allenai/ai2_arc, ARC-Easy\) was not found on the hub.*evaluation\.mirror"
    ):
        evaluation.evaluate(model, tokenizer, DOCUMENTS, settings(tasks=["arc_easy"]))
    with pytest.raises(
        UserError, match=r"task piqa \(baber/piqa\) was not found in evaluation\.mirror=.*no folder baber/piqa"
    ):
        evaluation.evaluate(model, tokenizer, DOCUMENTS, settings(tasks=["piqa"], mirror=str(tmp_path)))
    with pytest.raises(UserError, match=r"evaluation\.mirror=.*is not a folder"):
        evaluation.evaluate(model, tokenizer, DOCUMENTS, settings(tasks=["piqa"], mirror=str(tmp_path / "none")))


needs_mirror = pytest.mark.skipif(
    not MIRROR.is_dir(), reason=f"no folder of data sets at {MIRROR}: set COSPADI_MIRROR to one laid out like the hub"
)


@needs_mirror
def test_stock_tasks_run_on_stock_prompts(model, tokenizer, monkeypatch):
    from lm_eval.evaluator import simple_evaluate

    logged = {}

    def watched(*args, **kwargs):
        result = simple_evaluate(*args, **kwargs)
        logged.update(result["samples"])
        return result

    monkeypatch.setattr("lm_eval.simple_evaluate", watched)
    folder = Path.cwd()
    config = settings(
        tasks=["arc_easy", "piqa", "lambada_openai"],
        embedded_tasks=["heldout_cloze"],
        mirror=str(MIRROR),
        limit=3,
        n_windows=1,
        max_length=512,
    )
    result, samples = evaluation.evaluate(model, tokenizer, DOCUMENTS, config)
    assert Path.cwd() == folder
    entries = result["tasks"]
    assert {name: entries[name]["metric"] for name in config.tasks} == {
        "arc_easy": "acc_norm",
        "piqa": "acc_norm",
        "lambada_openai": "acc",
    }
    for name in config.tasks:
        assert entries[name]["n_documents"] == len(samples[name]) == 3
        assert entries[name]["protocol"].endswith("max_length 512, no BOS, batch size 2, float32, limit 3")
    assert result["average_accuracy"]["tasks"] == config.tasks
    assert not entries["heldout_cloze"]["in_average"]
    assert entries["lambada_openai"]["all_metrics"]["perplexity"]["stderr"] > 0
    assert result["lambada_perplexity"]["value"] == entries["lambada_openai"]["all_metrics"]["perplexity"]["value"]

    # the prompts, written out from the raw rows
    documents = {name: [sample["doc"] for sample in logged[name]] for name in config.tasks}
    expected = {
        "arc_easy": [
            [(f"Question: {d['question']}\nAnswer:", f" {choice}") for choice in d["choices"]["text"]]
            for d in documents["arc_easy"]
        ],
        "piqa": [
            [(f"Question: {d['goal']}\nAnswer:", f" {d[c]}") for c in ("sol1", "sol2")] for d in documents["piqa"]
        ],
        "lambada_openai": [
            [(d["text"].rpartition(" ")[0], " " + d["text"].rpartition(" ")[2])] for d in documents["lambada_openai"]
        ],
    }
    for name in config.tasks:
        assert [[tuple(a) for a in sample["arguments"]] for sample in logged[name]] == expected[name]


@needs_mirror
def test_a_task_loaded_by_its_file_is_the_one_in_the_stock_index():
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.tasks.__file__).parent
    for name, index in (("arc_easy", "arc"), ("piqa", "piqa"), ("lambada_openai", "lambada"), ("wikitext", "wikitext")):
        manager = TaskManager(include_defaults=False, include_path=folder / index)
        with tasks._data_from(str(MIRROR), []):
            stock = manager.load([name])["tasks"][name]
        (ours,) = tasks.load_stock(name, str(MIRROR))
        assert len(ours.eval_docs) == len(stock.eval_docs)
        for index in (0, len(stock.eval_docs) - 1):
            document = stock.eval_docs[index]
            assert ours.doc_to_text(ours.eval_docs[index]) == stock.doc_to_text(document)
            assert ours.doc_to_target(ours.eval_docs[index]) == stock.doc_to_target(document)
        assert ours.VERSION == stock.VERSION


def requests(task):
    """Everything that a task asks a model, document by document."""
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [(instance.doc_id, instance.idx, instance.request_type, instance.args) for instance in task.instances]


@needs_mirror
@pytest.mark.parametrize(
    ("name", "index", "n_documents"),
    [
        ("piqa", "piqa", 1838),
        ("hellaswag", "hellaswag", 10042),
        ("lambada_openai", "lambada", 5153),
        ("arc_easy", "arc", 2376),
        ("arc_challenge", "arc", 1172),
        ("sciq", "sciq", 1000),
        ("wikitext", "wikitext", 62),
    ],
)
def test_every_prompt_of_the_suite_is_the_stock_one(name, index, n_documents, monkeypatch):
    """Every request of every document, against lm-eval started by itself in the folder of the data."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    (ours,) = tasks.load_stock(name, str(MIRROR))
    manager = TaskManager(include_defaults=False, include_path=Path(lm_eval.tasks.__file__).parent / index)
    with contextlib.chdir(MIRROR):
        stock = manager.load([name])["tasks"][name]
        assert requests(ours) == requests(stock)
    assert len(ours.eval_docs) == n_documents


@needs_mirror
def test_every_prompt_of_mmlu_is_the_stock_one(monkeypatch):
    """All 57 subjects, of the one group that averages them."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    monkeypatch.setattr(  # the whole index takes 15 s
        tasks, "stock_manager", lambda: TaskManager(include_defaults=False, include_path=folder)
    )
    (ours,) = tasks.load_stock("mmlu", str(MIRROR))
    with contextlib.chdir(MIRROR):
        stock = TaskManager(include_defaults=False, include_path=folder).load(["mmlu"])["tasks"]
    found = {task.task_name: task for task in ours.get_all_tasks()}
    assert found.keys() == stock.keys()
    assert len(found) == 57
    assert sum(len(task.eval_docs) for task in found.values()) == 14042
    for name, task in found.items():
        assert requests(task) == requests(stock[name])


@needs_mirror
def test_a_task_whose_data_the_mirror_lacks_is_left_out_visibly(model, tokenizer, capsys):
    suite = {"tasks": ["race", "sciq"], "embedded_tasks": [], "mirror": str(MIRROR), "limit": 2, "n_windows": 1}
    with pytest.raises(UserError, match=r"task race \(EleutherAI/race, high\) was not found in evaluation\.mirror"):
        evaluation.evaluate(model, tokenizer, DOCUMENTS, settings(**suite, max_length=1024))
    config = settings(**suite, max_length=1024, leave_out_missing=True)
    result, samples = evaluation.evaluate(model, tokenizer, DOCUMENTS, config)
    assert "Left out: The data of task race" in capsys.readouterr().out
    race = result["tasks"]["race"]
    assert (race["value"], race["n_documents"], race["in_average"]) == (None, 0, False)
    assert race["protocol"].startswith(
        "left out, and out of the average. The data of task race (EleutherAI/race, high)"
    )
    assert list(samples) == ["sciq"]
    assert result["average_accuracy"]["tasks"] == ["sciq"]
    assert result["average_accuracy"]["value"] == result["tasks"]["sciq"]["value"]
    assert "without race, whose data was not there" in result["average_accuracy"]["protocol"]


def test_a_mirror_that_holds_nothing_is_refused(model, tokenizer, tmp_path):
    config = settings(tasks=["piqa", "race"], embedded_tasks=[], mirror=str(tmp_path), leave_out_missing=True)
    with pytest.raises(UserError, match=r"holds the data of none of evaluation\.tasks"):
        evaluation.evaluate(model, tokenizer, DOCUMENTS, config)


@needs_mirror
def test_a_tag_stands_for_its_tasks(model, tokenizer, monkeypatch):
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.tasks.__file__).parent / "arc"  # the whole index takes 15 s
    manager = TaskManager(include_defaults=False, include_path=folder)
    monkeypatch.setattr(task_names, "stock_manager", lambda: manager)
    config = settings(tasks=["ai2_arc"], embedded_tasks=[], mirror=str(MIRROR), limit=2, n_windows=1, max_length=1024)
    result, samples = evaluation.evaluate(model, tokenizer, DOCUMENTS, config)
    assert list(result["tasks"]) == list(samples) == ["arc_challenge", "arc_easy"]
    assert result["average_accuracy"]["tasks"] == ["arc_challenge", "arc_easy"]
    assert all(entry["higher_is_better"] for entry in result["tasks"].values())


def test_a_configuration_the_mirror_lacks_is_one_sentence(model, tokenizer, tmp_path):
    folder = tmp_path / "allenai" / "ai2_arc"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: Other\n  data_files: other.csv\n---\n")
    (folder / "other.csv").write_text("question\nwhy\n")
    with pytest.raises(
        UserError, match=r"task arc_easy .*'ARC-Easy' not found.*take arc_easy out of evaluation\.tasks"
    ):
        evaluation.evaluate(model, tokenizer, DOCUMENTS, settings(tasks=["arc_easy"], mirror=str(tmp_path)))


@needs_mirror
def test_stock_wikitext_gives_the_word_perplexity(model, tokenizer):
    config = settings(
        tasks=["wikitext"], embedded_tasks=[], mirror=str(MIRROR), limit=1, n_windows=1, batch_size=16, max_length=512
    )
    result, _ = evaluation.evaluate(model, tokenizer, DOCUMENTS, config)
    assert result["word_perplexity"]["value"] > 1
    assert result["word_perplexity"]["stderr"] is None  # one document
    assert "wikitext version 2" in result["word_perplexity"]["protocol"]
    assert "starting from <|end|>" in result["word_perplexity"]["protocol"]
    assert result["tasks"]["wikitext"]["n_documents"] == 1


def test_importing_the_room_does_not_import_lm_eval():
    import subprocess

    code = "import sys, cospadi.evaluation; sys.exit('lm_eval' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
