"""What `make demo` shows, step by step, as a user would do it: train, push, call, pay.

Talks to the appliance through the command line, the HTTP API and the openai SDK only.
"""

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from demo.appliance import DIRECTORY, Appliance, DemoError, check_machine, start

SHARED_PROMPT = (
    "You are a patient teacher of the Python language. Answer in plain words, give one short "
    "example, and point to the chapter of the language reference where the reader can go on. "
) * 6
QUESTIONS = [
    "assignment", "booleans", "classes", "comparisons", "context managers", "del", "dictionaries",
    "exceptions", "for loops", "functions", "global", "if", "import", "lambda", "pass", "while",
]  # fmt: skip


def run() -> None:
    """The whole tour. Raises `DemoError` at the first thing that does not hold."""
    started = time.monotonic()
    check_machine()
    # Set before torch is first imported: other processes share these cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    heading("1. Two models, trained here")
    digits_path, decoder_path = train_models()
    heading("2. The appliance")
    appliance = start()
    print(f"It answers at {appliance.url}; its log is {DIRECTORY / 'appliance.log'}.")
    heading("3. Push: upload, build, prove, deploy")
    push(appliance, digits_path, "digits")
    push(appliance, decoder_path, "pydoc-llama")
    heading("4. Call")
    call_digits(appliance, digits_path)
    chat(appliance)
    request_id = sixteen_at_once(appliance)
    heading("5. The bill")
    show_receipt(appliance, request_id)
    tapeout(appliance, "usage")
    heading(f"Done in {time.monotonic() - started:.0f} s")
    print(f"The console is at {appliance.url}")
    if appliance.setup_link:
        print(f"Make yourself a sign-in with this one-time link: {appliance.setup_link}")
    print("`make stop` ends it; its data stays in .demo/.")


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def train_models() -> tuple[Path, Path]:
    """`digits.pt2` and the Hugging Face directory, from earlier runs if they are there."""
    from demo import decoder, digits

    if not (DIRECTORY / "digits.pt2").exists():
        print("Training a CNN on handwritten digits.", flush=True)
    digits_path = digits.prepare(DIRECTORY)
    if not (DIRECTORY / "pydoc-llama").exists():
        print(
            f"Training a small Llama on Python's help topics for {decoder.TRAINING_SECONDS} s.",
            flush=True,
        )
    decoder_path = decoder.prepare(DIRECTORY, lambda line: print(line, flush=True))
    print(f"{digits_path.name}: {digits_path.stat().st_size / 1e6:.1f} MB exported program")
    weights = (decoder_path / "model.safetensors").stat().st_size
    print(f"{decoder_path.name}/: Hugging Face directory with {weights / 1e6:.1f} MB of weights")
    return digits_path, decoder_path


