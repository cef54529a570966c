"""Embedders of every kind that is uploaded: what is loaded, and what is refused."""

import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import sentence_transformers
import torch
import transformers
from torch import nn

from runtime.compiling.packaging import add_directory, add_module_directories
from runtime.execution.pooling import pool
from runtime.importing.embedder import load_embedder
from runtime.importing.embedder_layout import is_embedder, read_layout
from runtime.importing.program import ImportFailure
from tests.runtime.embedders import (
    FAMILIES,
    bert,
    fnet,
    qwen3,
    save_embedder,
    save_tokenizer,
    write_json,
)

TEXTS = [[2, 7, 9, 11, 3], [2, 5, 3], [2, 7, 9, 11, 12, 6, 4, 3]]
MODES = ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_encoder_of_any_family_is_an_embedder(family: str, tmp_path: Path):
    make, max_tokens = FAMILIES[family]
    torch.manual_seed(0)
    module = make().eval()
    module.save_pretrained(tmp_path)
    assert is_embedder(tmp_path)
    embedder = load_embedder(tmp_path)
    assert embedder.info.max_tokens == max_tokens
    assert (embedder.info.pooling, embedder.info.is_normalized) == ("mean", False)
    assert not embedder.info.has_tokenizer
    encoder = getattr(module, module.base_model_prefix, module)
    found = embedder.embed(TEXTS)  # of three lengths
    for vector, text in zip(found, TEXTS, strict=True):
        with torch.inference_mode():
            states = encoder(input_ids=torch.tensor([text])).last_hidden_state[0]
        torch.testing.assert_close(vector, states.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", [*MODES, "mean_tokens"])
def test_vectors_are_those_of_sentence_transformers(pooling: str, tmp_path: Path):
    directory = save_embedder(tmp_path, pooling=pooling)
    write_json(directory / "tokenizer_config.json", {"pad_token": "[PAD]", "model_max_length": 64})
    texts = ["the cat sat on the mat", "a dog", "a big red dog ran on the log slow fast"]
    reference = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    expected = torch.tensor(reference.encode(texts))
    ids = [reference.tokenizer(text)["input_ids"] for text in texts]
    embedder = load_embedder(directory)
    assert embedder.info.is_normalized
    torch.testing.assert_close(embedder.embed(ids), expected, rtol=1e-4, atol=1e-5)


def test_a_directory_that_sentence_transformers_saves_today_is_read(tmp_path: Path):
    source = save_embedder(tmp_path / "source", pooling="cls", max_seq_length=40)
    write_json(source / "tokenizer_config.json", {"pad_token": "[PAD]", "model_max_length": 40})
    sentence_transformers.SentenceTransformer(str(source)).save(str(tmp_path / "saved"))
    info = load_embedder(tmp_path / "saved").info
    assert (info.pooling, info.max_tokens, info.is_normalized) == ("cls", 40, True)
    assert info.has_tokenizer
    assert info.special_tokens == 2


def test_a_last_token_decoder_is_an_embedder_where_the_layout_says_so(tmp_path: Path):
    torch.manual_seed(0)
    module = qwen3().eval()
    directory = save_embedder(tmp_path, module, pooling="lasttoken")
    assert is_embedder(directory)
    found = load_embedder(directory).embed(TEXTS)
    for vector, text in zip(found, TEXTS, strict=True):
        with torch.inference_mode():
            last = module(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
        torch.testing.assert_close(vector, last / last.norm(), rtol=1e-4, atol=1e-5)
    (directory / "modules.json").unlink()
    assert not is_embedder(directory)


def save_dense(directory: Path, linear: nn.Linear, **said: Any) -> None:
    """A layer with tanh after it, whose configuration says `said` of it."""
    settings = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    write_json(directory / "config.json", settings | said)
    weights = {f"linear.{name}": value for name, value in linear.state_dict().items()}
    safetensors.torch.save_file(weights, directory / "model.safetensors")


def test_dense_layers_are_applied(tmp_path: Path):
    directory = save_embedder(tmp_path, steps=("Dense", "Normalize"))
    dense = directory / "2_Dense"
    linear = nn.Linear(32, 8)
    save_dense(dense, linear)
    plain = load_embedder(save_embedder(tmp_path / "plain", steps=())).embed(TEXTS)
    with torch.inference_mode():
        expected = nn.functional.normalize(linear(plain).tanh(), dim=-1)
    embedder = load_embedder(directory)
    assert embedder.info.dimensions == 8
    torch.testing.assert_close(embedder.embed(TEXTS), expected, rtol=1e-4, atol=1e-5)
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    assert refusal(directory) == "pickled_weights"


def test_half_precision_is_kept_and_pooled_in_float32(tmp_path: Path):
    directory = save_embedder(tmp_path, bert().to(torch.bfloat16))
    embedder = load_embedder(directory)
    assert embedder.info.dtype == "bfloat16"
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


def test_an_old_directory_with_the_model_in_one_of_its_own(tmp_path: Path):
    flat = save_embedder(tmp_path / "flat")
    nested, artifact = tmp_path / "nested", tmp_path / "artifact"
    expected = load_embedder(flat).embed(TEXTS)
    (flat / "0_Transformer").mkdir(parents=True)
    for path in list(flat.iterdir()):
        if path.is_file() and path.name != "modules.json":
            path.rename(flat / "0_Transformer" / path.name)
    modules = json.loads((flat / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write_json(flat / "modules.json", modules)
    flat.rename(nested)
    artifact.mkdir()
    assert is_embedder(nested)
    add_module_directories(nested, artifact, read_layout(nested).modules)
    assert add_directory(nested, artifact) == ["0_Transformer", "1_Pooling"]
    served = load_embedder(artifact)
    assert served.info.has_tokenizer
    torch.testing.assert_close(served.embed(TEXTS), expected)
    (artifact / "evil.py").write_text("raise SystemExit")
    assert refusal(artifact) == "remote_code"


def test_the_default_prompt_and_lower_case_are_read(tmp_path: Path):
    directory = save_embedder(tmp_path)
    write_json(
        directory / "config_sentence_transformers.json",
        {"prompts": {"query": "the cat "}, "default_prompt_name": "query"},
    )
    write_json(directory / "sentence_bert_config.json", {"do_lower_case": True})
    layout = read_layout(directory)
    assert (layout.prompt, layout.lowercases) == ("the cat ", True)
    assert load_embedder(directory).info.special_tokens == 4


def test_matryoshka_is_only_what_is_declared(tmp_path: Path):
    directory = save_embedder(tmp_path)
    assert load_embedder(directory).info.matryoshka_dimensions is None
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", config | {"is_matryoshka": True})
    assert load_embedder(directory).info.matryoshka_dimensions == []
    write_json(directory / "config.json", config | {"matryoshka_dimensions": [16, 8]})
    assert load_embedder(directory).info.matryoshka_dimensions == [8, 16]


# --- refusals ---------------------------------------------------------------------------


def refusal(directory: Path) -> str:
    with pytest.raises(ImportFailure) as caught:
        load_embedder(directory)
    return caught.value.error.code


@pytest.mark.parametrize("kind", ["LSTM", "WeightedLayerPooling", "StaticEmbedding", "Evil"])
def test_an_unknown_module_is_refused_by_name(kind: str, tmp_path: Path):
    with pytest.raises(ImportFailure, match=kind) as caught:
        load_embedder(save_embedder(tmp_path, steps=(kind,)))
    assert caught.value.error.code == "unsupported_embedder"


@pytest.mark.parametrize(
    ("modules", "code"),
    [
        ("{", "invalid_json"),
        ('{"a": 1}', "invalid_json"),
        ("[1, 2]", "invalid_json"),
        ("[]", "unsupported_embedder"),
        ('[{"idx": 0, "path": "../..", "type": "x.Transformer"}]', "unsupported_embedder"),
        (
            '[{"idx": 0, "path": "", "type": "x.Transformer"},'
            ' {"idx": 1, "path": "../secret", "type": "x.Pooling"}]',
            "archive_path",
        ),
        (
            '[{"idx": 0, "path": "", "type": "x.Transformer"},'
            ' {"idx": 1, "path": "' + 300 * "p" + '", "type": "x.Pooling"}]',
            "archive_path",
        ),
        ('[{"idx": Infinity, "path": "", "type": "x.Transformer"}]', "invalid_json"),
    ],
)
def test_a_damaged_layout_is_refused(modules: str, code: str, tmp_path: Path):
    directory = save_embedder(tmp_path)
    (directory / "modules.json").write_text(modules)
    assert refusal(directory) == code


def test_an_unknown_pooling_is_refused(tmp_path: Path):
    assert refusal(save_embedder(tmp_path, pooling="attention")) == "unsupported_embedder"


def test_code_and_pickles_are_refused(tmp_path: Path):
    directory = save_embedder(tmp_path / "a")
    (directory / "1_Pooling" / "custom.py").write_text("raise SystemExit")
    assert refusal(directory) == "remote_code"
    directory = save_embedder(tmp_path / "b")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert refusal(directory) == "pickled_weights"


def test_missing_weights_are_refused_but_not_a_missing_pooler(tmp_path: Path):
    directory = save_embedder(tmp_path)
    path = directory / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    safetensors.torch.save_file(kept, path, metadata={"format": "pt"})
    load_embedder(directory)
    del kept["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(kept, path, metadata={"format": "pt"})
    assert refusal(directory) == "incomplete_weights"


@contextmanager
def little_memory() -> Iterator[None]:
    """Room for what a small model needs, and for nothing that is described falsely."""
    held = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, held[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, held)


ABSURD: dict[str, dict[str, Any]] = {
    "layers without end": {"num_hidden_layers": 10**9},
    "layers of a larger model": {"num_hidden_layers": 900},
    "a vocabulary of everything": {"vocab_size": 10**12},
    "a vocabulary that fits an address space": {"vocab_size": 2**24},
    "a wide model": {"hidden_size": 2**20},
    "wide layers": {"intermediate_size": 4_000_000},
    "a negative width": {"intermediate_size": -64},
    "a context beyond numbers": {"max_position_embeddings": 10**15},
}


@pytest.mark.filterwarnings("default")  # of transformers' own
@pytest.mark.timeout(60)  # building any of them up would take longer
@pytest.mark.parametrize("name", ABSURD)
def test_absurd_configurations_are_refused_before_they_cost(name: str, tmp_path: Path):
    directory = save_embedder(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", config | ABSURD[name])
    with little_memory():
        assert refusal(directory) == "config_mismatch"


def test_a_dense_layer_is_refused_for_its_sizes_before_it_costs(tmp_path: Path):
    directory = save_embedder(tmp_path, steps=("Dense",))
    save_dense(directory / "2_Dense", nn.Linear(32, 8), in_features=2**19, out_features=2**19)
    with little_memory(), pytest.raises(ImportFailure, match=r"holds bias \[8\]") as caught:
        load_embedder(directory)
    assert caught.value.error.code == "incomplete_weights"
    save_dense(directory / "2_Dense", nn.Linear(32, 8), bias=False)
    assert refusal(directory) == "incomplete_weights"
    (directory / "2_Dense" / "model.safetensors").write_bytes(b"12345678{}")
    assert refusal(directory) == "invalid_weights"


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertLMHeadModel"])
def test_an_encoder_with_another_head_is_not_taken_for_an_embedder(name: str, tmp_path: Path):
    write_json(tmp_path / "config.json", {"model_type": "bert", "architectures": [name]})
    assert not is_embedder(tmp_path)


def test_an_encoder_decoder_gives_only_its_encoder(tmp_path: Path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=200, **sizes))
    embedder = load_embedder(save_embedder(tmp_path / "t5", t5))
    assert embedder.info.architecture == "T5EncoderModel"
    bart = transformers.BartConfig(vocab_size=200, d_model=32, encoder_layers=1, decoder_layers=1)
    directory = save_embedder(tmp_path / "bart", transformers.BartModel(bart))
    assert refusal(directory) == "not_an_encoder"


def test_a_model_that_knows_no_mask_is_loaded(tmp_path: Path):
    assert load_embedder(save_embedder(tmp_path, fnet())).info.dimensions == 32


# --- pooling ----------------------------------------------------------------------------


def test_padding_never_reaches_a_result():
    states = torch.randn(3, 6, 4, dtype=torch.float64)
    lengths = torch.tensor([6, 1, 3])
    for row, length in enumerate(lengths.tolist()):
        states[row, length:] = math.nan if row else math.inf
    modes = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "last"]
    together = pool(states, lengths, modes)
    assert together.isfinite().all()
    for row, length in enumerate(lengths.tolist()):
        alone = pool(states[row : row + 1, :length], lengths[row : row + 1], modes)
        torch.testing.assert_close(together[row : row + 1], alone)


def test_a_tokenizer_set_to_cut_and_pad_does_neither(tmp_path: Path):
    from runtime.text.tokenizer import Tokenizer

    save_tokenizer(tmp_path)
    assert Tokenizer.load(tmp_path).encode("the cat sat on the mat") == [2, 4, 6, 8, 10, 4, 11, 3]
