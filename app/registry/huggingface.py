"""The files of an unpacked model: a Hugging Face directory, or a program with files beside it.

Collects what the members say as they pass, then judges the directory; programs are judged in
`programs.py`.
"""

import msgspec

from app.core.errors import Unprocessable
from app.registry import refusals
from app.registry.archives import Member
from app.registry.programs import Candidate, may_be_program
from app.registry.safetensors import MAX_HEADER_BYTES, check_safetensors

HEAD_BYTES = 512
MAX_CONFIG_BYTES = 1024**2
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TOKENIZER_NAMES = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"})
PROCESSOR_NAME = "preprocessor_config.json"  # of a model of images or audio
MODULES_NAME = "modules.json"  # of a sentence-transformers directory
INDEX_NAME = "model.safetensors.index.json"
_READ_BYTES = {
    "config.json": MAX_CONFIG_BYTES,
    "tokenizer_config.json": MAX_HEADER_BYTES,
    INDEX_NAME: MAX_HEADER_BYTES,
}


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What lies where, by path from the directory that everything lies in. `has_model`: there is
    a configuration with safetensors weights."""

    sizes: dict[str, int]
    candidates: list[Candidate]
    has_model: bool


class Directory:
    """What an archive unpacks to. `take` every member, then `conclude`."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._sizes: dict[str, int] = {}
        self._candidates: list[Candidate] = []
        self._contents: dict[str, bytes] = {}

    def take(self, member: Member) -> None:
        """Looks at one file's first bytes. Raises `Unprocessable` for what is refused anywhere in
        an archive: code, and weights that contradict their header."""
        self._sizes[member.name] = member.size_bytes
        base = member.name.rsplit("/", 1)[-1]
        if base.endswith(".safetensors"):
            check_safetensors(member.name, member.size_bytes, member.read)
        elif limit := _READ_BYTES.get(base):
            if member.size_bytes > limit:
                raise Unprocessable(
                    f"{member.name} is larger than {limit:,} bytes.", code="config_too_large"
                )
            self._contents[member.name] = member.read(member.size_bytes)
        elif base.endswith((".py", ".pyc")):
            raise Unprocessable(
                f"The upload contains Python code ({member.name[:120]}), which is not run. Remove "
                "it if the model's class is part of transformers.",
                code="remote_code",
            )
        else:
            head = member.read(HEAD_BYTES)
            if base.endswith(refusals.NATIVE_SUFFIXES) or refusals.is_native(head):
                raise refusals.native_code(f"{member.name[:120]!r} in the archive")
            if may_be_program(base, head):
                self._candidates.append(
                    Candidate(
                        name=member.name,
                        size_bytes=member.size_bytes,
                        data_at=member.data_at,
                        head=head,
                    )
                )

    def contents(self) -> Contents:
        """What there is, once every member was taken."""
        prefix = self._root()
        sizes = {
            name.removeprefix(prefix): size_bytes
            for name, size_bytes in self._sizes.items()
            if name.startswith(prefix)
        }
        candidates = [
            msgspec.structs.replace(each, name=each.name.removeprefix(prefix))
            for each in self._candidates
            if each.name.startswith(prefix) and "/" not in each.name.removeprefix(prefix)
        ]
        has_config = "config.json" in sizes and any(name.endswith(".safetensors") for name in sizes)
        return Contents(
            sizes=sizes, candidates=candidates, has_model=has_config or MODULES_NAME in sizes
        )

    def conclude(self, *, is_whole: bool) -> None:
        """Raises `Unprocessable` unless the files are a Hugging Face directory; with `is_whole`
        false, only for what is there, not for what is missing."""
        prefix = self._root()
        names = set(self.contents().sizes)
        self._check_configs(prefix)
        if is_whole:
            _check_complete(names, _top_level(names))
            self._check_shards(prefix, names)
        self._note(names)

    def _root(self) -> str:
        """The directory that everything lies in, as `a/b/` or empty."""
        prefix = ""
        names = list(self._sizes)
        while True:
            first = {name.removeprefix(prefix).partition("/")[::2] for name in names}
            entries = {(name, bool(rest)) for name, rest in first if name != "__MACOSX"}
            if len(entries) != 1 or not next(iter(entries))[1]:
                return prefix
            prefix += next(iter(entries))[0] + "/"
            names = [name for name in names if name.startswith(prefix)]

    def _check_configs(self, prefix: str) -> None:
        if f"{prefix}adapter_config.json" in self._sizes:
            raise Unprocessable(
                "This is an adapter (LoRA), not a whole model. Merge it and upload the result:\n"
                '    model = model.merge_and_unload()\n    model.save_pretrained("merged")',
                code="adapter",
            )
        for name in ("config.json", "tokenizer_config.json"):
            if (data := self._contents.get(prefix + name)) is None:
                continue
            if "auto_map" in _json_object(name, data):
                raise Unprocessable(
                    f"{name} has an auto_map: the model needs Python code of its own, which is not "
                    "run. Use a model class that is part of transformers.",
                    code="remote_code",
                )

    def _check_shards(self, prefix: str, names: set[str]) -> None:
        data = self._contents.get(prefix + INDEX_NAME)
        if data is None:
            return
        try:
            index = msgspec.json.decode(data, type=_Index)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise _invalid_json(INDEX_NAME, error) from error
        if missing := sorted(set(index.weight_map.values()) - names):
            raise Unprocessable(
                f"{len(missing)} of the model's weight files are missing: {missing[0][:120]}. "
                "Upload the whole directory.",
                code="weights_missing",
            )

    def _note(self, names: set[str]) -> None:
        has_tokenizer = any(name.rsplit("/", 1)[-1] in TOKENIZER_NAMES for name in names)
        if not has_tokenizer and PROCESSOR_NAME not in names:
            self.notes.append(
                "There is no tokenizer: the endpoint will take prompts as token ids alone."
            )
        unused = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        if unused:
            self.notes.append(f"Pickled files are not used: {', '.join(unused[:3])}.")


def _top_level(names: set[str]) -> list[str]:
    return sorted({name.partition("/")[0] for name in names})


def _check_complete(names: set[str], top_level: list[str]) -> None:
    # Old sentence-transformers directories keep the model in a directory of its own.
    is_nested = MODULES_NAME in names
    if "config.json" not in names and not is_nested:
        listing = ", ".join(name[:60] for name in top_level[:8])
        more = " ..." if len(top_level) > 8 else ""
        raise Unprocessable(
            "The archive holds neither a program (.pt2, ONNX or TorchScript) nor a Hugging Face "
            "directory (config.json and *.safetensors). It holds: "
            f"{listing + more or 'nothing'}.",
            code="unknown_contents",
        )
    weights = [name for name in names if name.endswith(".safetensors")]
    if not any(is_nested or "/" not in name for name in weights):
        raise Unprocessable(
            "The directory has no *.safetensors weights; pickled weights (pytorch_model.bin) are "
            f"code and are not accepted. Save it again:\n{refusals.SAVE_LINES}",
            code="no_safetensors",
        )


def _json_object(name: str, data: bytes) -> dict[str, object]:
    try:
        return msgspec.json.decode(data, type=dict[str, object])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _invalid_json(name, error) from error


def _invalid_json(name: str, error: Exception) -> Unprocessable:
    return Unprocessable(f"{name} is not valid JSON: {error}.", code="invalid_json")
