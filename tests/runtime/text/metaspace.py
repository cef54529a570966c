"""Tokenizers whose spaces come from Metaspace, as sentencepiece models are converted, with every
character that JSON needs; and some whose decoders are less regular."""

import string
from collections.abc import Callable

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

SPACE = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>", "[TOOL_CALLS]"]
WORDS = ["name", "kind", "tool_call", "arguments", "true", "null", "value", '":', '",', "{", "}"]
CHARACTERS = [*(set(string.printable) - set(" \t\r\x0b\x0c")), "é", "日"]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
EOS_ID = 2
SCHEMES = ["always", "first", "never"]


def metaspace(scheme: str, *, has_bytes: bool, is_sequence: bool = False) -> tokenizers.Tokenizer:
    """BPE without merges: a character each, but for words that are added as they are. With
    `is_sequence` the decoder is a chain of Metaspace and others."""
    pieces = [*SPECIAL, *(BYTE_PIECES if has_bytes else []), SPACE, *sorted(CHARACTERS)]
    pieces += [SPACE + word for word in WORDS] + [SPACE * 2, "na", "me"]
    pieces = list(dict.fromkeys(pieces))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: at for at, piece in enumerate(pieces)},
            merges=[(SPACE, SPACE), ("n", "a"), ("m", "e")],
            unk_token="<unk>",
            byte_fallback=has_bytes,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    spaces = decoders.Metaspace(prepend_scheme=scheme)
    if has_bytes or is_sequence:
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), spaces])
    else:
        backend.decoder = spaces
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return backend


def joined_by_spaces() -> tokenizers.Tokenizer:
    """Without a decoder, every token is a word."""
    backend = metaspace("never", has_bytes=False)
    backend.decoder = None  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def suffixed() -> tokenizers.Tokenizer:
    """What a token adds depends on whether it is the last."""
    backend = metaspace("never", has_bytes=False)
    backend.decoder = decoders.BPEDecoder(suffix="e")
    return backend


IRREGULAR: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "joined by spaces": joined_by_spaces,
    "suffixed": suffixed,
}
