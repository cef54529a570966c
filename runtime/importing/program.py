"""What importing gives the rest of the runtime, and how it fails. No loader lives here."""

from typing import Protocol

import torch
from torch import nn

from runtime.execution.runner import PagedModel
from runtime.protocol import DecoderInfo, WireError
from runtime.text.printable import printable


class ImportFailure(Exception):
    """The upload cannot be served; `error.message` says why and what its owner can do."""

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        message = printable(message)
        super().__init__(message)
        self.error = WireError(
            type="invalid_request_error", message=message, code=code, param=param, status=422
        )


class Decoder(PagedModel, Protocol):
    """A loaded decoder, ready for a `Runner`, whatever format it came in."""

    @property
    def info(self) -> DecoderInfo: ...

    @property
    def module(self) -> nn.Module:
        """What holds the weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights lie, and so the pool must."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence, as the model's owner configured them."""
        ...

    @property
    def notes(self) -> list[str]:
        """What the owner should know of how the model is served, in plain words."""
        ...
