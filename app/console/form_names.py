"""What people call the forms of a program."""

FAMILIES = {
    "eager": "As uploaded",
    "aot_inductor": "AOTInductor",
    "inductor": "Inductor",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "fused": "Fused",
    "alone": "One by one",
}


def title_of(name: str) -> str:
    """`onnxruntime_bfloat16` as `ONNX Runtime, bfloat16`."""
    family = max((key for key in FAMILIES if name.startswith(key)), key=len, default="")
    rest = name.removeprefix(family).strip("_").replace("_", " ")
    if not family:
        return name.capitalize()
    return ", ".join(part for part in (FAMILIES[family], rest.lstrip(" ,")) if part)
