"""What the processor of this machine can do natively, as the kernel tells."""

from functools import cache
from pathlib import Path

# By precision, the flags of x86 and ARM, one of which makes arithmetic in it fast.
_FLAGS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


@cache
def processor() -> tuple[str, frozenset[str]]:
    """Its name and its instruction sets."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or fields.get("CPU part") or "unnamed processor"
    return name, frozenset((fields.get("flags") or fields.get("Features") or "").split())


def lacks_precision(precision: str, device: str) -> str | None:
    """Why arithmetic in `precision` is not native there, in one plain sentence."""
    if precision not in _FLAGS:
        return None
    if device.startswith("cuda"):
        import torch

        least = (8, 0) if precision == "bfloat16" else (7, 0)
        if torch.cuda.get_device_capability(device) >= least:
            return None
        return f"This GPU computes {precision} no faster than float32."
    if processor()[1] & _FLAGS[precision]:
        return None
    return f"This processor has no instructions for {precision}, so it would only be slower."
