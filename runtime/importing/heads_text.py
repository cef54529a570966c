"""Finds the tokenizer of a model with a head, as transformers builds it from the files.

Owns the one file that a worker tokenises by. How rows become tensors is `batching/text_rows.py`'s.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runtime.importing.heads import HeadInput, HeadModel
from runtime.importing.huggingface_directory import read_json
from runtime.importing.huggingface_loading import first_line
from runtime.protocol import TextInput

TOKENIZER_NAME = "tokenizer.json"
# Without any of them, transformers makes a tokenizer of an empty vocabulary.
_SOURCES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.spm")


@dataclass(frozen=True)
class HeadText:
    """`tokenizer` is transformers' own, with which a worker's is compared; `definition` the
    `tokenizer.json` that it comes to, which differs from the uploaded one where a configuration
    beside that says so."""

    tokenizer: PreTrainedTokenizerFast
    definition: str
    inputs: list[HeadInput]
    text: TextInput


def read_text(model: HeadModel, directory: Path) -> tuple[HeadText | None, str]:
    """What turns texts into the model's inputs, or None; and a note on why texts are not taken, or
    on what is not done to them."""
    try:
        tokenizer = _load(directory)
    except Exception as error:  # noqa: BLE001 - whatever a malformed file makes it raise
        return None, f"The endpoint takes token ids, not texts: {first_line(error)}."
    if tokenizer is None:
        return None, (
            "The endpoint takes token ids, not texts: there is no tokenizer that the tokenizers "
            "library can run (tokenizer.json)."
        )
    taken = set(tokenizer.model_input_names)
    inputs = [
        _padded(each, tokenizer)
        for each in model.inputs
        if each.name != "token_type_ids" or each.name in taken
    ]
    names = {each.name: each.name for each in inputs}
    assert model.max_tokens is not None, "a model of texts has a longest row"
    text = TextInput(
        max_tokens=model.max_tokens,
        takes_pairs=_takes_pairs(tokenizer, has_types="token_type_ids" in names),
        token_ids=names["input_ids"],
        attention_mask=names.get("attention_mask", ""),
        token_type_ids=names.get("token_type_ids", ""),
    )
    definition = tokenizer.backend_tokenizer.to_str()
    return HeadText(tokenizer, definition, inputs, text), _left_out(directory)


def _left_out(directory: Path) -> str:
    """What sentence-transformers would do to a text before its tokenizer: said, not done, since
    the model's class alone decides what it is given."""
    settings = read_json(directory / "config_sentence_transformers.json")
    if settings.get("prompts") and settings.get("default_prompt_name"):
        return (
            "sentence-transformers would put the model's default prompt before each text; here "
            "texts are taken as they are sent."
        )
    if read_json(directory / "sentence_bert_config.json").get("do_lower_case"):
        return (
            "sentence-transformers would make texts lower case; here they are taken as they are "
            "sent."
        )
    return ""


def _load(directory: Path) -> PreTrainedTokenizerFast | None:
    if not any(any(directory.glob(pattern)) for pattern in _SOURCES):
        return None
    tokenizer: Any = AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    # Files keep the cutting and padding of their training; a worker refuses what is too long.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _padded(each: HeadInput, tokenizer: PreTrainedTokenizerFast) -> HeadInput:
    """With the tokenizer's padding token, which may be another than the configuration's."""
    pad = tokenizer.pad_token_id
    assert each.most is not None, "inputs of texts are integers"
    if each.name != "input_ids" or not isinstance(pad, int) or not 0 <= pad <= each.most:
        return each
    return HeadInput(each.name, each.axes, each.most, pad)


def _takes_pairs(tokenizer: PreTrainedTokenizerFast, *, has_types: bool) -> bool:
    """Whether the model can tell two texts apart: by tokens around them, or by their types."""
    backend = tokenizer.backend_tokenizer
    try:
        pair = backend.encode("a", "a")
        both = backend.encode("a", add_special_tokens=False).ids
    except Exception:  # noqa: BLE001 - which is what the library raises
        return False
    return (has_types and len(set(pair.type_ids)) > 1) or len(pair.ids) > 2 * len(both)
