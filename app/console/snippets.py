"""Calls of an endpoint that work as pasted: curl, the openai package, plain Python.

Only names and shapes come in; the API key stays an environment variable, so that a snippet can
be shared. The tests run every one of them through the shell or the compiler.
"""

import json
import shlex
from typing import Any

import msgspec

from runtime.protocol import Manifest, TensorSpec

MAX_INLINE_NUMBERS = 96  # beyond this a literal input is no longer readable
MAX_TOKENS = 64
MAX_LINE_CHARS = 72


class Snippet(msgspec.Struct, frozen=True):
    """`language` is what the tab says, `text` what is copied."""

    language: str
    text: str


def snippets(base_url: str, endpoint_name: str, manifest: Manifest) -> list[Snippet]:
    """The ways to call this endpoint, the shortest first."""
    if manifest.kind == "tensor":
        return _tensor_snippets(base_url, endpoint_name, manifest)
    if manifest.kind == "embedder":
        return _embedder_snippets(base_url, endpoint_name, manifest)
    return _decoder_snippets(base_url, endpoint_name, manifest)


# --- decoders ---------------------------------------------------------------------------


def _decoder_snippets(base_url: str, name: str, manifest: Manifest) -> list[Snippet]:
    path, body = _decoder_request(name, manifest)
    return [
        Snippet("curl", _curl(f"{base_url}{path}", body)),
        Snippet("openai", _openai(base_url, name, body)),
        Snippet("python", _plain_python(f"{base_url}{path}", body, _answer_of(body))),
    ]


def _decoder_request(name: str, manifest: Manifest) -> tuple[str, dict[str, Any]]:
    """The route and a small body: chat where there is a template, else text, else token ids."""
    decoder = manifest.decoder
    if decoder is not None and decoder.has_tokenizer and decoder.has_chat_template:
        messages = [{"role": "user", "content": "Say hello."}]
        return "/v1/chat/completions", {
            "model": name, "messages": messages, "max_tokens": MAX_TOKENS,
        }  # fmt: skip
    has_tokenizer = decoder is None or decoder.has_tokenizer
    prompt: Any = "Once upon a time" if has_tokenizer else [1, 2, 3]
    return "/v1/completions", {"model": name, "prompt": prompt, "max_tokens": MAX_TOKENS}


def _answer_of(body: dict[str, Any]) -> str:
    choice = 'answer["choices"][0]'
    return f'{choice}["message"]["content"]' if "messages" in body else f'{choice}["text"]'


def _openai(base_url: str, name: str, body: dict[str, Any]) -> str:
    if "messages" in body:
        call = (
            "stream = client.chat.completions.create(\n"
            f"    model={json.dumps(name)},\n"
            f"    messages={_python(body['messages'])},\n"
            f"    max_tokens={MAX_TOKENS},\n"
            "    stream=True,\n"
            ")\n"
            "for chunk in stream:\n"
            "    if chunk.choices:\n"
            '        print(chunk.choices[0].delta.content or "", end="", flush=True)\n'
            "print()"
        )
    else:
        call = (
            "completion = client.completions.create(\n"
            f"    model={json.dumps(name)},\n"
            f"    prompt={_python(body['prompt'])},\n"
            f"    max_tokens={MAX_TOKENS},\n"
            ")\n"
            "print(completion.choices[0].text)\n"
            "print(completion.usage)"
        )
    return _openai_client(base_url) + call


def _openai_client(base_url: str) -> str:
    return (
        "# pip install openai\n"
        "import os\n\n"
        "from openai import OpenAI\n\n"
        "client = OpenAI(\n"
        f"    base_url={json.dumps(base_url + '/v1')},\n"
        '    api_key=os.environ["TAPEOUT_API_KEY"],\n'
        ")\n"
    )


# --- embedders --------------------------------------------------------------------------


def _embedder_snippets(base_url: str, name: str, manifest: Manifest) -> list[Snippet]:
    has_tokenizer = manifest.embedder is None or manifest.embedder.has_tokenizer
    texts: Any = ["A cat sat down.", "The kitten rests."] if has_tokenizer else [[1, 2], [3, 4]]
    url = f"{base_url}/v1/embeddings"
    body = {"model": name, "input": texts}
    call = (
        "answer = client.embeddings.create(\n"
        f"    model={json.dumps(name)},\n"
        f"    input={_python(texts)},\n"
        ")\n"
        "for item in answer.data:\n"
        "    print(len(item.embedding), item.embedding[:4])\n"
        "print(answer.usage)"
    )
    return [
        Snippet("curl", _curl(url, body)),
        Snippet("openai", _openai_client(base_url) + call),
        Snippet("python", _plain_python(url, body, 'len(answer["data"][0]["embedding"])')),
    ]


# --- tensor programs --------------------------------------------------------------------


