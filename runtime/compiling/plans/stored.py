"""Reads tensors straight from the members of a `program.pt2`, without torch's graph loader."""

import hashlib
import json
import math
import re
import zipfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from runtime.compiling.plans.plan import PlanUnusable, StoredTensor

CHUNK_BYTES = 1 << 20  # of a member at a time: checked while it is in the cache
_CONFIG = re.compile(r"data/(weights|constants)/[^/]+_config\.json")


class StoredTensors:
    """The tensors of an open program. Reading a member checks its checksum."""

    def __init__(self, path: Path) -> None:
        self._kept: dict[str, Tensor] = {}
        self._archive = zipfile.ZipFile(path)
        # Without the top folder, whose name is the file's.
        self._members = {info.filename.partition("/")[2]: info for info in self._archive.infolist()}

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._archive.close()

    def digest(self) -> str:
        """Of every member's name, size and checksum: all that the program is."""
        digest = hashlib.sha256()
        for name, info in sorted(self._members.items()):
            digest.update(f"{name} {info.file_size} {info.CRC:08x}\n".encode())
        return digest.hexdigest()

    def member_names(self) -> dict[str, str]:
        """By the name of each parameter, buffer and constant, the member that holds it."""
        found: dict[str, str] = {}
        for name in self._members:
            if match := _CONFIG.fullmatch(name):
                config = json.loads(self._archive.read(self._members[name]))["config"]
                for tensor, payload in config.items():
                    found[tensor] = f"data/{match[1]}/{payload['path_name']}"
        return found

    def read(self, stored: StoredTensor) -> Tensor:
        """A tensor; views of one member that are kept share its memory (see `keep`). Raises
        `PlanUnusable`."""
        dtype: torch.dtype = getattr(torch, stored.dtype)
        if not math.prod(stored.size):
            return torch.empty(stored.size, dtype=dtype)
        if stored.member:
            data = self._kept.get(stored.member)
            data = self._read_member(stored.member) if data is None else data
        else:
            data = torch.frombuffer(bytearray(stored.data), dtype=torch.uint8)
        try:
            return data.view(dtype).as_strided(stored.size, stored.stride, stored.offset)
        except RuntimeError as error:
            raise PlanUnusable(f"{stored.member or 'a constant'} has another size") from error

    def keep(self, stored: StoredTensor) -> Tensor:
        """`read`, and remember the member for all that read it later."""
        if stored.member and stored.member not in self._kept:
            self._kept[stored.member] = self._read_member(stored.member)
        return self.read(stored)

    def _read_member(self, name: str) -> Tensor:
        """Its bytes."""
        info = self._members.get(name)
        if info is None:
            raise PlanUnusable(f"the program has no {name}")
        data = torch.empty(info.file_size, dtype=torch.uint8)
        view, start = data.numpy(), 0
        try:
            with self._archive.open(info) as file:
                while chunk := file.read(CHUNK_BYTES):
                    view[start : start + len(chunk)] = memoryview(chunk)
                    start += len(chunk)
        except zipfile.BadZipFile as error:  # its checksum differs
            raise PlanUnusable(f"{name} is damaged") from error
        return data


def store(tensor: Tensor) -> StoredTensor:
    """A small tensor with its own data."""
    tensor = tensor.detach().cpu().contiguous()
    return StoredTensor(
        dtype=str(tensor.dtype).removeprefix("torch."),
        size=list(tensor.shape),
        stride=list(tensor.stride()),
        offset=0,
        data=bytes(tensor.flatten().view(torch.uint8).numpy()) if tensor.numel() else b"",
    )
