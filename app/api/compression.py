"""Bodies packed with gzip or deflate: requests unpacked within a bound, answers packed."""

import zlib

from app.core.errors import InvalidRequest, TooLarge, UnsupportedMediaType

GZIP, ZLIB, BARE = 31, 15, -15  # zlib's `wbits`
WINDOW_BITS = {"gzip": GZIP, "deflate": ZLIB}
LEVEL = 1  # tensors hardly shrink further
MIN_PACKED_BYTES = 1024  # less is not worth it


def unpacked(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """`encoding` is the header `Content-Encoding`. Raises `TooLarge` as soon as the content is
    larger than `max_bytes`, `InvalidRequest` for damage, or `UnsupportedMediaType`."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in WINDOW_BITS:
        raise UnsupportedMediaType(
            f"Content-Encoding {encoding[:40]!r} is not known here; send gzip, deflate or neither."
        )
    try:
        return _inflated(body, WINDOW_BITS[encoding], max_bytes)
    except zlib.error:
        pass
    if encoding == "deflate":  # some clients leave the wrapper away
        try:
            return _inflated(body, BARE, max_bytes)
        except zlib.error:
            pass
    raise InvalidRequest(f"The body is not {encoding}, as its Content-Encoding says.")


def _inflated(body: bytes, window_bits: int, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(window_bits)
    content = inflater.decompress(body, max_bytes + 1)
    if len(content) > max_bytes:
        raise TooLarge(f"The body is larger than {max_bytes:,} bytes when it is unpacked.")
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest("The packed body is cut short, or something follows it.")
    return content


def accepted_encoding(accept_encoding: str) -> str:
    """The first of gzip and deflate that the client lists, or nothing."""
    for part in accept_encoding.lower().split(","):
        name, _, options = part.partition(";")
        refuses = options.replace(" ", "").startswith("q=0") and not options.strip("q=0. ")
        if name.strip() in WINDOW_BITS and not refuses:
            return name.strip()
    return ""


def packed(content: bytes, encoding: str) -> bytes:
    """`encoding` is gzip or deflate."""
    deflater = zlib.compressobj(LEVEL, zlib.DEFLATED, WINDOW_BITS[encoding])
    return deflater.compress(content) + deflater.flush()
