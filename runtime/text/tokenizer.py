"""Text to token ids and back, from a Hugging Face directory, without importing transformers.

Owns reading `tokenizer.json` and the small files beside it the way transformers reads them. Does
not own streaming (detokenizer.py) or chat templates (chat.py).
"""

import json
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken
from tokenizers.decoders import ByteLevel

NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class TokenizerError(Exception):
    """The directory has no tokenizer that can be served. The message says what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file does not exist. Raises `TokenizerError`."""
    if not path.is_file():
        return {}
    try:
        content: object = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path.name} must hold a JSON object")
    return cast(dict[str, Any], content)


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens. Safe to use from several threads.

    Special tokens are recognised in the text they are given, as in transformers: a caller who
    writes `<|im_end|>` in a prompt or a message sends that token. It can end a turn early or
    fake one, in the caller's own request only.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.special_tokens = special_tokens or {}  # name ("bos_token") to text, for templates
        self.vocab_size = backend.get_vocab_size()
        added = backend.get_added_tokens_decoder()
        self._special_ids = {id_ for id_, token in added.items() if token.special}
        self._skips_special_tokens = True
        self.is_byte_level = isinstance(backend.decoder, ByteLevel)
        self._max_token_bytes = max(
            (len(piece.encode()) for piece in backend.get_vocab()), default=1
        )

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Raises `TokenizerError`."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                "there is no tokenizer.json; make one with "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error
        config = read_json(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # as older releases of transformers saved it
            config |= read_json(directory / "special_tokens_map.json")
        try:
            _add_missing_tokens(backend, config)
        except (AttributeError, TypeError, ValueError) as error:
            raise TokenizerError(f"tokenizer_config.json names no valid tokens: {error}") from error
        special_tokens = {
            name: token.content
            for name in NAMED_SPECIAL_TOKENS
            if (token := _token(config.get(name)))
        }
        return cls(backend, special_tokens)

    @property
    def eos_token_id(self) -> int | None:
        eos = self.special_tokens.get("eos_token")
        return None if eos is None else self._backend.token_to_id(eos)

    def encode(self, text: str, *, is_templated: bool = False) -> list[int]:
        """Token ids of a prompt. Text that a chat template made has its special tokens in it;
        other text gets those that `tokenizer.json`'s post-processor adds, such as a leading bos.
        (`add_bos_token` in the configuration means nothing beside a `tokenizer.json`.) Raises
        `TokenizerError`."""
        # Of a batch, since the library keeps the interpreter to itself while it encodes one text:
        # seconds, for a long one, in which no other thread would run.
        try:
            encodings = self._backend.encode_batch_fast([text], add_special_tokens=not is_templated)
        except BaseException as error:
            raise _failure(error) from error
        return encodings[0].ids

    def decode(self, token_ids: list[int]) -> str:
        """The text, without special tokens and ids that the tokenizer does not know. Raises
        `TokenizerError`."""
        try:
            return self._backend.decode(token_ids, skip_special_tokens=self._skips_special_tokens)
        except BaseException as error:
            raise _failure(error) from error

    def special_id(self, text: str) -> int | None:
        """The id of a special token by its text; None when there is none."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self._special_ids else None

    @property
    def special_texts(self) -> list[str]:
        """The texts of all special tokens."""
        pieces = map(self._backend.id_to_token, self._special_ids)
        return [piece for piece in pieces if piece is not None]

    def showing(self, token_ids: Iterable[int]) -> "Tokenizer":
        """The same tokenizer, but these special tokens are text like any other."""
        shown = copy(self)
        shown._special_ids = self._special_ids - set(token_ids)
        shown._skips_special_tokens = False
        return shown

    def num_tokens_at_least(self, text: str) -> int:
        """A lower bound that costs nothing, to refuse a huge text before tokenising it."""
        if not self.is_byte_level:
            return 0  # one unknown-token may stand for any length
        return len(text) // self._max_token_bytes

    def piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None when it is special or unknown."""
        if token_id in self._special_ids:
            return None
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text, for byte-level tokenizers; special tokens add
        nothing."""
        piece = self.piece(token_id)
        return b"" if piece is None else byte_level_bytes(piece)

    def token_text(self, token_id: int) -> str:
        """A token by itself, special or not, to be shown beside its log-probability. Part of a
        character shows as U+FFFD."""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return ""
        if token_id in self._special_ids:
            return piece
        if self.is_byte_level:
            return byte_level_bytes(piece).decode("utf-8", "replace")
        return piece.replace("\u2581", " ")


def _failure(error: BaseException) -> BaseException:
    """A panic of the library, which is no `Exception` and would end a thread, as one."""
    is_panic = type(error).__name__ == "PanicException"
    return TokenizerError("the tokenizer fails on this input") if is_panic else error


def _token(value: object) -> AddedToken | None:
    """A token of a configuration file: plain text, or an object with `content` and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):  # pyright: ignore[reportUnknownMemberType]
        fields = cast(dict[str, Any], value)
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return AddedToken(fields["content"], **{f: bool(fields[f]) for f in flags if f in fields})
    return None


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that only the configuration names; one that is in the vocabulary keeps its id."""
    listed = cast(dict[str, object], config.get("added_tokens_decoder") or {})
    special = [config.get(name) for name in NAMED_SPECIAL_TOKENS]
    extra: object = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    if isinstance(extra, list):
        special += cast(list[object], extra)
    special_tokens = [token for value in special if (token := _token(value))]
    listed_tokens = [token for id_ in sorted(listed, key=int) if (token := _token(listed[id_]))]

    special_contents = {token.content for token in special_tokens}
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in listed_tokens + special_tokens:
        if token.content not in present:
            token.special = token.special or token.content in special_contents
            backend.add_tokens([token])
            present.add(token.content)


def _byte_of_character() -> dict[str, int]:
    """The table of GPT-2's byte-level BPE, which spells every byte as a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def byte_level_bytes(piece: str) -> bytes:
    """The bytes that a byte-level piece spells; one outside that alphabet is plain text."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in piece])
    except KeyError:
        return piece.encode()
