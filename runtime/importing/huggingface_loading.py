"""Loads a transformers module from a judged directory: safetensors, no code, no surprises in size.

Does not know how the module is served: `huggingface.py` pages it, `huggingface_uncached.py` runs
it whole, a proof compares with it.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when transformers is imported

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from runtime.importing.huggingface_directory import check_directory
from runtime.importing.huggingface_probe import attention_not_found
from runtime.importing.program import ImportFailure

DEFAULT_MAX_CONTEXT_TOKENS = 32768  # where the configuration sets no limit
LARGEST_CONTEXT_TOKENS = 1 << 20
LARGEST_SIZE = 1 << 24  # of any dimension in a configuration
LARGEST_BUFFERS = 1 << 28  # elements that a model may make up beside its weights
FEWEST_LAYERS = 1024  # that may be asked for however few tensors there are
SIZES = re.compile(
    r"(^|_)(num|n|size|dim|rank|heads?|layers?|experts?|groups?|positions?|embd|embeddings|inner|"
    r"width|state|kernel|conv|ctx|channels|vocab|depth|blocks?|tokens?)(_|$)"
)
COUNTS = re.compile(r"(^|_)(layers?|blocks?|depth)(_|$)")
# Of other things than the model's own tensors.
HARMLESS = re.compile(r"_token_id$|_token_index$|^rope_theta$|_id$")

_Loaded = TypeVar("_Loaded")


def load_original(directory: Path | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The untouched transformers model, attention eager, on the CPU: what a proof compares to."""
    check_directory(Path(directory))
    module = from_pretrained(Path(directory), "eager", dtype)[0]
    if module._can_set_experts_implementation():
        module.set_experts_implementation("eager")
    return module.eval().requires_grad_(False)


