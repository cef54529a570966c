"""Builds a tensor program of a transformers model with a head: exported, proved, with its texts.

Owns what is said of inputs that cannot be taken, and what of the directory is packaged. The
program's own proof and measurements are `tensor.py`'s.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec
import tokenizers
import torch

from runtime.batching.text_rows import TextRows
from runtime.building.deadline import within
from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.building.tensor import build_tensor
from runtime.compiling.heads_export import export_head
from runtime.compiling.packaging import PROGRAM_NAME, add_program
from runtime.importing.archive import UnpackedUpload
from runtime.importing.exported import ExportedProgramModel, load_exported
from runtime.importing.heads import HeadModel, load_head
from runtime.importing.heads_layout import HeadLayout
from runtime.importing.heads_text import TOKENIZER_NAME, HeadText, read_text
from runtime.importing.knowledge import set_schema
from runtime.importing.program import ImportFailure
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import BuildHints, Check, ImageInput, Schema, TensorSpec
from runtime.proving.heads import HeadProof, prove_head
from runtime.proving.heads_inputs import check_image, check_texts

EXPORT_SECONDS = 240.0
# What of the directory is in the artifact, in one form or another.
USED_FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "LICENSE*",
    PROGRAM_NAME,  # exported beside them
)
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
IMAGE_FILES = ("preprocessor_config.json",)


def build_head(
    upload: UnpackedUpload,
    layout: HeadLayout,
    scratch: Path,
    reporter: Reporter,
    hints: BuildHints,
) -> Outcome:
    """Raises `ImportFailure`."""
    path = scratch / PROGRAM_NAME
    with reporter.phase("import") as report:
        report(0.0, f"loading {layout.architecture}, which {layout.task.name}")
        model, text, notes = _load(layout)
        report(0.5, "exporting it as a graph")
        model = _export(layout, model, path)
        program = load_exported(path)
        set_schema(program, _described(program.schema, model))
        # The graph has the weights; the proof is going to load them once more.
        model.module.to(torch.device("meta"))  # pyright: ignore[reportArgumentType]
    with reporter.phase("prove") as report:
        report(0.0, "comparing the graph with transformers' own forward")
        proof = prove_head(layout, model, program)
        _require(proof)
        checks = [*proof.checks]
        if proof.pads_harmlessly:
            set_schema(program, _with_padding(program, model, proof.longest_padded))
        if text is not None:
            text = _proved(text, program.schema, checks, notes)
        else:
            _prove_image(layout, program, checks, notes)
    padded = {spec.name: spec.padded_axis for spec in _specs(program.schema)}
    lengths = {spec.name: spec.longest_padded for spec in program.schema.inputs}
    images = {spec.name: spec.image for spec in program.schema.inputs}
    if model.max_rows is not None:
        notes.append(
            f"A run holds at most {model.max_rows:,} rows, since each may be large; requests of "
            "more are run in parts."
        )
    notes += [*model.notes, *proof.notes, *_output_notes(layout, program.schema)]
    outcome = build_tensor(
        upload,
        program,
        reporter,
        hints,
        add=lambda _, artifact_dir: add_program(path, artifact_dir),
    )
    assert outcome.manifest.schema is not None, "a tensor program has a schema"
    outcome.manifest = msgspec.structs.replace(
        outcome.manifest,
        schema=_settled(outcome.manifest.schema, padded, lengths, images),
        text=text.text if text else None,
        labels=_labels(layout, program.schema),
        are_labels_independent=layout.are_labels_independent,
    )
    outcome.checks = [*checks, *outcome.checks]
    outcome.notes = [*notes, *outcome.notes]
    add = outcome.package

    def package(artifact_dir: Path) -> list[str]:
        add(artifact_dir)
        return _package(layout.directory, artifact_dir, text, has_images=any(images.values()))

    outcome.package = package
    return outcome


# --- importing --------------------------------------------------------------------------


def _load(layout: HeadLayout) -> tuple[HeadModel, HeadText | None, list[str]]:
    """The model as its tokenizer calls it, and notes."""
    model = load_head(layout)
    if layout.task.medium != "text":
        return model, None, []
    text, note = read_text(model, layout.directory)
    notes = [note] if note else []
    return (replace(model, inputs=text.inputs) if text else model), text, notes


def _export(layout: HeadLayout, model: HeadModel, path: Path) -> HeadModel:
    """Saves the graph; the model returned is the one that was exported. Raises `ImportFailure`
    with the reason of the attention that the class prefers, the fastest."""
    try:
        try:
            _save(model, path)
        except ImportFailure as failure:
            eager = replace(load_head(layout, "eager"), inputs=model.inputs)
            try:
                _save(eager, path)
            except ImportFailure:
                raise failure from None
            return eager
    except TimeoutError as error:
        raise ImportFailure("export_failed", str(error)) from error
    return model


def _save(model: HeadModel, path: Path) -> None:
    with within(EXPORT_SECONDS, "exporting the model as a graph"):
        torch.export.save(export_head(model), path)


# --- the schema -------------------------------------------------------------------------


def _specs(schema: Schema) -> list[TensorSpec]:
    return [*schema.inputs, *schema.outputs]


def _described(schema: Schema, model: HeadModel) -> Schema:
    """With the values that each input takes, its padding and its images."""
    known = {each.name: each for each in model.inputs}

    def describe(spec: TensorSpec) -> TensorSpec:
        each = known[spec.name]
        if each.most is None:
            return msgspec.structs.replace(spec, image=each.image)
        return msgspec.structs.replace(
            spec, minimum=0.0, maximum=float(each.most), pad_value=float(each.pad)
        )

    return msgspec.structs.replace(schema, inputs=[describe(spec) for spec in schema.inputs])


def _with_padding(program: ExportedProgramModel, model: HeadModel, longest: int) -> Schema:
    """Marks the axis that rows of up to `longest` are padded along, of the inputs and of outputs
    as long as they."""
    (name,) = model.bounds
    axes = {each.name: each.axes.index(name) for each in model.inputs if name in each.axes}
    lengths = {
        leaf.axes[axes[leaf.spec.name]]
        for leaf in program.signature.inputs
        if leaf.spec and leaf.spec.name in axes
    }
    schema = program.schema
    inputs = [
        msgspec.structs.replace(
            spec,
            padded_axis=axes.get(spec.name),
            longest_padded=longest if spec.name in axes else None,
        )
        for spec in schema.inputs
    ]
    outputs = []
    for leaf in program.signature.outputs:
        assert leaf.spec is not None, "logits are tensors"
        along = [at for at, axis in enumerate(leaf.axes) if axis in lengths]
        outputs.append(msgspec.structs.replace(leaf.spec, padded_axis=along[0] if along else None))
    return msgspec.structs.replace(schema, inputs=inputs, outputs=outputs)


def _settled(
    schema: Schema,
    padded: dict[str, int | None],
    lengths: dict[str, int | None],
    images: Mapping[str, ImageInput | None],
) -> Schema:
    """The schema that the build found, but with padding and images as they were proved here:
    against the original, which knows more than the graph alone shows."""

    def settle(spec: TensorSpec) -> TensorSpec:
        axis = padded[spec.name] if schema.is_batched else None
        longest = lengths.get(spec.name) if axis is not None else None
        return msgspec.structs.replace(
            spec, padded_axis=axis, longest_padded=longest, image=images.get(spec.name)
        )

    return msgspec.structs.replace(
        schema,
        inputs=[settle(spec) for spec in schema.inputs],
        outputs=[settle(spec) for spec in schema.outputs],
    )


def _labels(layout: HeadLayout, schema: Schema) -> list[str]:
    size = schema.outputs[0].shape[-1]
    return layout.labels if len(layout.labels) == size else []


def _output_notes(layout: HeadLayout, schema: Schema) -> list[str]:
    if layout.labels and not _labels(layout, schema):
        return [
            f"config.json names {len(layout.labels)} labels, but the output has another size: it "
            "is served without names."
        ]
    if layout.task.is_labelled and schema.outputs[0].shape[-1] == 1:
        return [
            "The answer is one raw score per row, higher for a better match; a sigmoid of it is "
            "what sentence-transformers shows by default."
        ]
    return []


# --- the proof --------------------------------------------------------------------------


def _require(proof: HeadProof) -> None:
    """Raises `ImportFailure` when the graph is not the uploaded model."""
    if proof.is_equal:
        return
    failed = "; ".join(
        f"{check.name}: {check.detail}, {check.error} of {check.tolerance} allowed"
        for check in proof.checks
        if not check.is_equal
    )
    raise ImportFailure(
        "not_equal",
        "The model is not served, because the graph exported from it does not compute what it "
        f"does ({failed[:600]}). That is a limit of this release, not a fault of the upload.",
    )


def _proved(
    text: HeadText, schema: Schema, checks: list[Check], notes: list[str]
) -> HeadText | None:
    rows = TextRows(tokenizers.Tokenizer.from_str(text.definition), text.text, schema)
    check = check_texts(text, rows)
    checks.append(check)
    if check.is_equal:
        return text
    notes.append(
        "The endpoint takes token ids, not texts: its tokenizer gives other tokens here than in "
        f"transformers ({check.detail})."
    )
    return None


def _prove_image(
    layout: HeadLayout, program: TensorProgram, checks: list[Check], notes: list[str]
) -> None:
    """Drops the image from the schema where it is prepared in another way than in transformers."""
    spec = program.schema.inputs[0]
    if spec.image is None:
        return
    check = check_image(layout.directory, spec)
    checks.append(check)
    if not check.is_equal:
        inputs = [msgspec.structs.replace(spec, image=None), *program.schema.inputs[1:]]
        set_schema(program, msgspec.structs.replace(program.schema, inputs=inputs))
        notes.append(
            "The endpoint takes tensors, not image files: the model's own processor prepares them "
            f"in a way that is not known here ({check.detail}: {check.error})."
        )


# --- packaging --------------------------------------------------------------------------


def _package(
    directory: Path, artifact_dir: Path, text: HeadText | None, *, has_images: bool
) -> list[str]:
    """The tokenizer as transformers makes it, and what says whose model it is. Returns the names
    of those of the directory that are not used."""
    if text is not None:
        (artifact_dir / TOKENIZER_NAME).write_text(text.definition, encoding="utf-8")
    for path in directory.iterdir():
        if path.is_file() and (path.name == "config.json" or path.name.startswith("LICENSE")):
            shutil.copyfile(path, artifact_dir / path.name)
    used = USED_FILES + (TEXT_FILES if text else ()) + (IMAGE_FILES if has_images else ())
    return sorted(
        path.name
        for path in directory.iterdir()
        if not any(fnmatchcase(path.name, pattern) for pattern in used)
    )
