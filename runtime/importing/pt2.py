"""Checks the members of a `.pt2` archive before torch sees it.

`torch.export.load` (2.11 to 2.13) unpickles whatever a member's configuration tells it to,
loads bundled shared objects, and evaluates shape expressions as Python. These checks refuse
all three with a reason. They are the message, not the wall: the wall is the sandbox of the
process that loads the file.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from runtime.importing.formats import EXPORT_LINES
from runtime.importing.program import ImportFailure

MAX_JSON_BYTES = 256 * 1024**2
MAX_CONFIG_TENSORS = 100_000
MAX_MEMBERS = 20_000
NATIVE_SUFFIXES = (".so", ".cubin", ".cpp", ".o", ".a", ".dll", ".dylib", ".ptx", ".cu", ".hsaco")
# Shape expressions: symbols, numbers, arithmetic and the functions torch itself defines.
_EXPRESSION = re.compile(r"[A-Za-z0-9_+\-*/(), .<>=!&|~]*")
_DECLARED = re.compile(r"Symbol\('(\w+)'(?:, [a-z_]+=(?:True|False))*\)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SYMBOL = re.compile(r"(zs|zf|s|u|z|f)\d+|_?[a-z]{1,3}\d+")
_FUNCTIONS = re.compile(
    "FloorDiv|ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|"
    "RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|"
    "TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity|Max|Min|Abs|Piecewise|"
    "And|Or|Not|Eq|Ne|Lt|Le|Gt|Ge|True|False|true|false|floor|ceiling|sqrt|"
    "Add|Mul|Pow|Integer|Rational|Float|Equality|Unequality|StrictLessThan|LessThan|"
    "StrictGreaterThan|GreaterThan"
)


def is_pt2(archive: zipfile.ZipFile) -> bool:
    """Whether the zip is a PT2 archive: `archive_format` in its single top folder, or the
    members of an exported program or AOTInductor package."""
    return any(
        name.partition("/")[2] == "archive_format"
        or name.partition("/")[2].startswith(("models/", "data/aotinductor/"))
        for name in archive.namelist()
    )


def check_pt2(archive: zipfile.ZipFile, archive_bytes: int) -> None:
    """Raises `ImportFailure` unless the archive is one graph with plain tensor weights."""
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise ImportFailure(
            "archive_members", f"The archive has more than {MAX_MEMBERS:,} members."
        )
    _check_container(members, archive_bytes)
    names = [member.filename.partition("/")[2] for member in members]
    _check_kinds(names)
    for member in members:
        name = member.filename.partition("/")[2]
        if re.fullmatch(r"data/(weights|constants)/[^/]+_config\.json", name):
            _check_payloads(_read_json(archive, member), name)
        elif name == "models/model.json":
            _check_expressions(_read_json(archive, member))


def _check_container(members: list[zipfile.ZipInfo], archive_bytes: int) -> None:
    seen: set[str] = set()
    total_bytes = 0
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ImportFailure(
                "pt2_compressed",
                f"The member {member.filename[:200]!r} is compressed; torch.export.save stores its "
                "members. Upload the file as it was saved.",
            )
        if ".." in member.filename.split("/") or member.filename.startswith("/"):
            raise ImportFailure(
                "archive_path",
                f"The archive member {member.filename[:200]!r} points outside the archive.",
            )
        if member.filename in seen:
            raise ImportFailure(
                "archive_duplicate", f"{member.filename[:200]!r} is in the archive twice."
            )
        seen.add(member.filename)
        total_bytes += member.file_size
    if total_bytes > archive_bytes:
        raise ImportFailure("archive_damaged", "The archive's members overlap or it is cut short.")


def _check_kinds(names: list[str]) -> None:
    if any(name.startswith("data/aotinductor/") for name in names) or any(
        name.endswith(NATIVE_SUFFIXES) for name in names
    ):
        raise ImportFailure(
            "native_code",
            "The archive holds compiled code (an AOTInductor package), which is never loaded here: "
            f"models are compiled on this box. Upload the exported program:\n{EXPORT_LINES}",
        )
    models = [name for name in names if name.startswith("models/")]
    if models != ["models/model.json"]:
        raise ImportFailure(
            "pt2_models",
            "The archive must hold exactly one exported program named 'model', as "
            f"torch.export.save writes it:\n{EXPORT_LINES}",
        )
    if any(
        name.startswith(("data/weights/", "data/constants/")) and _is_legacy(name) for name in names
    ):
        raise _pickled("weights")
    if any(re.match(r"data/constants/(custom_obj|opaque_obj|script_obj)", name) for name in names):
        raise ImportFailure(
            "custom_objects",
            "The program holds custom objects (torch.classes or opaque constants), which are "
            "stored as pickles. Use plain tensors, and export the model again.",
        )


def _is_legacy(name: str) -> bool:
    return name.endswith((".pt", ".pkl"))


def _check_payloads(config: Any, name: str) -> None:
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict) or len(entries) > MAX_CONFIG_TENSORS:
        raise ImportFailure(
            "pt2_damaged", f"{name} is not a table of at most {MAX_CONFIG_TENSORS} tensors."
        )
    for tensor, payload in entries.items():
        # Only a literal false is trusted: the loader tests truth, not type.
        if not isinstance(payload, dict) or payload.get("use_pickle") is not False:
            raise _pickled(str(tensor)[:120])
        path = payload.get("path_name")
        if not isinstance(path, str) or not re.fullmatch(r"(weight|tensor)_\d+", path):
            raise ImportFailure(
                "custom_objects",
                f"{str(tensor)[:120]!r} is not a plain tensor. Use plain tensors and export again.",
            )


def _pickled(what: str) -> ImportFailure:
    return ImportFailure(
        "pickled_weights",
        f"The program stores {what!r} as a pickle, which is code and is never loaded here. This "
        "happens with tensor subclasses (quantised or distributed tensors); convert them to plain "
        f"tensors and export again:\n{EXPORT_LINES}",
    )


def _check_expressions(program: Any) -> None:
    for expression in _expressions(program):
        bare = _DECLARED.sub(r"\1", expression)
        names = _NAME.findall(bare)
        is_plain = _EXPRESSION.fullmatch(bare) and "__" not in bare
        if not is_plain or not all(
            _FUNCTIONS.fullmatch(name) or _SYMBOL.fullmatch(name) for name in names
        ):
            raise ImportFailure(
                "shape_expression",
                f"The shape expression {expression[:80]!r} is not one that torch.export writes.",
            )


def _expressions(value: Any) -> Iterator[str]:
    """Every string that torch hands to sympy: `expr_str` values and the keys of the ranges."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, dict):
            if "expr_str" in value:
                yield str(value["expr_str"])
            if isinstance(ranges := value.get("range_constraints"), dict):
                yield from ranges
            stack.extend(value.values())


def _read_json(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    if member.file_size > MAX_JSON_BYTES:
        raise ImportFailure(
            "pt2_damaged", f"{member.filename[:200]} is larger than any graph should be."
        )
    try:
        return json.loads(archive.read(member))
    except (ValueError, RecursionError, zipfile.BadZipFile) as error:
        raise ImportFailure("pt2_damaged", f"{member.filename[:200]} is not valid JSON.") from error