def tapeout(appliance: Appliance, *arguments: str) -> str:
    """Runs the command line as a user would; its progress goes to the terminal."""
    print(f"$ tapeout {' '.join(arguments)}", flush=True)
    environment = os.environ | {
        "TAPEOUT_URL": appliance.url,
        "TAPEOUT_API_KEY": appliance.key,
    }
    command = str(Path(sys.executable).with_name("tapeout"))
    done = subprocess.run(
        [command, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise DemoError(f"`tapeout {arguments[0]}` failed; the lines above say why.")
    return done.stdout


def client(appliance: Appliance) -> httpx.Client:
    return httpx.Client(
        base_url=appliance.url, headers={"Authorization": f"Bearer {appliance.key}"}, timeout=120
    )


def push(appliance: Appliance, path: Path, name: str) -> None:
    """Pushes unless an equal upload already serves, so that a second run starts at once."""
    mark = DIRECTORY / f"{name}.pushed"
    content = fingerprint(path)
    with client(appliance) as http:
        found = http.get(f"/api/models/{name}")
        if found.is_success and mark.exists() and mark.read_text() == content:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                version = http.get(f"/api/models/{name}").json()["latest_version"]
                if version["is_serving"]:
                    print(f"{name}@{version['number']} already serves what {path.name} holds.")
                    return
                if version["status"] != "ready":
                    break
                time.sleep(0.2)
    tapeout(appliance, "push", str(path.relative_to(Path.cwd())), "--name", name)
    mark.write_text(content)


def fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def call_digits(appliance: Appliance, path: Path) -> None:
    """All held-out images through the endpoint; its accuracy must equal the local one."""
    import torch

    from demo import digits

    _, _, images, labels = digits.split()
    with client(appliance) as http:
        answers: list[Any] = []
        for rows in images.split(60):
            response = http.post(
                "/models/digits/predict", json={"inputs": {"image": rows.tolist()}}
            )
            if not response.is_success:
                raise DemoError(f"predict failed: {response.text}")
            (output,) = response.json()["outputs"].values()
            answers += output
    remote = digits.accuracy(torch.tensor(answers), labels)
    local = digits.accuracy(digits.local_logits(path), labels)
    print(f"digits: accuracy {remote:.4f} through the endpoint, {local:.4f} locally")
    if remote != local:
        raise DemoError("the endpoint does not answer as the model does; please report this.")


def chat(appliance: Appliance) -> None:
    """One streamed chat completion with the openai SDK."""
    import openai

    sdk = openai.OpenAI(base_url=f"{appliance.url}/v1", api_key=appliance.key)
    print("pydoc-llama, asked to explain lists: ", end="", flush=True)
    stream = sdk.chat.completions.create(
        model="pydoc-llama",
        messages=[{"role": "user", "content": "Explain lists."}],
        max_tokens=60,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and (text := chunk.choices[0].delta.content):
            print(text, end="", flush=True)
    if usage is None or usage.completion_tokens == 0:
        raise DemoError("the chat ended without an answer.")
    print(f"\n({usage.prompt_tokens} prompt and {usage.completion_tokens} completion tokens)")


def sixteen_at_once(appliance: Appliance) -> str:
    """Sixteen concurrent requests that share a prompt; returns the last one's request id."""
    import openai

    sdk = openai.OpenAI(base_url=f"{appliance.url}/v1", api_key=appliance.key)

    def ask(topic: str) -> Any:
        return sdk.chat.completions.with_raw_response.create(
            model="pydoc-llama",
            messages=[
                {"role": "system", "content": SHARED_PROMPT},
                {"role": "user", "content": f"Explain {topic}."},
            ],
            max_tokens=32,
            extra_body={"ignore_eos": True},
        )

    started = time.monotonic()
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = list(pool.map(ask, QUESTIONS))
    seconds = time.monotonic() - started
    usages = [answer.parse().usage for answer in answers]
    prompt = sum(usage.prompt_tokens for usage in usages)
    cached = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
    output = sum(usage.completion_tokens for usage in usages)
    print(
        f"16 requests at once that share a prompt: {output / seconds:.0f} output tokens/s; "
        f"{cached} of {prompt} prompt tokens came from the cache"
    )
    return answers[-1].headers["x-request-id"]


def show_receipt(appliance: Appliance, request_id: str) -> None:
    """The receipt of one request, line by line."""
    with client(appliance) as http:
        response = http.get(f"/v1/receipts/{request_id}")
    if not response.is_success:
        raise DemoError(f"no receipt for {request_id}: {response.text}")
    receipt = response.json()
    print(f"Receipt of {request_id}:")
    for line in receipt["lines"]:
        print(
            f"  {line['dimension']:<13} {line['quantity']:>6,} x {line['price_nano']:>13,} nano"
            f" per {line['unit_scale']:<9,} = {line['amount_nano']:>11,} nano-{receipt['currency']}"
        )
    print(f"  {'total':<49} {receipt['amount_nano']:>11,} nano-{receipt['currency']}")
