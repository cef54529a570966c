"""What every token of a vocabulary adds to a text, in bytes, as a grammar needs it.

Owns finding it by evaluating the tokenizer's decoder, and checking it against the text that is
streamed. Does not own grammars (grammars.py).
"""

import random
from collections.abc import Iterable

from runtime.text.detokenizer import BYTE_PIECE, REPLACEMENT, make_detokenizer
from runtime.text.tokenizer import Tokenizer, TokenizerError

SAMPLE_TEXTS = (
    "plain words, and more of them",
    '{"name": "value", "list": [1, -2.5e3, true, null], "nested": {"a b": "\\n"}}',
    "  two spaces\n\n\tlines and tabs  ",
    "äöü ß, 日本語, 한국어, ไทย, 😀👩‍👩‍👧",
)
NUM_SAMPLES = 64  # random sequences that are streamed
SAMPLE_TOKENS = 12
# Every byte of a character beyond ASCII.
CHARACTER_BYTES = frozenset([*range(0x80, 0xC0), *range(0xC2, 0xF5)])


class SpellingError(Exception):
    """What tokens add to a text cannot be told one by one. The message says why."""


class Spelling:
    """The vocabulary, in the form that the grammar library takes (`TokenizerWrapper` there).
    Tokens without bytes never come; special ones only where a grammar names them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_ids: set[int], eos_token_id: int) -> None:
        self.tokens = tokens
        self.special_token_ids = sorted(special_ids)
        self.eos_token_id = eos_token_id
        plain = (token for at, token in enumerate(tokens) if at not in special_ids)
        self._spelled = frozenset(token for token in plain if token)

    def __call__(self, text: bytes) -> list[int]:
        """Token ids of a text that must come; our grammars force none, so nothing asks."""
        return []

    def missing(self, text: Iterable[str]) -> str:
        """The first character that no tokens spell wherever it stands; empty when there is none."""
        for character in text:
            encoded = character.encode("utf-8", "surrogatepass")
            if encoded not in self._spelled and any(
                bytes([byte]) not in self._spelled for byte in encoded
            ):
                return character
        return ""


def spell(tokenizer: Tokenizer, eos_token_ids: list[int], num_tokens: int) -> Spelling:
    """Of the ids below `num_tokens`, as those of the ends must be. Raises `SpellingError`."""
    named = map(tokenizer.special_id, tokenizer.special_texts)
    special_ids = {id_ for id_ in named if id_ is not None and id_ < num_tokens}
    ends = [*eos_token_ids, *sorted(special_ids), num_tokens - 1]  # the library wants one
    never_text = {*special_ids, *eos_token_ids, ends[0]}
    try:
        tokens = _plain_tokens(tokenizer, num_tokens)
        _check(tokenizer, tokens)
    except TokenizerError as error:
        raise SpellingError(str(error)) from error
    for token_id in never_text:
        tokens[token_id] = tokenizer.token_text(token_id).encode("utf-8", "replace")
    return Spelling(tokens, never_text, ends[0])


def _plain_tokens(tokenizer: Tokenizer, num_tokens: int) -> list[bytes]:
    """The bytes of each token that is not special."""
    if tokenizer.is_byte_level:
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(num_tokens)]
    else:
        anchor = _anchors(tokenizer)[0]
        before = tokenizer.decode([anchor])
        tokens = [_evaluate(tokenizer, anchor, before, id_) for id_ in range(num_tokens)]
    single = {token[0] for token in tokens if len(token) == 1}
    if single >= CHARACTER_BYTES:
        return tokens
    # A character that is begun could not be ended.
    return [token if _is_text(token) else b"" for token in tokens]


def _evaluate(tokenizer: Tokenizer, anchor: int, before: str, token_id: int) -> bytes:
    """What a token adds behind another, since the first of a text may lose its space."""
    piece = tokenizer.piece(token_id)
    if piece is None:
        return b""
    whole = tokenizer.decode([anchor, token_id])
    if not whole.startswith(before):
        return b""
    text = whole[len(before) :]
    if REPLACEMENT in text and BYTE_PIECE.fullmatch(piece):  # half a character by itself
        return bytes([int(piece[3:5], 16)])
    return text.encode("utf-8", "replace")


def _anchors(tokenizer: Tokenizer) -> list[int]:
    """Tokens to decode others behind."""
    ids = [id_ for text in SAMPLE_TEXTS for id_ in tokenizer.encode(text, is_templated=True)]
    plain = [
        id_
        for id_ in dict.fromkeys(ids)
        if (piece := tokenizer.piece(id_)) is not None
        and not BYTE_PIECE.fullmatch(piece)
        and REPLACEMENT not in tokenizer.decode([id_])
    ]
    if not plain:
        raise SpellingError("it has no tokens of its own for plain text")
    return plain


def _check(tokenizer: Tokenizer, tokens: list[bytes]) -> None:
    """That streams of texts, and of random tokens, are their bytes. Raises `SpellingError`."""
    choose = random.Random(0)  # noqa: S311
    anchors = _anchors(tokenizer)
    whole = [token_id for token_id, token in enumerate(tokens) if token and _is_text(token)]
    if not whole:
        raise SpellingError("its tokens have no text of their own")
    samples = [tokenizer.encode(text, is_templated=True) for text in SAMPLE_TEXTS]
    samples += [choose.choices(whole, k=SAMPLE_TOKENS) for _ in range(NUM_SAMPLES)]
    for ids in samples:
        if any(id_ >= len(tokens) or (not tokens[id_] and tokenizer.piece(id_)) for id_ in ids):
            continue  # some may never come
        spelled = b"".join(tokens[token_id] for token_id in ids)
        if not _is_text(spelled):
            continue
        detokenizer = make_detokenizer(tokenizer, [choose.choice(anchors)])
        streamed = [detokenizer.add([token_id]) for token_id in ids] + [detokenizer.flush()]
        if "".join(streamed) != spelled.decode():
            raise SpellingError("what a token adds to a text depends on those around it")


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
