"""The decoder engine: requests in, a step at a time, token ids and text out.

`decoder.py` steps, `preparation.py` is before, `delivery.py` is what comes out.
"""

from runtime.engine.decoder import DecoderEngine, StepRunner
from runtime.engine.preparation import PreparedRequest
from runtime.scheduling.validation import RequestError

__all__ = ["DecoderEngine", "PreparedRequest", "RequestError", "StepRunner"]
