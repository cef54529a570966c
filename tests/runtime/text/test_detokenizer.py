"""Streams of text: all deltas together are the text of all ids, and no delta splits a character."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.text.detokenizer import MAX_HELD_TOKENS, make_detokenizer
from runtime.text.tokenizer import Tokenizer

from .conftest import BACKENDS

KINDS = list(BACKENDS)
TEXT = "Héllo wörld, 你好世界! 😀👩‍👩‍👧‍👦 ᚠᛇᚻ don't stop. \n\n  indented\ttext �"
relaxed = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int], prompt: list[int]) -> list[str]:
    """Feed the ids in portions of the given sizes, then one by one; the last delta is the flush."""
    detokenizer = make_detokenizer(tokenizer, prompt)
    deltas, at = [], 0
    for size in [*sizes, *[1] * len(ids)]:
        deltas.append(detokenizer.add(ids[at : at + size]))
        at += size
    return [*deltas, detokenizer.flush()]


def has_long_byte_run(tokenizer: Tokenizer, ids: list[int]) -> bool:
    run = 0
    for piece in filter(None, map(tokenizer.piece, ids)):
        run = run + 1 if piece.startswith("<0x") else 0
        if run >= MAX_HELD_TOKENS:
            return True
    return False


@pytest.mark.parametrize("kind", KINDS)
@relaxed
@given(data=st.data())
def test_deltas_of_any_ids_add_up(
    all_tokenizers: dict[str, Tokenizer], kind: str, data: Any
) -> None:
    tokenizer = all_tokenizers[kind]
    # Ids beyond the vocabulary too: models are often padded to a round number.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=10))
    if not has_long_byte_run(tokenizer, ids):
        assert "".join(stream(tokenizer, ids, sizes, [])) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@relaxed
@given(text=st.text(max_size=80) | st.sampled_from([TEXT, "😀" * 40, "ᚠ" * 100]))
def test_deltas_of_any_text_add_up_and_never_end_inside_a_character(
    all_tokenizers: dict[str, Tokenizer], kind: str, text: str
) -> None:
    tokenizer = all_tokenizers[kind]
    ids = tokenizer.encode(text)
    deltas = stream(tokenizer, ids, [], [])
    assert "".join(deltas) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in delta for delta in deltas)


@pytest.mark.parametrize("kind", KINDS)
@relaxed
@given(words=st.lists(st.sampled_from(TEXT.split(" ")), min_size=2, max_size=12), data=st.data())
def test_text_after_a_prompt_is_what_the_whole_adds(
    all_tokenizers: dict[str, Tokenizer], kind: str, words: list[str], data: Any
) -> None:
    tokenizer = all_tokenizers[kind]
    ids = tokenizer.encode(" ".join(words))
    # A cut inside a run of byte tokens has no text of its own to continue from.
    cuts = [
        at
        for at in range(1, len(ids) + 1)
        if "\ufffd" not in tokenizer.decode(ids[:at])
        and not (tokenizer.piece(ids[at - 1]) or "").startswith("<0x")
    ]
    if not cuts:
        return
    cut = data.draw(st.sampled_from(cuts))
    whole, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
    assert prompt + "".join(stream(tokenizer, ids[cut:], [], ids[:cut])) == whole


def test_a_character_that_the_prompt_began_is_completed(
    all_tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = all_tokenizers["byte_level"]
    ids = tokenizer.encode("ᚠ", is_templated=True)
    assert len(ids) == 3
    assert "".join(stream(tokenizer, ids[2:], [], ids[:2])) == "ᚠ"


def test_text_is_not_held_longer_than_needed(all_tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("byte_level", "sentencepiece"):
        tokenizer = all_tokenizers[kind]
        ids = tokenizer.encode("The quick brown fox", is_templated=True)
        deltas = stream(tokenizer, ids, [], [])
        assert all(deltas[: len(ids)]), "plain words come out token by token"


def test_an_endless_run_of_bytes_is_let_out_at_a_character(
    all_tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = all_tokenizers["sentencepiece"]
    ids = tokenizer.encode("ᚠᛇᚻ" * 60)
    deltas = stream(tokenizer, ids, [], [])
    assert "".join(deltas) == "ᚠᛇᚻ" * 60
    assert sum(map(bool, deltas)) > 10


def test_work_per_token_does_not_grow(
    all_tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = all_tokenizers["sentencepiece"]
    decode, longest = tokenizer.decode, 0

    def watched(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", watched)
    invalid_forever = [3 + 0xFF] * 500
    stream(tokenizer, tokenizer.encode(TEXT * 20) + invalid_forever, [], [])
    assert longest <= 2 * (MAX_HELD_TOKENS + 4)
