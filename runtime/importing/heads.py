"""Loads a transformers model with a head, and says how it is called: names, axes and values.

Owns the load and its refusals. Exporting it is `compiling/heads_export.py`'s; what a tokenizer or
an image processor beside it does, `heads_text.py`'s and `heads_images.py`'s.
"""

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from runtime.importing.heads_images import ImageSize, read_image
from runtime.importing.heads_layout import HeadLayout
from runtime.importing.huggingface_directory import check_files, read_json
from runtime.importing.huggingface_loading import check_sizes, load_module
from runtime.importing.program import ImportFailure
from runtime.protocol import ImageInput

DEFAULT_MAX_TOKENS = 512  # of a row, where nothing sets a limit
HUGE_LENGTH = 10**9  # tokenizers without a limit of their own name one beyond it
EXAMPLE_TOKENS = 19  # a short sentence; a length that is no size of a model's own
# An example waveform: this many frames of the model's own, and as many again.
EXAMPLE_FRAMES = 23
MAX_BATCH_ROWS = 128  # of a run, as `Serve.max_batch_rows`
MAX_RUN_TOKENS = 32_768
LONGEST_ROW = 8192  # tokens
MAX_ROW_NUMBERS = 1 << 23  # of a picture or a spectrogram: 1,600 pixels square
MAX_RUN_NUMBERS = 1 << 27
_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
BATCH, TOKENS, SAMPLES, FRAMES = "batch", "tokens", "samples", "frames"


@dataclass(frozen=True)
class HeadInput:
    """One tensor that the model takes. `axes` are sizes, or the names of dynamic ones, the batch
    first; integers run from 0 to `most`, and `pad` is what fills rows that are shorter."""

    name: str
    axes: tuple[int | str, ...]
    most: int | None = None
    pad: int = 0
    image: ImageInput | None = None

    @property
    def is_integer(self) -> bool:
        return self.most is not None


@dataclass(frozen=True)
class HeadModel:
    """`bounds` of the dynamic axes besides the batch: least, greatest (None: any) and the size of
    an example."""

    module: PreTrainedModel
    inputs: list[HeadInput]
    bounds: dict[str, tuple[int, int | None, int]]
    notes: list[str]

    @property
    def max_tokens(self) -> int | None:
        return self.bounds[TOKENS][1] if TOKENS in self.bounds else None

    @property
    def max_rows(self) -> int | None:
        """Of one run, so that rows of full size fit the memory of a small box; None: any."""
        most = MAX_RUN_NUMBERS // self.num_numbers
        if self.max_tokens is not None:
            most = MAX_RUN_TOKENS // self.max_tokens
        return None if most >= MAX_BATCH_ROWS else max(1, most)

    @property
    def num_numbers(self) -> int:
        """In one row of its largest input, of an example's size where it may have several."""
        sizes = {name: size for name, (_, _, size) in self.bounds.items()}
        return max(
            math.prod(sizes[axis] if isinstance(axis, str) else axis for axis in each.axes[1:])
            for each in self.inputs
        )


def load_head(layout: HeadLayout, attention: str | None = None) -> HeadModel:
    """On the CPU, in the dtype it was saved in; without `attention`, by the fastest that the
    class has. Raises `ImportFailure`, also for a head whose weights are not in the files: it
    would classify at random."""
    directory = layout.directory
    config_json = check_files(directory)
    auto = getattr(transformers, layout.task.auto)
    check_sizes(directory, config_json, auto)
    notes: list[str] = []
    module = load_head_module(layout, attention, notes=notes)
    if layout.task.medium == "text":
        inputs, bounds = _text_inputs(module, directory, notes)
    elif layout.task.medium == "image":
        inputs, bounds = _image_inputs(module, directory, notes), {}
    else:
        inputs, bounds = _audio_inputs(module, directory)
    model = HeadModel(module, inputs, bounds, notes)
    if model.num_numbers > MAX_ROW_NUMBERS:
        raise ImportFailure(
            "config_mismatch",
            f"The configuration asks for {model.num_numbers:,} numbers in each row of "
            f"{inputs[0].name}; at most {MAX_ROW_NUMBERS:,} are taken.",
        )
    return model


def load_head_module(
    layout: HeadLayout,
    attention: str | None = "eager",
    dtype: torch.dtype | None = None,
    notes: list[str] | None = None,
) -> PreTrainedModel:
    """The module by itself: what a proof compares with, too."""
    auto = getattr(transformers, layout.task.auto)
    module = load_module(
        layout.directory, attention, dtype, [] if notes is None else notes, auto=auto
    )
    if module._can_set_experts_implementation():
        module.set_experts_implementation("eager")
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    return module.eval().requires_grad_(False)


# --- texts ------------------------------------------------------------------------------


