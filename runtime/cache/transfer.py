"""Takes tensors between the processor and a device so that neither waits more than it must.

`send` and `pinned` never make the processor wait for a CUDA device; `fetch` does, once.
"""

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor in memory that `device` can read by itself, to be copied with `non_blocking`.

    Pinned memory comes from torch's cache, which gives none of it out again before the copies
    from it are done; so it may be dropped at once.
    """
    return tensor.pin_memory() if device.type == "cuda" else tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, there when the device's later work needs it."""
    return pinned(tensor, device).to(device, non_blocking=True)


def is_at_hand(tensor: Tensor) -> bool:
    """Whether its numbers can be asked for without waiting for a device."""
    return tensor.device.type == "cpu"


def fetch(*tensors: Tensor) -> list[Tensor]:
    """Several tensors of one device on the CPU, as float64 (which holds token ids exactly), by one
    transfer and so one wait."""
    together = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu()
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
