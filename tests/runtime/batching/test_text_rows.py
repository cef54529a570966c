"""Rows of texts to tensors: as transformers' own tokenizers do, and what is refused."""

import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from runtime.batching import text_rows
from runtime.batching.tensors import PredictFailure
from runtime.batching.text_rows import TextRows
from runtime.protocol import Schema, Tensor, TensorSpec, TextInput
from runtime.text.tokenizer import TokenizerError
from tests.runtime.heads import save_tokenizer

NAMES = ("input_ids", "attention_mask", "token_type_ids")
TEXT = TextInput(
    max_tokens=12,
    takes_pairs=True,
    token_ids="input_ids",
    attention_mask="attention_mask",
    token_type_ids="token_type_ids",
)


def schema(
    names: tuple[str, ...] = NAMES, *, most_id: float = 15, padded_axis: int | None = 1
) -> Schema:
    def spec(name: str) -> TensorSpec:
        is_ids = name == "input_ids"
        return TensorSpec(
            name=name,
            dtype="int64",
            shape=[None, None],
            maximum=most_id if is_ids else 1.0,
            padded_axis=padded_axis,
            pad_value=1.0 if is_ids else 0.0,
        )

    outputs = [TensorSpec(name="logits", dtype="float32", shape=[None, 2])]
    return Schema(inputs=[spec(name) for name in names], outputs=outputs, is_batched=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    return tmp_path


def arrays(tensors: list[Tensor]) -> dict[str, Any]:
    assert all(tensor.dtype == "int64" for tensor in tensors)
    return {
        tensor.name: np.frombuffer(tensor.data, np.int64).reshape(tensor.shape).tolist()
        for tensor in tensors
    }


def refused(rows: TextRows, texts: list[list[str]]) -> tuple[str | None, str]:
    with pytest.raises(PredictFailure) as caught:
        rows(texts)
    error = caught.value.error
    assert (error.type, error.status, error.param) == ("invalid_request_error", 400, "texts")
    return error.code, error.message


@pytest.mark.parametrize(
    "texts",
    [
        [["the cat sat"]],
        [["the cat"], ["a dog ran on the mat"], [""]],
        [["the cat", "a dog ran"], ["on", "the red mat"]],
        [["the [SEP] cat", "[PAD] unheard-of"]],
    ],
)
def test_they_are_what_transformers_makes_of_them(texts: list[list[str]], directory: Path) -> None:
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    columns = [list(column) for column in zip(*texts, strict=True)]
    expected = tokenizer(*columns, padding=True, truncation=False)
    found = arrays(TextRows.load(directory, TEXT, schema())(texts))
    assert list(found) == list(NAMES)
    assert found == {name: expected[name] for name in NAMES}


def test_only_the_programs_inputs_are_made_in_its_order(directory: Path) -> None:
    names = ("attention_mask", "input_ids")
    found = TextRows.load(directory, TEXT, schema(names))([["the cat"]])
    assert [tensor.name for tensor in found] == list(names)
    assert arrays(found) == {"attention_mask": [[1, 1, 1, 1]], "input_ids": [[2, 4, 6, 3]]}


def test_nothing_is_cut(directory: Path) -> None:
    rows = TextRows.load(directory, TEXT, schema())
    assert rows([["cat " * 10]])[0].shape == [1, 12]
    code, message = refused(rows, [["cat"], ["cat " * 11]])
    assert code == "context_length_exceeded"
    assert "texts[1] has 13 tokens; this model takes at most 12" in message


def test_a_huge_text_is_not_even_tokenised(directory: Path, monkeypatch: Any) -> None:
    rows = TextRows.load(directory, TEXT, schema())
    monkeypatch.setattr(rows, "_tokenizer", None)
    code, message = refused(rows, [["x" * 100_001]])
    assert code == "context_length_exceeded"
    assert "100,001 characters" in message


def test_rows_that_cannot_be_padded_are_taken_alike_or_alone(directory: Path) -> None:
    rows = TextRows.load(directory, TEXT, schema(padded_axis=None))
    assert rows([["the cat"], ["a dog"]])[0].shape == [2, 4]
    code, message = refused(rows, [["the cat"], ["dog"]])
    assert code == "unequal_lengths"
    assert "Send one row per request" in message


def test_padding_may_not_outgrow_a_request(directory: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(text_rows, "MAX_TENSOR_BYTES", 3 * 8 * 12 * 4)
    rows = TextRows.load(directory, TEXT, schema())
    texts = [["cat"]] * 4 + [["cat " * 10]]
    assert rows(texts[1:])[0].shape == [4, 12]
    assert refused(rows, texts)[0] == "too_many_rows"


def test_many_long_texts_are_not_even_tokenised(directory: Path, monkeypatch: Any) -> None:
    rows = TextRows.load(directory, TEXT, schema())
    monkeypatch.setattr(rows, "_tokenizer", None)
    code, message = refused(rows, [["x" * 90_000]] * 89)
    assert code == "too_many_rows"
    assert "8,010,000 characters" in message


def test_wrong_rows_are_refused_by_number(directory: Path) -> None:
    rows = TextRows.load(directory, TEXT, schema())
    assert "at least one row" in refused(rows, [])[1]
    assert "texts[1] must be a text, or two" in refused(rows, [["cat"], []])[1]
    assert "texts[0] must be a text, or two" in refused(rows, [["a", "a", "a"]])[1]
    singles = TextInput(max_tokens=12, takes_pairs=False, token_ids="input_ids")
    rows = TextRows.load(directory, singles, schema(("input_ids",)))
    assert "takes one in each row" in refused(rows, [["a", "a"]])[1]


def test_a_token_beyond_the_models_table_is_refused(directory: Path) -> None:
    rows = TextRows.load(directory, TEXT, schema(most_id=5))
    assert rows([["the a"]])[0].shape == [1, 4]
    assert "does not know" in refused(rows, [["the cat"]])[1]


def test_a_damaged_tokenizer_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        TextRows.load(tmp_path, TEXT, schema())


def test_rows_longer_than_padding_was_proved_at_are_not_padded(directory):
    padded = schema()
    inputs = [msgspec.structs.replace(spec, longest_padded=6) for spec in padded.inputs]
    rows = TextRows.load(directory, TEXT, msgspec.structs.replace(padded, inputs=inputs))
    rows([["the cat"], ["the cat sat"]])
    rows([["a dog ran on the mat"], ["a dog ran on the mat"]])
    code, _ = refused(rows, [["the cat"], ["a dog ran on the mat"]])
    assert code == "unequal_lengths"