def _text_inputs(
    module: PreTrainedModel, directory: Path, notes: list[str]
) -> tuple[list[HeadInput], dict[str, tuple[int, int | None, int]]]:
    weight = module.get_input_embeddings().get_parameter("weight")
    vocab_size = int(weight.shape[0])
    pad = module.config.get_text_config().pad_token_id
    pad = pad if isinstance(pad, int) and 0 <= pad < vocab_size else 0
    axes = (BATCH, TOKENS)
    taken = inspect.signature(module.forward).parameters
    inputs = [HeadInput("input_ids", axes, most=vocab_size - 1, pad=pad)]
    if "attention_mask" in taken:
        inputs.append(HeadInput("attention_mask", axes, most=1))
    num_types = getattr(module.config, "type_vocab_size", None)
    if "token_type_ids" in taken and isinstance(num_types, int) and num_types > 1:
        inputs.append(HeadInput("token_type_ids", axes, most=num_types - 1))
    most = max_tokens_of(module, directory)
    if most > LONGEST_ROW:
        notes.append(f"Of rows of {most:,} tokens, those of up to {LONGEST_ROW:,} are taken.")
        most = LONGEST_ROW
    return inputs, {TOKENS: (1, most, min(EXAMPLE_TOKENS, most))}


def max_tokens_of(module: PreTrainedModel, directory: Path) -> int:
    """The longest row that its files allow and whose positions the model has. Families whose
    tables keep entries for padding have fewer than their configuration says."""
    limits = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in module.named_modules()
        if isinstance(table, nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITION_TABLES
    ]
    named = (
        getattr(module.config, "max_position_embeddings", None),
        read_json(directory / "sentence_bert_config.json").get("max_seq_length"),
        read_json(directory / "tokenizer_config.json").get("model_max_length"),
    )
    limits += [limit for limit in named if isinstance(limit, int) and 0 < limit < HUGE_LENGTH]
    return min(limits, default=DEFAULT_MAX_TOKENS)


# --- images -----------------------------------------------------------------------------


def _image_inputs(module: PreTrainedModel, directory: Path, notes: list[str]) -> list[HeadInput]:
    config = module.config
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", 3)
    channels = channels if isinstance(channels, int) and channels > 0 else 3
    image, note = read_image(directory, channels)
    notes += [note] if note else []
    size = ImageSize.of(image) or ImageSize.named(getattr(vision, "image_size", None))
    return [HeadInput("pixel_values", (BATCH, channels, size.height, size.width), image=image)]


# --- audio ------------------------------------------------------------------------------


def _audio_inputs(
    module: PreTrainedModel, directory: Path
) -> tuple[list[HeadInput], dict[str, tuple[int, int | None, int]]]:
    """By the kind of features: a raw waveform, or spectrograms of a fixed or of any length."""
    config = module.config
    name = str(module.main_input_name)
    if _are_sizes(kernels := getattr(config, "conv_kernel", None)) and _are_sizes(
        strides := getattr(config, "conv_stride", None)
    ):
        frame, hop = _receptive_field(kernels, strides)
        inputs = [HeadInput(name, (BATCH, SAMPLES))]
        if _wants_mask(config, directory):
            inputs.append(HeadInput("attention_mask", (BATCH, SAMPLES), most=1))
        return inputs, {SAMPLES: (frame + hop, None, frame + EXAMPLE_FRAMES * hop)}
    bins = getattr(config, "num_mel_bins", None)
    if isinstance(bins, int) and isinstance(length := getattr(config, "max_length", None), int):
        return [HeadInput(name, (BATCH, length, bins))], {}
    if isinstance(bins, int) and isinstance(
        length := getattr(config, "max_source_positions", None), int
    ):
        return [HeadInput(name, (BATCH, bins, 2 * length))], {}
    if isinstance(width := getattr(config, "feature_projection_input_dim", None), int):
        inputs = [
            HeadInput(name, (BATCH, FRAMES, width)),
            HeadInput("attention_mask", (BATCH, FRAMES), most=1),
        ]
        return inputs, {FRAMES: (2, None, EXAMPLE_FRAMES)}
    raise ImportFailure(
        "unsupported_audio",
        f"The configuration of {type(module).__name__} does not say what its audio looks like "
        "(conv_kernel and conv_stride, or num_mel_bins and a length). Export the model with "
        "torch.export.save(program, path) and upload that.",
    )


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_size, value))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _receptive_field(kernels: list[int], strides: list[int]) -> tuple[int, int]:
    """Samples that the first frame sees, and samples from one frame to the next."""
    frame, hop = 1, 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=False):
        frame = (frame - 1) * stride + kernel
        hop *= stride
    return frame, hop


def _wants_mask(config: Any, directory: Path) -> bool:
    """As the feature extractor does; models with a group norm were trained on zeros instead."""
    said = read_json(directory / "preprocessor_config.json").get("return_attention_mask")
    if isinstance(said, bool):
        return said
    return getattr(config, "feat_extract_norm", "group") == "layer"
