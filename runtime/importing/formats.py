"""Names what an upload is when it is not servable, and the lines that make it so.

Reads headers, member names and pickle opcodes; never unpickles. The texts are written for
the person who uploaded the file.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from runtime.importing.program import ImportFailure

MAX_OPCODES_BYTES = 8 * 1024**2
LEGACY_PICKLES = 5  # torch before 1.6: magic number, version, system, the object, its storages

EXPORT_LINES = """\
    example = (torch.randn(2, ...),)  # your inputs, a batch of 2
    batch = {0: torch.export.Dim("batch")}  # one of these for each input
    program = torch.export.export(model.eval(), example, dynamic_shapes=(batch,))
    torch.export.save(program, "model.pt2")"""

# What a tensor-only checkpoint names; any other global means pickled classes.
_TENSOR_GLOBALS = ("torch ", "torch._utils ", "torch._tensor ", "torch.nn.parameter ")
_CONTAINER_GLOBALS = ("collections OrderedDict", "_codecs encode", "__builtin__ set")


# ir_version, then another field of a model, as the ONNX libraries write them.
_ONNX_HEAD = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42\x72]")


def is_onnx(head: bytes) -> bool:
    """Whether a file that begins with `head` is an ONNX model."""
    return _ONNX_HEAD.match(head) is not None


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether `torch.jit.save` wrote the zip."""
    parts = [name.partition("/") for name in archive.namelist()]
    roots = {root for root, _, rest in parts if rest == "data.pkl" or rest.endswith("/data.pkl")}
    return any(root in roots and rest.startswith("code/") for root, _, rest in parts)


def describe_foreign_zip(archive: zipfile.ZipFile) -> ImportFailure | None:
    """Why a zip that torch wrote, and that is no program, is not servable; None when torch did not
    write it."""
    names = archive.namelist()
    if any(name.endswith(".data/extern_modules") for name in names):
        return ImportFailure(
            "torch_package",
            f"This is a torch.package, which is Python code. Export the model instead:\n"
            f"{EXPORT_LINES}",
        )
    if "serialized_exported_program.json" in names:
        return ImportFailure(
            "old_export",
            "This program was saved by torch 2.7 or older, whose format holds pickled weights. "
            f"Export it again with torch 2.8 or later:\n{EXPORT_LINES}",
        )
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if not pickles:
        return None
    with archive.open(pickles[0]) as file:
        return describe_pickle(file.read(MAX_OPCODES_BYTES))


def describe_pickle(data: bytes) -> ImportFailure:
    """The refusal of a file that `torch.save` wrote, from its opcodes alone."""
    classes = [name for name in pickle_globals(data) if not _is_harmless_global(name)]
    if classes:
        shown = classes[0].replace(" ", ".")
        return ImportFailure(
            "pickled_module",
            f"This is a pickled module (it names the class {shown[:120]}): a pickle is code and is "
            "never loaded here. Load it where you trained it and export it:\n"
            f'    model = torch.load("model.pt", weights_only=False)\n{EXPORT_LINES}',
        )
    return ImportFailure(
        "state_dict",
        "This is a bare state dict: weights without the model that uses them. Load it into your "
        'model and export that:\n    model.load_state_dict(torch.load("model.pt"))\n'
        f"{EXPORT_LINES}",
    )


def pickle_globals(data: bytes) -> list[str]:
    """`"module name"` of every global a pickle would import, in order, read without running it.
    Best effort: it chooses a message, it guards nothing."""
    stream = io.BytesIO(data)
    found: list[str] = []
    try:
        for _ in range(LEGACY_PICKLES):
            found += _one_pickle(stream)
    except ValueError:
        pass  # cut short, or the last pickle was read: what was found so far decides
    return found


def _one_pickle(stream: io.BytesIO) -> Iterator[str]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            yield str(argument)
        elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
            yield f"{strings[-2]} {strings[-1]}"
        elif isinstance(argument, str):
            strings.append(argument)


def _is_harmless_global(name: str) -> bool:
    return name.startswith(_TENSOR_GLOBALS) or name in _CONTAINER_GLOBALS


def describe_unknown(path: Path, head: bytes) -> ImportFailure:
    """The refusal of a file that is no archive."""
    if not path.stat().st_size:
        return ImportFailure("empty", "The file is empty.")
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        with path.open("rb") as file:
            return describe_pickle(file.read(MAX_OPCODES_BYTES))
    if _is_safetensors(head):
        return ImportFailure(
            "bare_safetensors",
            "These are weights without a model. Upload the whole directory as one archive, with "
            "config.json and the tokenizer:\n    tar -cf model.tar -C my-model .",
        )
    for magic, name in ((b"\xfd7zXZ", "xz"), (b"BZh", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if head.startswith(magic):
            return ImportFailure(
                "compression",
                f"The archive is compressed with {name}. Weights barely compress; upload a plain "
                "one:\n    tar -cf model.tar -C my-model .",
            )
    if head.startswith(b"GGUF"):
        return ImportFailure(
            "gguf",
            "GGUF files are not served. Upload the original Hugging Face directory as a tar.",
        )
    if head.startswith((b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe")):
        return ImportFailure(
            "native_code", f"This is native code. Export the model:\n{EXPORT_LINES}"
        )
    return ImportFailure(
        "unknown_format",
        "The file is not recognised. Accepted are a .pt2 from torch.export.save, an .onnx file, "
        "TorchScript, or a .tar, .tar.gz or .zip of a Hugging Face directory (config.json, "
        f"*.safetensors, tokenizer files). For a PyTorch module:\n{EXPORT_LINES}",
    )


def _is_safetensors(head: bytes) -> bool:
    header_bytes = int.from_bytes(head[:8], "little")
    return len(head) > 9 and 2 <= header_bytes < 2**32 and head[8:9] == b"{"
