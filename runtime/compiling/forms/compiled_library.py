"""Calls a library of AOTInductor's on the processor, through its C interface.

torch's own runner holds Python's interpreter lock for as long as a run takes, which would stop
the worker from reading requests meanwhile; a call through ctypes gives the lock up.
"""

import ctypes
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_torch: Any = torch._C
_MADV_PAGEOUT = 21  # of Linux

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype = ctypes.c_char_p
_capsule_name.argtypes = [ctypes.py_object]


class CompiledLibrary:
    """A loaded library, called with the graph's tensors; one call at a time. Lives as long as the
    process does. Raises `RuntimeError` with the library's reason when it reports an error, which
    it writes to standard error too, with torch's stack."""

    def __init__(self, path: Path, num_outputs: int) -> None:
        self._library = ctypes.CDLL(str(path))
        self._container = ctypes.c_void_p()
        self._check(
            self._library.AOTInductorModelContainerCreateWithDevice(
                ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None
            )
        )
        found = ctypes.c_size_t()
        self._check(
            self._library.AOTInductorModelContainerGetNumOutputs(
                self._container, ctypes.byref(found)
            )
        )
        if found.value != num_outputs:
            raise RuntimeError(f"the library gives {found.value} outputs, not {num_outputs}")
        self._num_outputs = num_outputs
        _page_out(path)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        capsules = _torch._aoti.unsafe_alloc_void_ptrs_from_tensors(inputs)
        handles = [_capsule_pointer(capsule, _capsule_name(capsule)) for capsule in capsules]
        arguments = (ctypes.c_void_p * len(handles))(*handles)  # the run frees what they point to
        results = (ctypes.c_void_p * self._num_outputs)()
        self._check(
            self._library.AOTInductorModelContainerRun(
                self._container,
                arguments,
                ctypes.c_size_t(len(handles)),
                results,
                ctypes.c_size_t(self._num_outputs),
                None,
                None,
            )
        )
        return _torch._aoti.alloc_tensors_by_stealing_from_void_ptrs(
            [_new_capsule(result, None, None) for result in results]
        )

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(self._reason() or "the compiled program failed")

    def _reason(self) -> str:
        """The first line of this thread's last error; libraries of older torches keep none."""
        last_error = getattr(self._library, "AOTInductorGetLastError", None)
        if last_error is None:
            return ""
        message = ctypes.c_char_p()
        last_error(ctypes.byref(message))
        lines = (message.value or b"").decode(errors="replace").strip().splitlines()
        return lines[0] if lines else ""


def _page_out(path: Path) -> None:
    """Give back the pages of the file: the library has copied its weights, and would be counted
    with them twice. What is needed again is read again."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    try:
        maps = Path("/proc/self/maps").read_text()
    except PermissionError:  # a child of a sandboxed process may not look at itself
        logger.info("the pages of %s stay in memory", path.name)
        return
    for line in maps.splitlines():
        if line.endswith(str(path.resolve())):
            start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
            advise(start, end - start, _MADV_PAGEOUT)  # refused by old kernels: nothing is lost