def _tensor_snippets(base_url: str, name: str, manifest: Manifest) -> list[Snippet]:
    url = f"{base_url}/models/{name}/predict"
    if manifest.text is not None:
        return _text_snippets(url, manifest)
    schema = manifest.schema
    specs = schema.inputs if schema is not None else []
    is_small = sum(_num_numbers(example_shape(spec)) for spec in specs) <= MAX_INLINE_NUMBERS
    if is_small:
        body = {"inputs": {spec.name: example_value(spec) for spec in specs}}
        curl = _curl(url, body)
    else:
        curl = _piped_curl(url, specs)
    inputs = "".join(f"    {json.dumps(spec.name)}: {_expression(spec)},\n" for spec in specs)
    python = (
        _PYTHON_HEAD
        + f"inputs = {{\n{inputs}}}\n"
        + _python_call(url, '{"inputs": inputs}')
        + 'print(answer["outputs"])\nprint(answer["usage"])'
    )
    return [Snippet("curl", curl), Snippet("python", python)]


def _text_snippets(url: str, manifest: Manifest) -> list[Snippet]:
    """Rows of texts; of two where the model ranks or answers, which is where nothing is named."""
    body: dict[str, Any] = {"texts": ["A cat sat down.", "It was a good day."]}
    if manifest.text is not None and manifest.text.takes_pairs and not manifest.labels:
        question = "Where do cats sleep?"
        body = {"texts": [[question, "On the mat, all day."], [question, "It rained."]]}
    answer = 'answer["labels"]' if _names_labels(manifest) else 'answer["outputs"]'
    return [
        Snippet("curl", _curl(url, body)),
        Snippet("python", _plain_python(url, body, answer)),
    ]


def _names_labels(manifest: Manifest) -> bool:
    """Whether answers say the best labels of each row: of logits with two axes."""
    outputs = manifest.schema.outputs if manifest.schema is not None else []
    return bool(manifest.labels and outputs) and len(outputs[0].shape) == 2


def example_shape(spec: TensorSpec) -> list[int]:
    """A shape the program accepts: 1 on dynamic axes, or the least that is allowed."""
    least = spec.min_shape or [1] * len(spec.shape)
    return [
        max(1, low) if size is None else size for size, low in zip(spec.shape, least, strict=True)
    ]


def example_value(spec: TensorSpec) -> Any:
    """Zeros of that shape, as nested lists."""
    value: Any = _zero(spec.dtype)
    for size in reversed(example_shape(spec)):
        value = [value] * size
    return value


def _zero(dtype: str) -> bool | int | float:
    if dtype == "bool":
        return False
    return 0.0 if dtype.startswith(("float", "bfloat")) else 0


def _num_numbers(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _expression(spec: TensorSpec) -> str:
    """Python for zeros of the shape, without numpy."""
    sizes = example_shape(spec)
    text = repr(_zero(spec.dtype))
    if not sizes:
        return text
    text = f"[{text}] * {sizes[-1]}"
    for size in reversed(sizes[:-1]):
        text = f"[{text}] * {size}"
    return text


# --- the texts --------------------------------------------------------------------------

_PYTHON_HEAD = "import json\nimport os\nimport urllib.request\n\n"


def _plain_python(url: str, body: dict[str, Any], answer: str) -> str:
    call = _python_call(url, "body")
    made = "body = {\n" + ",\n".join(_lines(body)) + ",\n}\n"
    return f'{_PYTHON_HEAD}{made}{call}print({answer})\nprint(answer["usage"])'


def _python_call(url: str, body: str) -> str:
    return (
        "request = urllib.request.Request(\n"
        f"    {json.dumps(url)},\n"
        f"    data=json.dumps({body}).encode(),\n"
        "    headers={\n"
        '        "Authorization": f"Bearer {os.environ[\'TAPEOUT_API_KEY\']}",\n'
        '        "Content-Type": "application/json",\n'
        "    },\n"
        ")\n"
        "answer = json.load(urllib.request.urlopen(request))\n"
    )


def _python(value: Any) -> str:
    """Strings, numbers, lists and dictionaries, which JSON and Python write alike."""
    return json.dumps(value)


def _lines(body: dict[str, Any]) -> list[str]:
    """Each key of a body with its value, as JSON and Python alike write them."""
    return [f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in body.items()]


def _curl(url: str, body: dict[str, Any]) -> str:
    text = json.dumps(body)
    if len(text) > MAX_LINE_CHARS and len(body) > 1:
        text = "{\n" + ",\n".join(_lines(body)) + "\n  }"
    return (
        f"curl -sS {shlex.quote(url)} \\\n"
        '  -H "Authorization: Bearer $TAPEOUT_API_KEY" \\\n'
        '  -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(text)}"
    )


def _piped_curl(url: str, specs: list[TensorSpec]) -> str:
    """An input too large to read as a literal is made by Python and piped in."""
    inputs = ", ".join(f"{json.dumps(spec.name)}: {_expression(spec)}" for spec in specs)
    script = f'import json; print(json.dumps({{"inputs": {{{inputs}}}}}))'
    return (
        f"python3 -c {shlex.quote(script)} |\n"
        f"curl -sS {shlex.quote(url)} \\\n"
        '  -H "Authorization: Bearer $TAPEOUT_API_KEY" \\\n'
        '  -H "Content-Type: application/json" \\\n'
        "  -d @-"
    )
