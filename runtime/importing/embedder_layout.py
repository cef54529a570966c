"""Reads what makes a directory an embedder: sentence-transformers' files, or a plain encoder's.

Loads no weights. A module that is not known is refused by name, never skipped.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.importing.huggingface_directory import read_json, refuse_code
from runtime.importing.program import ImportFailure

MODULES_NAME = "modules.json"
MAX_MODULES = 16
MAX_PATH_BYTES = 255  # which every file system takes
HUGE_LENGTH = 10**9  # tokenizers without a limit of their own name one beyond it

# The configuration's keys of releases before 6, and the modes' names in later ones.
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLING_NAMES = {mode: mode for mode in _POOLING_KEYS.values()} | {"lasttoken": "last"}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")


@dataclass(frozen=True)
class DenseLayout:
    """A linear layer after pooling; its weights are `directory / "model.safetensors"`."""

    directory: Path
    in_features: int
    out_features: int
    has_bias: bool
    activation: str  # one of `ACTIVATIONS`


@dataclass(frozen=True)
class EmbedderLayout:
    """`steps` follow the pooling, in order; None normalises. `prompt` goes before every text.
    `max_tokens` is what the files say of it, if anything."""

    transformer: Path
    pooling: tuple[str, ...]
    steps: tuple[DenseLayout | None, ...] = ()
    prompt: str = ""
    lowercases: bool = False
    max_tokens: int | None = None
    matryoshka_dimensions: list[int] | None = None
    notes: list[str] = field(default_factory=list)
    modules: list[Path] = field(default_factory=list)  # directories beside the root

    @property
    def is_normalized(self) -> bool:
        return bool(self.steps) and self.steps[-1] is None


def is_embedder(directory: Path) -> bool:
    """Whether the directory holds a model that turns a text into one vector: a
    sentence-transformers directory, or an encoder saved without a head."""
    if (directory / MODULES_NAME).is_file():
        return True
    config = read_json(directory / "config.json")
    model_type: Any = config.get("model_type")
    named = config.get("architectures")
    from transformers.models.auto import modeling_auto as auto

    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type)
    if masked is None or config.get("is_decoder"):
        return False
    if not isinstance(named, list) or not named:
        return model_type not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoders = (
        masked,
        auto.MODEL_MAPPING_NAMES.get(model_type),
        auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES.get(model_type),
    )
    names = {
        name for found in encoders for name in ([found] if isinstance(found, str) else found or ())
    }
    return str(named[0]) in names


def read_layout(directory: Path) -> EmbedderLayout:
    """Raises `ImportFailure` for a layout that is damaged or not known."""
    if not (directory / MODULES_NAME).is_file():
        note = (
            "There is no sentence-transformers layout (modules.json): a text's vector is the mean "
            "of its tokens' vectors, as sentence-transformers does for a plain encoder."
        )
        return EmbedderLayout(
            directory,
            ("mean",),
            max_tokens=_max_tokens(directory),
            matryoshka_dimensions=_matryoshka(directory),
            notes=[note],
        )
    refuse_code(directory, read_json(directory / "config.json"))
    modules = _modules(directory)
    (_, transformer), (_, pooling_path), *rest = modules
    settings = read_json(transformer / "sentence_bert_config.json")
    pooling = read_json(pooling_path / "config.json")
    prompt = _prompt(directory)
    if prompt and pooling.get("include_prompt") is False:
        raise _unsupported("a pooling that leaves the prompt out (include_prompt: false)")
    return EmbedderLayout(
        transformer,
        _pooling_modes(pooling),
        tuple(_step(kind, path) for kind, path in rest),
        prompt=prompt,
        lowercases=bool(settings.get("do_lower_case")),
        max_tokens=_max_tokens(transformer),
        matryoshka_dimensions=_matryoshka(transformer),
        notes=[f"Every text is preceded by the model's own prompt, {prompt!r}."] if prompt else [],
        modules=[path for _, path in modules if path != directory],
    )


# --- the modules ------------------------------------------------------------------------


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """Each module's class and directory: a transformer, a pooling and what follows."""
    try:
        listed = json.loads((directory / MODULES_NAME).read_text(encoding="utf-8"))
        modules = sorted(listed, key=lambda module: int(module["idx"]))
        found = [(str(m["type"]).rsplit(".", 1)[-1], str(m["path"])) for m in modules]
    except (ValueError, RecursionError, TypeError, KeyError, OverflowError) as error:
        raise ImportFailure(
            "invalid_json", f"{MODULES_NAME} is not a list of modules: {error}."
        ) from error
    kinds = [kind for kind, _ in found if kind != "Dropout"]  # which does nothing when serving
    if len(kinds) > MAX_MODULES:
        raise _unsupported(f"{len(kinds)} modules in a row")
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
            raise _unsupported(f"the module {kind[:80]!r}")
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) & {"Transformer", "Pooling"}:
        raise _unsupported(f"the order of modules {' > '.join(kinds) or 'of none at all'}")
    return [(kind, _inside(directory, path)) for kind, path in found if kind != "Dropout"]


