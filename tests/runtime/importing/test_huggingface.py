"""What a Hugging Face directory becomes, and the plain reasons why some are refused."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.importing import huggingface
from runtime.importing.huggingface import PAGE_ANOTHER_WAY, load_decoder
from runtime.importing.huggingface_loading import num_ids_of, vocab_size_of
from runtime.importing.huggingface_probe import classify_mask
from runtime.importing.program import ImportFailure
from runtime.proving.huggingface_original import LoadedHuggingFace
from tests.runtime.decoders import WINDOW, save_decoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_decoder("llama", path)
    return path


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(directory: Path) -> tuple[str, str]:
    with pytest.raises(ImportFailure) as caught:
        load_decoder(directory)
    error = caught.value.error
    assert error.status == 422
    assert len(error.message) < 600
    return error.code, error.message


def test_info_describes_the_model(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    info = load_decoder(directory).info
    assert info.architecture == "LlamaForCausalLM"
    assert (info.vocab_size, info.max_context_tokens, info.num_layers) == (96, 256, 3)
    assert info.kv_bytes_per_token == 3 * 2 * 2 * 16 * 4
    assert info.dtype == "float32"
    assert info.has_tokenizer
    assert info.has_chat_template


def test_layers_carry_scale_window_and_cap(tmp_path: Path) -> None:
    save_decoder("gemma2", tmp_path, query_pre_attn_scalar=25, attn_logit_softcapping=30.0)
    layers = load_decoder(tmp_path).layers
    assert [layer.attention.sliding_window for layer in layers] == [WINDOW, None, WINDOW]
    assert {(layer.attention.scale, layer.attention.soft_cap) for layer in layers} == {(0.2, 30.0)}
    assert {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in layers} == {
        (6, 2, 16)
    }


def test_sinks_are_read_per_head(tmp_path: Path) -> None:
    model = save_decoder("gpt_oss", tmp_path, torch.bfloat16)
    for i, layer in enumerate(load_decoder(tmp_path).layers):
        sinks = model.get_parameter(f"model.layers.{i}.self_attn.sinks")
        assert layer.attention.sinks == tuple(sinks.tolist())


def test_keys_and_values_of_different_widths_share_the_wider(tmp_path: Path) -> None:
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20, "head_dim": 8}
    save_decoder("deepseek_v3", tmp_path, num_key_value_heads=6, **widths)
    decoder = load_decoder(tmp_path)
    assert {layer.head_dim for layer in decoder.layers} == {24}
    assert decoder.info.kv_bytes_per_token == 3 * 2 * 6 * 24 * 4


def test_a_layer_that_attends_twice_is_two_layers(tmp_path: Path) -> None:
    save_decoder("diffllama", tmp_path)
    decoder = load_decoder(tmp_path)
    assert decoder.info.num_layers == len(decoder.layers) == 6
    assert sorted(decoder.layers_of.values()) == [[0, 1], [2, 3], [4, 5]]


def test_a_context_beyond_reason_is_cut_with_a_note(directory: Path) -> None:
    edit_config(directory, max_position_embeddings=10 * 1024**2)
    decoder = load_decoder(directory)
    assert decoder.info.max_context_tokens == 1024**2
    assert any("10,485,760" in note for note in decoder.notes)


def test_what_was_checked_at_build_is_not_checked_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(huggingface, "check_sizes", fail)
    monkeypatch.setattr(huggingface, "check_locality", fail)
    assert load_decoder(directory, is_checked=True).info.num_layers == 3
    with pytest.raises(AssertionError, match="checked again"):
        load_decoder(directory)


def test_dtype_is_the_saved_one_unless_asked_for(tmp_path: Path) -> None:
    save_decoder("llama", tmp_path, torch.bfloat16)
    assert load_decoder(tmp_path).info.dtype == "bfloat16"
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    assert decoder.info.dtype == "float32"
    assert {parameter.dtype for parameter in decoder.module.parameters()} == {torch.float32}


def test_weights_are_mapped_from_the_file_not_copied(directory: Path) -> None:
    decoder = load_decoder(directory)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list its mappings")
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in maps.read_text().splitlines()
        if line.endswith(str(directory / "model.safetensors"))
    ]
    for parameter in decoder.module.parameters():
        address = parameter.data_ptr()
        assert any(start <= address < end for start, end in ranges)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(2, None, (2,)), ([2, 5], None, (2, 5)), (2, 7, (7,)), (None, None, ()), (2, [7, 8], (7, 8))],
)
def test_end_tokens(directory: Path, config: Any, generation: Any, expected: tuple) -> None:
    edit_config(directory, eos_token_id=config)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_decoder(directory).eos_token_ids == expected


def test_length_dependent_rotary_scaling_limits_the_context(directory: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    edit_config(directory, rope_parameters=scaling)
    decoder = load_decoder(directory)
    assert decoder.info.max_context_tokens == 256
    assert any("dynamic" in note for note in decoder.notes)


def test_unused_weights_are_noted(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file(
        {**weights, "extra.weight": torch.ones(1)},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    assert any("extra.weight" in note for note in load_decoder(directory).notes)


# --- refusals ---------------------------------------------------------------------------


def drop_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def pickle_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncate_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


SPOILT: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config_missing", "save_pretrained"),
    "broken config": (
        lambda d: (d / "config.json").write_text("{"),
        "invalid_json",
        "config.json is not valid JSON",
    ),
    "a list as config": (lambda d: (d / "config.json").write_text("[]"), "invalid_json", "object"),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "weights_missing",
        "model.save_pretrained(directory)",
    ),
    "pickled weights": (pickle_weights, "pickled_weights", "model.save_pretrained(directory)"),
    "a weight missing": (drop_weight, "incomplete_weights", "model.layers.1.mlp.up_proj.weight"),
    "truncated weights": (truncate_weights, "load_failed", "transformers"),
    "wrong shapes": (
        lambda d: edit_config(d, intermediate_size=32),
        "incomplete_weights",
        "model.layers.0.mlp.down_proj.weight",
    ),
    "own code": (
        lambda d: edit_config(d, auto_map={"AutoModelForCausalLM": "modeling.M"}),
        "remote_code",
        "auto_map",
    ),
    "code beside": (lambda d: (d / "modeling.py").write_text("x"), "remote_code", "modeling.py"),
    "adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "adapter", "merge"),
    "quantised": (
        lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}),
        "quantized",
        "gptq",
    ),
    "not causal": (lambda d: edit_config(d, model_type="vit"), "not_a_decoder", "torch.export"),
    "unknown type": (lambda d: edit_config(d, model_type="abc"), "not_a_decoder", "'abc'"),
    "classifier": (
        lambda d: edit_config(d, architectures=["LlamaForSequenceClassification"]),
        "not_a_decoder",
        "LlamaForSequenceClassification",
    ),
    "encoder-decoder": (
        lambda d: edit_config(d, is_encoder_decoder=True),
        "not_a_decoder",
        "encoder-decoder",
    ),
}


ABSURD: dict[str, dict[str, Any]] = {
    "layers without end": {"num_hidden_layers": 10**9},
    "layers of a larger model": {"num_hidden_layers": 900},
    "a vocabulary of everything": {"vocab_size": 10**12},
    "a vocabulary that fits an address space": {"vocab_size": 2**24},
    "a wide model": {"hidden_size": 2**20, "num_attention_heads": 64},
    "a negative width": {"intermediate_size": -64},
    "a width in tatters": {"hidden_size": "48"},
    "no heads": {"num_attention_heads": 0},
    "more key heads than heads": {"num_key_value_heads": 64},
    "a context beyond numbers": {"max_position_embeddings": 10**15},
    "a head of endless width": {"head_dim": 10**10},
    "layers of nothing": {"num_hidden_layers": 0},
    "a null": {"hidden_size": None},
    "a fraction of a head": {"num_attention_heads": 6.5},
    "a list": {"num_hidden_layers": [3]},
    "an unknown activation": {"hidden_act": "explode"},
    "an unknown rotary scaling": {"rope_parameters": {"rope_type": "sideways"}},
    "a dtype that is none": {"dtype": "float99"},
    "a window of nothing": {"model_type": "mistral", "sliding_window": 0},
}


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(120)  # building any of them up would take longer
@pytest.mark.parametrize("name", ABSURD)
def test_absurd_configurations_are_refused_before_they_cost(directory: Path, name: str) -> None:
    edit_config(directory, **ABSURD[name])
    held = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 1024**3, held[1]))
    try:
        refusal(directory)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, held)


def test_a_header_that_promises_more_than_its_file_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"1234")
    assert refusal(directory)[0] == "invalid_weights"
    path.write_bytes((2**62).to_bytes(8, "little") + header.encode())
    assert refusal(directory) == (
        "invalid_weights",
        "model.safetensors is not a safetensors file: its header is longer than the file.",
    )


@pytest.mark.parametrize("name", SPOILT)
def test_refused_with_what_to_do(directory: Path, name: str) -> None:
    spoil, code, words = SPOILT[name]
    spoil(directory)
    found = refusal(directory)
    assert found[0] == code
    assert words in found[1]


@pytest.mark.parametrize(
    ("family", "overrides", "code"),
    [
        ("bloom", {}, "attention_not_found"),  # adds its own positional bias
        ("mamba", {}, "attention_not_found"),  # no attention at all
        ("bert", {"is_decoder": False}, "mask_unsupported"),  # looks ahead
        (
            "llama4_text",
            {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 16},
            "mask_unsupported",
        ),
        # Convolutions beside attention.
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "mixes_tokens"),
        ("roberta", {"is_decoder": True}, "positions_unsupported"),  # counts from the padding id
        ("doge", {}, "attention_unsupported"),  # masks by what the values are
    ],
)
def test_families_that_attend_otherwise_are_paged_another_way(
    tmp_path: Path, family: str, overrides: dict[str, Any], code: str
) -> None:
    save_decoder(family, tmp_path, **overrides)
    assert refusal(tmp_path)[0] == code
    assert code in PAGE_ANOTHER_WAY


# --- masks ------------------------------------------------------------------------------


def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def test_masks_are_classified_far_beyond_the_probe() -> None:
    device = torch.device("cpu")
    assert classify_mask(causal, 5000, device) is None

    def windowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return causal(batch, head, query, key) & (key > query - 4000)

    assert classify_mask(windowed, 5000, device) == 4000
    assert classify_mask(windowed, 3000, device) is None


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, k: k >= 0 * q,
        lambda b, h, q, k: (k <= q) & (k // 100 == q // 100),
        lambda b, h, q, k: (k <= q) & ((k > q - 100) | (k < 4)),
        lambda b, h, q, k: k < q,
        lambda b, h, q, k: torch.zeros(8, 8, dtype=torch.bool)[q, k],
    ],
    ids=["bidirectional", "chunked", "window with sinks", "off by one", "table of the probe"],
)
def test_other_masks_are_refused(mask: Callable[..., Tensor]) -> None:
    with pytest.raises(ImportFailure) as caught:
        classify_mask(mask, 5000, torch.device("cpu"))
    assert caught.value.error.code == "mask_unsupported"


def test_ids_that_a_padded_output_layer_adds_are_none(tmp_path: Path) -> None:
    module = save_decoder("llama", tmp_path)
    assert num_ids_of(module) == 96
    module.lm_head = torch.nn.Linear(48, 104)
    assert (vocab_size_of(module), num_ids_of(module)) == (104, 96)
    assert max(LoadedHuggingFace(module).continue_greedily([1, 2], 8)) < 96
