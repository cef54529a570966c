"""States as the console shows them: a coloured light and a word."""

from typing import Literal

import msgspec

Tone = Literal["good", "bad", "busy", ""]


class Lamp(msgspec.Struct, frozen=True):
    """`tone` colours the light; the text alone says what is meant."""

    tone: Tone
    text: str