def _inside(directory: Path, path: str) -> Path:
    if len(path.encode(errors="replace")) > MAX_PATH_BYTES:
        raise ImportFailure(
            "archive_path",
            f"{MODULES_NAME} names a path of more than {MAX_PATH_BYTES} bytes: {path[:40]!r}...",
        )
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or "\\" in path or "\0" in path or path.startswith("/"):
        raise ImportFailure("archive_path", f"{MODULES_NAME} names a path outside the directory.")
    return directory.joinpath(*parts)


def _pooling_modes(config: dict[str, Any]) -> tuple[str, ...]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _POOLING_KEYS.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or not set(map(str, modes)) <= set(_POOLING_NAMES):
        raise _unsupported(f"the pooling {str(modes)[:80]!r}")
    return tuple(_POOLING_NAMES[str(mode)] for mode in modes)


def _step(kind: str, path: Path) -> DenseLayout | None:
    config = read_json(path / "config.json")
    if kind == "Normalize":
        return None
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = name.rsplit(".", 1)[-1]
    if not name.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise _unsupported(f"a dense layer with the activation {name[:80]!r}")
    between = [config.get(f"module_{end}_name") for end in ("input", "output")]
    if config.get("use_residual") or not set(between) <= {None, "sentence_embedding"}:
        raise _unsupported("a dense layer beside the main path")
    sizes = [config.get("in_features"), config.get("out_features")]
    if not all(isinstance(size, int) and 0 < size < 2**20 for size in sizes):
        raise ImportFailure("invalid_json", "A dense layer's config.json gives no valid sizes.")
    if not (path / "model.safetensors").is_file():
        raise ImportFailure(
            "pickled_weights",
            f"The dense layer in {path.name!r} has no model.safetensors; pickled weights can run "
            "code when loaded. Save the model again with SentenceTransformer(...).save(directory).",
        )
    return DenseLayout(path, sizes[0], sizes[1], bool(config.get("bias", True)), activation)  # type: ignore[arg-type]


# --- small settings ---------------------------------------------------------------------


def _prompt(directory: Path) -> str:
    """What goes before every text: the prompt that the configuration makes the default."""
    config = read_json(directory / "config_sentence_transformers.json")
    prompts, name = config.get("prompts"), config.get("default_prompt_name")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    return prompt if isinstance(prompt, str) else ""


def _max_tokens(directory: Path) -> int | None:
    named = (
        read_json(directory / "sentence_bert_config.json").get("max_seq_length"),
        read_json(directory / "tokenizer_config.json").get("model_max_length"),
    )
    limits = [limit for limit in named if isinstance(limit, int) and 0 < limit < HUGE_LENGTH]
    return min(limits, default=None)


def _matryoshka(directory: Path) -> list[int] | None:
    config = read_json(directory / "config.json")
    sizes = config.get("matryoshka_dimensions")
    if isinstance(sizes, list) and all(isinstance(size, int) and size > 0 for size in sizes):
        return sorted(set(sizes))
    return [] if config.get("is_matryoshka") is True else None


def _unsupported(what: str) -> ImportFailure:
    return ImportFailure(
        "unsupported_embedder",
        f"This sentence-transformers model uses {what}, which is not served. Served are a "
        "transformer, a pooling (cls, mean, max, last token ...), dense layers and normalisation.",
    )
