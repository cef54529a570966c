"""Judges a Hugging Face directory by its files, before any of it is loaded."""

import json
from pathlib import Path
from typing import Any

from runtime.importing.program import ImportFailure

SAVE_AGAIN = (
    "Save the model again with model.save_pretrained(directory), which writes safetensors, and "
    "upload that directory."
)
SERVED = (
    "Served from a directory are decoders (causal language models), encoders that make "
    "embeddings, and models that classify texts, tokens, images or audio or find answers. Export "
    "another model with torch.export.save(program, path) and upload that."
)


def check_directory(directory: Path) -> dict[str, Any]:
    """The parsed `config.json` of a decoder. Raises `ImportFailure` if the directory cannot be
    served as one."""
    config = check_files(directory)
    if config.get("is_encoder_decoder"):
        raise ImportFailure(
            "not_a_decoder",
            f"This is an encoder-decoder model. {SERVED}",
        )
    _require_causal(config)
    return config


def check_files(directory: Path) -> dict[str, Any]:
    """The parsed `config.json` of any model. Raises `ImportFailure` for code, pickles, adapters,
    quantised weights and what is missing."""
    if not (directory / "config.json").is_file():
        raise ImportFailure(
            "config_missing",
            "There is no config.json. Upload a directory written by model.save_pretrained().",
        )
    config = read_json(directory / "config.json")
    refuse_code(directory, config)
    _refuse_adapters(directory)
    _refuse_quantized(config)
    _require_safetensors(directory)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or `{}` if there is no such file. Raises `ImportFailure`."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ImportFailure("invalid_json", f"{path.name} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ImportFailure("invalid_json", f"{path.name} must hold a JSON object.")
    return content


def has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    return bool(read_json(directory / "tokenizer_config.json").get("chat_template"))


def eos_token_ids(config: dict[str, Any], generation_config: dict[str, Any]) -> tuple[int, ...]:
    """The generation configuration's end tokens, or else the model's; may be empty."""
    for source in (generation_config, config):
        ids = source.get("eos_token_id")
        if isinstance(ids, int):
            return (ids,)
        if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
            return tuple(ids)
    return ()


def refuse_code(directory: Path, config: dict[str, Any]) -> None:
    """Raises `ImportFailure` for Python files, and for a configuration that needs them."""
    tokenizer_config = read_json(directory / "tokenizer_config.json")
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        if "auto_map" in content:
            raise ImportFailure(
                "remote_code",
                f"{name} has an auto_map: the model needs Python code of its own, which is not "
                "run. Use a model class that is part of transformers.",
            )
    code = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.py"))
    if code:
        raise ImportFailure(
            "remote_code",
            f"The upload contains Python code ({', '.join(code[:3])}), which is not run. Remove it "
            "if the model class is part of transformers.",
        )


def _refuse_adapters(directory: Path) -> None:
    if (directory / "adapter_config.json").is_file():
        raise ImportFailure(
            "adapter",
            "This is an adapter, not a model. Merge it first: "
            "model = PeftModel.from_pretrained(...).merge_and_unload(); "
            "model.save_pretrained(directory).",
        )


def _refuse_quantized(config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ImportFailure(
            "quantized",
            f"The weights are already quantised ({method or 'unknown method'}). Upload the "
            "original weights in float32, bfloat16 or float16.",
        )


def _require_safetensors(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    pickled = sorted(
        p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern)
    )
    if pickled:
        raise ImportFailure(
            "pickled_weights",
            f"The weights are pickled ({pickled[0]}), which can run code when loaded. {SAVE_AGAIN}",
        )
    raise ImportFailure("weights_missing", f"There is no *.safetensors file. {SAVE_AGAIN}")


def _require_causal(config: dict[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    if causal is None:
        raise ImportFailure(
            "not_a_decoder",
            f"transformers has no causal language model of type {model_type!r}. {SERVED}",
        )
    causal_names = {causal} if isinstance(causal, str) else set(causal)
    architectures = config.get("architectures")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if named and not causal_names.intersection(named):
        raise ImportFailure(
            "not_a_decoder",
            f"The model was saved as {named[0]}, not as a causal language model "
            f"({', '.join(sorted(causal_names))}). {SERVED}",
        )
