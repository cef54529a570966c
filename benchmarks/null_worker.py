"""A worker that computes nothing, to measure the gateway in front of it.

Speaks the worker's protocol on a unix socket: answers every generation with the token 0 until its
limit, all running requests in one step, and every prediction with its own inputs.
"""

import argparse
import asyncio
from typing import cast

import msgspec
import uvloop

from runtime.protocol import (
    LENGTH,
    BuildReceipt,
    Cancel,
    CandidateReport,
    DecoderInfo,
    Generate,
    Manifest,
    Message,
    Predict,
    Predicted,
    Prepared,
    Ready,
    Schema,
    SequenceOutput,
    Serve,
    Start,
    Step,
    TensorSpec,
    ToWorker,
    encode_frame,
)

DECODER = Manifest(
    kind="decoder",
    format="huggingface",
    num_parameters=1,
    weight_bytes=4,
    decoder=DecoderInfo(
        architecture="null",
        vocab_size=32000,
        max_context_tokens=4096,
        num_layers=1,
        kv_bytes_per_token=1,
        dtype="float32",
        has_tokenizer=True,
        has_chat_template=True,
        template_tokens=16,
        template_tokens_per_message=16,
    ),
)
TENSOR = Manifest(
    kind="tensor",
    format="pt2",
    num_parameters=1,
    weight_bytes=4,
    schema=Schema(
        inputs=[TensorSpec(name="x", dtype="float32", shape=[None, None])],
        outputs=[TensorSpec(name="x", dtype="float32", shape=[None, None])],
        is_batched=True,
    ),
)
RECEIPT = BuildReceipt(
    verdict="equal",
    checks=[],
    candidates=[
        CandidateReport(name="null", is_chosen=True, reason="", p50_ms={64: 1.0}, device_ms_max=1.0)
    ],
    phase_seconds={},
    torch_version="",
    device="cpu",
)
MANIFESTS = {"decoder": DECODER, "tensor": TENSOR}


class NullWorker(asyncio.Protocol):
    """One connection. The artifact directory's last part names the manifest to announce."""

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._unparsed = bytearray()
        self._unsent: list[bytes] = []
        self._prepared: dict[str, Generate] = {}
        self._running: dict[str, tuple[int, int]] = {}  # tokens made, tokens to make
        self._is_step_due = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._unparsed
        buffer += data
        start = 0
        while len(buffer) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, start)
            end = start + LENGTH.size + length
            if len(buffer) < end:
                break
            self._handle(self._decoder.decode(memoryview(buffer)[start + LENGTH.size : end]))
            start = end
        del buffer[:start]
        self._flush()

    def _handle(self, message: ToWorker) -> None:
        if isinstance(message, Generate):
            self._prepared[message.request_id] = message
            num_tokens = 4
            self._send(
                Prepared(
                    request_id=message.request_id,
                    num_prompt_tokens=num_tokens,
                    max_tokens=message.sampling.max_tokens,
                )
            )
        elif isinstance(message, Start):
            generate = self._prepared.pop(message.request_id)
            self._running[message.request_id] = (0, generate.sampling.max_tokens)
            self._schedule_step()
        elif isinstance(message, Predict):
            self._send(
                Predicted(
                    request_id=message.request_id,
                    outputs=message.inputs,
                    device_ns=1000,
                    batch_rows=1,
                    queue_ns=0,
                )
            )
        elif isinstance(message, Cancel):
            self._prepared.pop(message.request_id, None)
        elif isinstance(message, Serve):
            with open(f"{message.artifact_dir}/kind") as file:  # written by the benchmark
                kind = file.read()
            self._send(Ready(manifest=MANIFESTS[kind], memory_bytes=1))

    def _schedule_step(self) -> None:
        if not self._is_step_due:
            self._is_step_due = True
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        self._is_step_due = False
        outputs: list[SequenceOutput] = []
        for request_id, (num_made, num_wanted) in list(self._running.items()):
            is_last = num_made + 1 == num_wanted
            outputs.append(
                SequenceOutput(
                    request_id=request_id,
                    choice=0,
                    token_ids=[0],
                    text="x",
                    num_cached_tokens=0,
                    device_ns=1000,
                    finish_reason="length" if is_last else None,
                )
            )
            if is_last:
                del self._running[request_id]
            else:
                self._running[request_id] = (num_made + 1, num_wanted)
        self._send(Step(outputs=outputs))
        self._flush()
        if self._running:
            self._schedule_step()

    def _send(self, message: Message) -> None:
        self._unsent.append(encode_frame(message))

    def _flush(self) -> None:
        if self._unsent:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    path = parser.parse_args().socket
    server = await asyncio.get_running_loop().create_unix_server(NullWorker, path)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
