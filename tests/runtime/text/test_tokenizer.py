"""The tokenizer reads a directory as transformers' AutoTokenizer does."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models
from transformers import AutoTokenizer

from runtime.text.tokenizer import Tokenizer, TokenizerError

from .conftest import TEXTS

SaveTokenizer = Callable[..., Path]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
SAMPLES = [*TEXTS, "", " leading and trailing ", "<|im_start|>user\nhi<|im_end|>", "a<tool>b</s>"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
        {
            "bos_token": {"__type": "AddedToken", "content": "<new>", "lstrip": True},
            "add_bos_token": True,
        },
        {
            "eos_token": "<|end|>",
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                "1000": {"content": "<|end|>", "special": True},
                "1001": {"content": "<plain>", "special": False, "normalized": False},
            },
        },
    ],
)
def test_equals_auto_tokenizer(
    save_tokenizer: SaveTokenizer, kind: str, config: dict[str, Any]
) -> None:
    directory = save_tokenizer(kind, tokenizer_config=FAST | config)
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for sample in [*SAMPLES, "x<|end|>y<plain>z <new> w"]:
        ids = theirs(sample)["input_ids"]
        assert ours.encode(sample) == ids
        assert (
            ours.encode(sample, is_templated=True)
            == theirs(sample, add_special_tokens=False).input_ids
        )
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == theirs.eos_token_id
    named = {name: str(token) for name, token in theirs.special_tokens_map.items()}
    assert ours.special_tokens == {name: named[name] for name in ours.special_tokens}


def test_special_tokens_map_counts_only_where_transformers_reads_it(
    save_tokenizer: SaveTokenizer,
) -> None:
    for config in (
        FAST,
        FAST | {"added_tokens_decoder": {"0": {"content": "<s>", "special": True}}},
    ):
        tokens = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": "<s>"}
        directory = save_tokenizer(
            tokenizer_config=config | {"eos_token": "</s>"}, special_tokens_map=tokens
        )
        theirs = AutoTokenizer.from_pretrained(directory)
        assert Tokenizer.load(directory).eos_token_id == theirs.eos_token_id


def test_truncation_and_padding_of_the_file_are_ignored(save_tokenizer: SaveTokenizer) -> None:
    import tokenizers

    directory = save_tokenizer()
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(directory / "tokenizer.json"))
    assert 4 < len(Tokenizer.load(directory).encode("The quick brown fox jumps over")) < 50


def test_token_text_shows_each_token_alone(all_tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("byte_level", "sentencepiece"):
        tokenizer = all_tokenizers[kind]
        ids = tokenizer.encode("The quick fox", is_templated=True)
        assert "".join(map(tokenizer.token_text, ids)).strip() == "The quick fox"
    byte_level = all_tokenizers["byte_level"]
    assert byte_level.token_text(0) == "<s>"
    assert byte_level.token_text(99_999) == ""
    assert "\ufffd" in byte_level.token_text(byte_level.encode("ᚠ")[-1])


def test_the_lower_bound_is_one(all_tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in all_tokenizers.values():
        for text in TEXTS:
            assert tokenizer.num_tokens_at_least(text * 50) <= len(tokenizer.encode(text * 50))
    assert all_tokenizers["byte_level"].num_tokens_at_least("x" * 10_000) > 100


def test_what_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="save_pretrained"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_broken_configuration_is_named(save_tokenizer: SaveTokenizer) -> None:
    directory = save_tokenizer()
    (directory / "tokenizer_config.json").write_text("[")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(directory)
    save_tokenizer(tokenizer_config={"added_tokens_decoder": {"x": {"content": "<a>"}}})
    with pytest.raises(TokenizerError, match="names no valid tokens"):
        Tokenizer.load(directory)


def test_other_threads_run_while_a_long_text_is_encoded(
    all_tokenizers: dict[str, Tokenizer],
) -> None:
    is_done = threading.Event()
    num_turns = 0

    def count() -> None:
        nonlocal num_turns
        while not is_done.wait(0.001):
            num_turns += 1

    thread = threading.Thread(target=count)
    thread.start()
    next(iter(all_tokenizers.values())).encode("a long text, word by word " * 10_000)
    seen = num_turns  # before the interpreter can go to the other thread
    is_done.set()
    thread.join()
    assert seen > 3


def test_a_panic_of_the_library_is_an_ordinary_error() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, " ": 1}, unk_token="a"))
    backend.decoder = decoders.Strip(" ", 1, 1)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TokenizerError, match="fails on this input"):
        Tokenizer(backend).decode([1])
