"""Loads the compiled C++ operators: the fastest variant that this CPU runs, once per process."""

import logging
from functools import cache
from typing import Any

import torch

from runtime.execution.native import Variant, library_path, variants

logger = logging.getLogger(__name__)

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def load_variant(variant: Variant) -> Any:
    """Its operators. Raises `OSError` if the library is missing or does not load.

    Once per process, even if the sources have since changed and with them the library's path:
    operators registered a second time abort the process.
    """
    torch.ops.load_library(str(library_path(variant)))
    return getattr(torch.ops, variant.namespace)


def prefer_variant(name: str) -> bool:
    """Let this process use the variant of that name, the one that a proof ran on. To be called
    before anything is loaded. Returns whether it serves here; else the fastest does."""
    fastest_variant.cache_clear()
    PREFERRED[:] = [name]
    found = fastest_variant()
    if found is not None and found.name == name:
        return True
    serving = found.name if found else "torch's"
    logger.warning("C++ operators %s were proved, but %s serve on this CPU", name, serving)
    return False


PREFERRED: list[str] = []


@cache
def fastest_variant() -> Variant | None:
    """The fastest that is compiled, runs on this CPU and loads, unless another that does was
    preferred; None if there is none."""
    for variant in sorted(variants(), key=lambda each: each.name not in PREFERRED):
        if not variant.is_supported or not library_path(variant).is_file():
            continue
        try:
            load_variant(variant)
        except OSError as error:
            logger.warning("C++ operators %s do not load: %s", variant.name, error)
        else:
            return variant
    return None
