"""What a file is when it is not a model that can be served, and the lines that make it one.

Tells kinds apart by their first bytes, member names and pickle opcodes, never by running them.
The texts are for the person who uploaded the file.
"""

import pickletools
import re

from app.core.errors import Unprocessable

MAX_PICKLE_BYTES = 512 * 1024  # read for the message alone: nothing is ever unpickled

EXPORT_LINES = """\
    example = (torch.randn(2, ...),)  # your inputs, a batch of 2
    batch = {0: torch.export.Dim.DYNAMIC}  # one of these for each input
    program = torch.export.export(model.eval(), example, dynamic_shapes=(batch,))
    torch.export.save(program, "model.pt2")"""
SAVE_LINES = """\
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(directory, safe_serialization=True)"""
PACK_LINES = "    tar -cf model.tar -C my-model ."

NATIVE_SUFFIXES = (
    ".so", ".dylib", ".dll", ".pyd", ".exe", ".o", ".a", ".cubin", ".ptx", ".cu", ".cpp", ".hsaco",
)  # fmt: skip
NATIVE_MAGICS = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"\xca\xfe\xba\xbe")
_PICKLE_MAGIC = re.compile(rb"\x80[\x02-\x05]")
_COMPRESSIONS = ((b"\xfd7zXZ", "xz"), (b"BZh", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd"))
# What a checkpoint of tensors names; any other global means pickled classes.
_TENSOR_GLOBALS = ("torch ", "torch._utils ", "torch._tensor ", "torch.nn.parameter ")
_CONTAINER_GLOBALS = ("collections OrderedDict", "_codecs encode")


def describe_file(head: bytes, size_bytes: int) -> Unprocessable:
    """The refusal of a file that is no archive, from its first `MAX_PICKLE_BYTES`."""
    if _PICKLE_MAGIC.match(head):
        return describe_pickle(head)
    if _is_safetensors(head, size_bytes):
        return Unprocessable(
            "These are weights without a model. Upload the whole directory as one archive, with "
            f"config.json and the tokenizer:\n{PACK_LINES}",
            code="bare_safetensors",
        )
    for magic, name in _COMPRESSIONS:
        if head.startswith(magic):
            return Unprocessable(
                f"The archive is compressed with {name}. Weights barely compress; upload a plain "
                f"one:\n{PACK_LINES}",
                code="compression",
            )
    if head.startswith(b"GGUF"):
        return Unprocessable(
            "GGUF files are not served. Upload the original Hugging Face directory as a tar:\n"
            f"{PACK_LINES}",
            code="gguf",
        )
    if is_native(head):
        return native_code("The file")
    return Unprocessable(
        "The file is not recognised. Accepted are a .pt2 from torch.export.save, an .onnx file, "
        "TorchScript, or a .tar, .tar.gz or .zip of a Hugging Face directory (config.json, "
        f"*.safetensors, tokenizer files). For a PyTorch module:\n{EXPORT_LINES}",
        code="unknown_format",
    )


def describe_torch_zip(names: list[str]) -> Unprocessable | str | None:
    """What a zip that torch wrote is, from its member names: a refusal, or the name of the pickle
    that decides. None when torch did not write it."""
    if any(name.endswith(".data/extern_modules") for name in names):
        return Unprocessable(
            "This is a torch.package, which is Python code. Export the model instead:\n"
            f"{EXPORT_LINES}",
            code="torch_package",
        )
    if "serialized_exported_program.json" in names:
        return Unprocessable(
            "This program was saved by torch 2.7 or older, whose format holds pickled weights. "
            f"Export it again with torch 2.8 or later:\n{EXPORT_LINES}",
            code="old_export",
        )
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if not pickles:
        return None
    return pickles[0]


def describe_pickle(data: bytes) -> Unprocessable:
    """The refusal of what `torch.save` wrote, from the pickle's opcodes."""
    classes = sorted(name for name in pickle_globals(data) if not _is_tensor_global(name))
    if classes:
        shown = classes[0].replace(" ", ".")[:120]
        return Unprocessable(
            f"This is a pickled module (it names the class {shown}): a pickle is code and is never "
            "loaded here. Load it where you trained it and export it:\n"
            f'    model = torch.load("model.pt", weights_only=False)\n{EXPORT_LINES}',
            code="pickled_module",
        )
    return Unprocessable(
        "This is a bare state dict: weights without the model that uses them. Load it into your "
        'model and export that:\n    model.load_state_dict(torch.load("model.pt"))\n'
        f"{EXPORT_LINES}",
        code="state_dict",
    )


def pickle_globals(data: bytes) -> set[str]:
    """`"module name"` of every global that a pickle would import. Best effort: it chooses a
    message and guards nothing."""
    found: set[str] = set()
    strings: list[str] = []
    # A file of the format before torch 1.6 is several pickles in a row: a magic number, a
    # protocol, system information, then the object.
    for start in [0, *(match.start() for match in _PICKLE_MAGIC.finditer(data, 1, 512))]:
        try:
            for opcode, argument, _ in pickletools.genops(data[start:]):
                if opcode.name == "GLOBAL":
                    found.add(str(argument))
                elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    found.add(f"{strings[-2]} {strings[-1]}")
                elif isinstance(argument, str):
                    strings.append(argument)
        except (ValueError, IndexError, OverflowError):
            continue  # cut off, or no pickle after all: what was read so far decides
    return found


def native_code(what: str) -> Unprocessable:
    return Unprocessable(
        f"{what} is native code. It is never loaded here: models are compiled on this box. Export "
        f"the model:\n{EXPORT_LINES}",
        code="native_code",
    )


def pickled_weights(what: str) -> Unprocessable:
    return Unprocessable(
        f"The program stores {what[:120]!r} as a pickle, which is code and is never loaded here. "
        "This happens with tensor subclasses (quantised or distributed tensors); convert them to "
        f"plain tensors and export again:\n{EXPORT_LINES}",
        code="pickled_weights",
    )


def is_native(head: bytes) -> bool:
    """ELF, Mach-O or a Windows executable."""
    return head.startswith(NATIVE_MAGICS) or (head[:2] == b"MZ" and b"This program" in head[:512])


def _is_tensor_global(name: str) -> bool:
    return name.startswith(_TENSOR_GLOBALS) or name in _CONTAINER_GLOBALS


def _is_safetensors(head: bytes, size_bytes: int) -> bool:
    header_bytes = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= header_bytes <= size_bytes