def load_module(
    directory: Path,
    attention: str | None,
    dtype: torch.dtype | None,
    notes: list[str],
    auto: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """A module with all its weights; those it has no use for are noted."""
    module, loading = from_pretrained(directory, attention, dtype, auto, lists_mismatches=True)
    missing = sorted(loading["missing_keys"])
    if missing or loading["mismatched_keys"]:
        # Each with its name, the file's shape and the model's.
        wrong = missing or sorted(str(key[0]) for key in loading["mismatched_keys"])
        raise ImportFailure(
            "incomplete_weights",
            f"{len(wrong)} weights of {type(module).__name__} are missing or have the wrong shape "
            f"({', '.join(wrong[:3])}). Save the model again with "
            "model.save_pretrained(directory) and upload the whole directory.",
        )
    unused = sorted(loading["unexpected_keys"])
    if unused:
        notes.append(f"{len(unused)} weights in the upload are not used ({', '.join(unused[:3])}).")
    return module


def from_pretrained(
    directory: Path,
    attention: str | None,
    dtype: torch.dtype | None,
    auto: Any = AutoModelForCausalLM,
    *,
    lists_mismatches: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The module and what transformers tells of its loading; with `lists_mismatches` also of
    weights of a wrong shape, which the caller must then refuse. Raises `ImportFailure`, with code
    `attention_not_found` for a class that knows no attention but its own."""
    transformers.logging.disable_progress_bar()

    def load() -> Any:
        try:
            return auto.from_pretrained(
                directory,
                dtype=dtype or "auto",
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=lists_mismatches,
            )
        except KeyError as error:
            if error.args == (attention,):  # an old-style class, with a table of its own
                raise attention_not_found() from error
            raise

    return by_transformers(auto, load)


def check_sizes(
    directory: Path, config_json: dict[str, Any], auto: Any = AutoModelForCausalLM
) -> None:
    """Refuse a configuration that describes much more than the files hold, before any of it is
    allocated: a number with some zeros too many would otherwise take all memory, or for ever.
    `auto` is the transformers class that the model is going to be loaded with."""
    stored = _measure_files(directory)
    _check_numbers(config_json, max(FEWEST_LAYERS, stored.num_tensors))
    config: Any = by_transformers(
        auto,
        lambda: AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        ),
    )

    def outline() -> PreTrainedModel:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False, attn_implementation="eager")

    module = by_transformers(auto, outline)
    num_weights = sum(parameter.numel() for parameter in module.parameters())
    num_made_up = sum(buffer.numel() for buffer in module.buffers())
    allowed = 2 * stored.num_elements + (1 << 20)
    if num_weights > allowed or num_made_up > stored.num_elements + LARGEST_BUFFERS:
        raise ImportFailure(
            "config_mismatch",
            f"config.json describes {num_weights:,} weights and {num_made_up:,} other numbers, "
            f"but the safetensors files hold {stored.num_elements:,}. Upload the configuration "
            "that belongs to these weights.",
        )


def vocab_size_of(module: PreTrainedModel) -> int:
    head = module.get_output_embeddings()
    if head is None:
        raise ImportFailure(
            "not_a_decoder", f"{type(module).__name__} has no output layer over its vocabulary."
        )
    return int(head.weight.shape[0])


def num_ids_of(module: PreTrainedModel) -> int:
    """How many ids of its vocabulary the model can look up: its output layer may be padded."""
    weight = getattr(module.get_input_embeddings(), "weight", None)
    num_ids = vocab_size_of(module)
    return min(num_ids, int(weight.shape[0])) if isinstance(weight, Tensor) else num_ids


def max_context_tokens_of(config: PreTrainedConfig, notes: list[str]) -> int:
    """The longest context whose positions are exact.

    Rotary embeddings of types `dynamic` and `longrope` change every position's angle once a
    sequence outgrows the trained length. Cached keys would then be wrong, and so would the shorter
    neighbours in a batch, so the context ends where that starts.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        limit = DEFAULT_MAX_CONTEXT_TOKENS
        notes.append(f"The configuration sets no context limit; {limit} tokens are served.")
    if limit > LARGEST_CONTEXT_TOKENS:
        notes.append(f"Of {limit:,} tokens of context, {LARGEST_CONTEXT_TOKENS:,} are served.")
        limit = LARGEST_CONTEXT_TOKENS
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = parameters.get("rope_type")
        trained = parameters.get("original_max_position_embeddings")
        trained = trained or getattr(config, "original_max_position_embeddings", None) or limit
        if kind in ("dynamic", "longrope"):
            limit = min(limit, int(trained))
            notes.append(
                f"Rotary scaling of type {kind} is length-dependent beyond {trained} tokens; the "
                f"context is limited to {limit} tokens, where cached keys are exact."
            )
    return limit


def first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")


@dataclass(frozen=True)
class _Stored:
    num_tensors: int
    num_elements: int


def _measure_files(directory: Path) -> _Stored:
    """From the safetensors headers (8 bytes of length, then JSON) alone."""
    num_tensors = num_elements = 0
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(length))
            shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
            num_tensors += len(shapes)
            num_elements += sum(_product(shape) for shape in shapes)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ImportFailure(
                "invalid_weights", f"{path.name} is not a safetensors file: {error}."
            ) from error
        if num_elements > 8 * _bytes_of(directory):  # a header may promise what is not there
            raise ImportFailure("invalid_weights", f"{path.name} is cut off.")
    return _Stored(num_tensors, num_elements)


def _bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _check_numbers(config: dict[str, Any], most_layers: int) -> None:
    """Look through a configuration and those nested in it for sizes that no model has."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_numbers(value, most_layers)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if HARMLESS.search(name) or not SIZES.search(name):
            continue
        most = most_layers if COUNTS.search(name) else LARGEST_SIZE
        if not -1 <= value <= most:
            raise ImportFailure(
                "config_mismatch",
                f"config.json says {name} = {value}, which does not fit these weights (between -1 "
                f"and {most:,} would be possible).",
                param=name,
            )


def by_transformers(auto: Any, call: Callable[[], _Loaded]) -> _Loaded:
    """What `call` returns, which loads something with the class `auto`. Raises `ImportFailure`
    for whatever it raises."""
    try:
        return call()
    except ImportFailure:
        raise
    # transformers raises whatever a malformed configuration makes it stumble over.
    except Exception as error:
        raise ImportFailure(
            "load_failed",
            f"transformers {transformers.__version__} cannot load this model: "
            f"{first_line(error)}. Check that {auto.__name__}.from_pretrained(directory) works "
            "with that version.",
        ) from error
