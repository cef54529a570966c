"""The name of a usage series: the same in every process, so that none has to look it up."""

import hashlib

import msgspec


class SeriesKey(msgspec.Struct, frozen=True, array_like=True):
    """What tells one series from another, in the order of the table's columns."""

    organization_id: str
    api_key_id: str
    endpoint_name: str
    version_number: int
    service_class: str
    dimension: str
    disposition: str
    price_book_id: str
    price_nano: int
    unit_scale: int

    @property
    def id(self) -> str:
        """128 bits of SHA-256, hexadecimal."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:32]
