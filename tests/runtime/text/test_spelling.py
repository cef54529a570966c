"""The bytes that grammars are told of are the text that callers see."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from runtime.text.detokenizer import make_detokenizer
from runtime.text.grammars import GrammarCompiler, GrammarUnavailableError, schema_source
from runtime.text.spelling import SpellingError, spell
from runtime.text.tokenizer import Tokenizer
from tests.runtime.text.conftest import BACKENDS
from tests.runtime.text.metaspace import EOS_ID, IRREGULAR, SCHEMES, SPECIAL, metaspace

MADE: dict[str, tokenizers.Tokenizer] = {
    **{f"{scheme}, bytes": metaspace(scheme, has_bytes=True) for scheme in SCHEMES},
    **{f"{scheme}, no bytes": metaspace(scheme, has_bytes=False) for scheme in SCHEMES},
    **{kind: BACKENDS[kind]() for kind in ("byte_level", "sentencepiece", "metaspace")},
}
TOKENIZERS = {kind: Tokenizer(backend) for kind, backend in MADE.items()}
SPELLINGS = {kind: spell(each, [EOS_ID], each.vocab_size) for kind, each in TOKENIZERS.items()}


def id_of(backend: tokenizers.Tokenizer, piece: str) -> int:
    token_id = backend.token_to_id(piece)
    assert token_id is not None
    return token_id


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_are_what_is_streamed(kind: str, data: st.DataObject) -> None:
    tokenizer, tokens = TOKENIZERS[kind], SPELLINGS[kind].tokens
    special = SPELLINGS[kind].special_token_ids
    visible = [id_ for id_ in range(tokenizer.vocab_size) if id_ not in special and tokens[id_]]
    ids = data.draw(st.lists(st.sampled_from(visible), max_size=20))
    try:
        text = b"".join(tokens[token_id] for token_id in ids).decode()
    except UnicodeDecodeError:
        return
    prompt = data.draw(st.sampled_from(["Say it: ", "x", " a\n"]))
    detokenizer = make_detokenizer(tokenizer, tokenizer.encode(prompt))
    streamed = [detokenizer.add([token_id]) for token_id in ids]
    assert "".join(streamed) + detokenizer.flush() == text


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("has_bytes", [True, False])
def test_spaces_bytes_and_special_tokens(scheme: str, has_bytes: bool) -> None:
    backend = metaspace(scheme, has_bytes=has_bytes)
    tokenizer = Tokenizer(backend)
    spelling = spell(tokenizer, [EOS_ID], tokenizer.vocab_size + 5)

    def spelled(piece: str) -> bytes:
        return spelling.tokens[id_of(backend, piece)]

    assert spelled("\u2581") == b" "
    assert spelled("\u2581\u2581") == b"  "
    assert spelled("\u2581name") == b" name"
    assert spelled("日") == "日".encode()
    assert spelled("<tool_call>") == b"<tool_call>"
    if has_bytes:
        assert [spelled(f"<0x{byte:02X}>") for byte in range(256)] == [
            bytes([byte]) for byte in range(256)
        ]
    assert spelling.special_token_ids == [id_of(backend, piece) for piece in SPECIAL]
    assert spelling.tokens[-5:] == [b""] * 5
    assert spelling.missing("any {text}\n") == ""
    assert spelling.missing("日é語ж") == ("" if has_bytes else "語")


def test_byte_pieces_of_a_decoder_that_reads_none_are_plain() -> None:
    backend = metaspace("always", has_bytes=True)
    backend.decoder = decoders.Metaspace()
    tokens = spell(Tokenizer(backend), [EOS_ID], backend.get_vocab_size()).tokens
    assert tokens[id_of(backend, "<0xE6>")] == b"<0xE6>"


def test_characters_that_could_not_be_ended_are_never_begun() -> None:
    backend = metaspace("always", has_bytes=True)
    spelled = spell(Tokenizer(backend), [EOS_ID], id_of(backend, "<0xF0>")).tokens
    assert spelled[id_of(backend, "<0x41>")] == b"A"
    assert spelled[id_of(backend, "<0xE6>")] == b""


@pytest.mark.parametrize("kind", IRREGULAR)
def test_tokens_without_bytes_of_their_own_are_refused(kind: str) -> None:
    tokenizer = Tokenizer(IRREGULAR[kind]())
    with pytest.raises(GrammarUnavailableError, match="does not allow structured output"):
        GrammarCompiler(tokenizer, [EOS_ID]).compile(schema_source("{}"))


def test_a_decoder_that_looks_around_is_noticed() -> None:
    tokenizer = Tokenizer(IRREGULAR["suffixed"]())
    with pytest.raises(SpellingError, match="depends on those around it"):
        spell(tokenizer, [EOS_ID], tokenizer.vocab_size)


def test_the_space_of_an_answer_behind_many_bytes_is_kept() -> None:
    tokenizer = TOKENIZERS["always, bytes"]
    prompt = tokenizer.encode("Say it: " + "語" * 12)
    detokenizer = make_detokenizer(tokenizer, prompt)
    assert detokenizer.add(tokenizer.encode("name")) + detokenizer.flush() == " name"
