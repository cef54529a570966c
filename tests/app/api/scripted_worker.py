"""A worker whose behaviour the prompt chooses, at the far end of a real stream of frames.

Text prompts are counted by words and answered `w0 w1 w2 ...`, eight words unless `ignore_eos`;
one with `unready` is never prepared.
A word such as `die@3` in the prompt makes something happen after so many tokens. A request that
must call tools gets two calls of the first, after one word of text.
"""

import asyncio
import contextlib
import re
import struct
from pathlib import Path

import msgspec

from runtime.protocol import (
    LENGTH,
    Cancel,
    DecoderInfo,
    Embed,
    Embedded,
    EmbedderInfo,
    Failed,
    FinishReason,
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
    Tensor,
    TensorSpec,
    TokenLogprob,
    ToolCall,
    ToWorker,
    WireError,
    encode_frame,
)

CONTEXT_TOKENS = 256
NUM_WORDS = 8
SCRIPT = re.compile(r"(fail|die|hang|abort|refuse|lie|slow)@(\d+)")
DECODER = Manifest(
    kind="decoder",
    format="huggingface",
    num_parameters=1,
    weight_bytes=4,
    decoder=DecoderInfo(
        architecture="scripted",
        vocab_size=1000,
        max_context_tokens=CONTEXT_TOKENS,
        num_layers=1,
        kv_bytes_per_token=1,
        dtype="float32",
        has_tokenizer=True,
        has_chat_template=True,
        template_tokens=8,
        template_tokens_per_message=8,
        template_tokens_per_tool_use=8,
    ),
)
TENSOR = Manifest(
    kind="tensor",
    format="pt2",
    num_parameters=1,
    weight_bytes=4,
    schema=Schema(
        inputs=[
            TensorSpec(name="x", dtype="float32", shape=[None, 2], max_shape=[4, 2]),
            TensorSpec(name="k", dtype="int64", shape=[None]),
        ],
        outputs=[
            TensorSpec(name="x", dtype="float32", shape=[None, 2]),
            TensorSpec(name="k", dtype="int64", shape=[None]),
        ],
        is_batched=True,
    ),
)

EMBEDDER = Manifest(
    kind="embedder",
    format="huggingface",
    num_parameters=1,
    weight_bytes=4,
    embedder=EmbedderInfo(
        architecture="scripted",
        dimensions=4,
        vocab_size=1000,
        max_tokens=8,
        dtype="float32",
        pooling="mean",
        is_normalized=True,
        special_tokens=2,
        matryoshka_dimensions=[2],
    ),
)


def text_of(generate: Generate) -> str:
    if generate.messages is not None:
        return " ".join(f"{message.role}: {message.content}" for message in generate.messages)
    return generate.text or ""


def first_k(predict: Predict) -> int:
    if predict.inputs is None or len(predict.inputs) < 2:
        return 0
    return int.from_bytes(predict.inputs[1].data[:8], "little")


class ScriptedWorker:
    """Serves one connection on a unix socket. `received` holds every message in order."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.received: list[Message] = []
        self.device_ns = 1_500_000  # of a prediction
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._prepared: dict[str, Generate] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._waiting: dict[str, Predict] = {}
        self._embeds: dict[str, tuple[Embed, list[int]]] = {}
        self._seen: set[tuple[bytes, str]] = set()

    async def listen(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._serve, path)

    async def close(self) -> None:
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._server.close()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        try:
            while True:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                message = self._decoder.decode(await reader.readexactly(length))
                self.received.append(message)
                self._handle(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def send(self, message: Message) -> None:
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    def _handle(self, message: Message) -> None:
        if isinstance(message, Serve):
            self.send(Ready(manifest=self.manifest, memory_bytes=1))
        elif isinstance(message, Generate):
            self._prepare(message)
        elif isinstance(message, Embed):
            self._prepare_embed(message)
        elif isinstance(message, Start) and message.request_id in self._embeds:
            self._embed(message.request_id)
        elif isinstance(message, Start):
            generate = self._prepared.pop(message.request_id)
            task = asyncio.create_task(self._run(generate))
            self._running[message.request_id] = task
        elif isinstance(message, Cancel):
            self._cancelled.add(message.request_id)
            if message.request_id in self._embeds:
                self._end_embed(message.request_id)
            if (predict := self._waiting.pop(message.request_id, None)) is not None:
                self._end(predict)
        elif isinstance(message, Predict):
            self._predict(message)

    # --- decoders -------------------------------------------------------------------------

    def _prepare(self, generate: Generate) -> None:
        if "refuse" in text_of(generate).replace("refuse@", ""):
            error = WireError(
                type="invalid_request_error", message="no", code="refused", param="prompt"
            )
            self.send(Failed(request_id=generate.request_id, error=error))
            return
        if "unready" in text_of(generate):
            return
        self._prepared[generate.request_id] = generate
        self.send(
            Prepared(
                request_id=generate.request_id,
                num_prompt_tokens=self._num_prompt_tokens(generate),
                max_tokens=self._max_tokens(generate),
            )
        )

    def _num_prompt_tokens(self, generate: Generate) -> int:
        if generate.token_ids is not None:
            return len(generate.token_ids)
        return len(text_of(generate).split())

    def _max_tokens(self, generate: Generate) -> int:
        num_left = CONTEXT_TOKENS - self._num_prompt_tokens(generate)
        return 0 if generate.is_count else min(generate.sampling.max_tokens, num_left)

    async def _run(self, generate: Generate) -> None:
        num_prompt_tokens = self._num_prompt_tokens(generate)
        max_tokens = self._max_tokens(generate)
        key = (generate.cache_salt, text_of(generate))
        num_cached = num_prompt_tokens - 1 if key in self._seen else 0
        self._seen.add(key)
        scripted = SCRIPT.search(text_of(generate))
        if generate.tools and generate.tool_choice not in ("none", "auto"):
            return self._call_tools(generate, num_cached)
        event, at = (scripted[1], int(scripted[2])) if scripted else ("", -1)
        num_words = 0 if generate.sampling.ignore_eos else NUM_WORDS
        for i in range(max_tokens):
            is_cancelled = generate.request_id in self._cancelled
            if is_cancelled or (event == "abort" and i == at):
                return self._step(generate, [], "", num_cached, "abort")
            if event == "refuse" and i == at:  # with tokens that are shown to nobody
                unseen = [1, 1][: max_tokens - i]
                return self._step(generate, unseen, "unseen", num_cached, "refused")
            if event == "slow":
                await asyncio.sleep(at / 1000)
            if i == at and event in ("fail", "die", "hang", "lie"):
                return await self._happen(event, generate)
            reason: FinishReason | None = None
            if found := [stop for stop in generate.sampling.stop if stop in f"w{i} "]:
                return self._step(generate, [i], "", num_cached, "stop", stop_string=found[0])
            if i + 1 == num_words:
                reason = "stop"
            elif i + 1 == max_tokens:
                reason = "length"
            self._step(generate, [i % 1000], f"w{i} ", num_cached, reason)
            await asyncio.sleep(0)
            if reason == "stop":
                return None
        return None

    def _call_tools(self, generate: Generate, num_cached: int) -> None:
        self._step(generate, [0], "w0 ", num_cached, None)
        name = generate.tools[0].name
        for at, reason in ((1, None), (2, "tool_calls")):
            call = ToolCall(id=f"call_{at}", name=name, arguments=f'{{"at": {at}}}')
            self._step(generate, [at], "", num_cached, reason, [call])

    async def _happen(self, event: str, generate: Generate) -> None:
        if event == "fail":
            error = WireError(
                type="server_error", message="the device ran out of memory", code="oom", status=500
            )
            self.send(Failed(request_id=generate.request_id, error=error))
        elif event == "die":
            self._writer.close()
        elif event == "lie":
            self._step(generate, [1], "x", 10_000, None)
        else:
            while generate.request_id not in self._cancelled:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            self._step(generate, [], "", 0, "abort")

    def _step(
        self,
        generate: Generate,
        token_ids: list[int],
        text: str,
        num_cached: int,
        reason: FinishReason | None,
        calls: list[ToolCall] | None = None,
        stop_string: str | None = None,
    ) -> None:
        """All choices walk in step."""
        wanted = generate.sampling.logprobs
        logprobs = None
        if wanted is not None and token_ids:
            top = [(1, text, -0.5), (2, "other", float("-inf"))][:wanted]
            logprobs = [TokenLogprob(token_id=token_ids[0], text=text, logprob=-0.5, top=top)]
        if generate.echo and token_ids == [0]:
            text = (generate.text or "") + text
        outputs = [
            SequenceOutput(
                request_id=generate.request_id,
                choice=choice,
                token_ids=token_ids,
                text=text,
                num_cached_tokens=num_cached,
                device_ns=1_000 if token_ids else 0,
                logprobs=logprobs,
                finish_reason=reason,
                tool_calls=calls or [],
                stop_string=stop_string,
            )
            for choice in range(generate.num_choices)
        ]
        self.send(Step(outputs=outputs))

    # --- embedders ------------------------------------------------------------------------

    def _prepare_embed(self, embed: Embed) -> None:
        """A token per word and two more; more than eight are refused."""
        counts = [len(ids) for ids in embed.token_ids or []]
        counts += [len(text.split()) + 2 for text in embed.texts or []]
        if max(counts) > 8:
            error = WireError(
                type="invalid_request_error",
                message=f"input[{counts.index(max(counts))}] has {max(counts)} tokens",
                code="context_length_exceeded",
                param="input",
            )
            self.send(Failed(request_id=embed.request_id, error=error))
            return
        self._embeds[embed.request_id] = (embed, counts)
        self.send(
            Prepared(request_id=embed.request_id, num_prompt_tokens=sum(counts), max_tokens=0)
        )

    def _embed(self, request_id: str) -> None:
        """The n-th vector is (3, 4, n, 0). A text `die`, `fail`, `lie` or `hang` happens."""
        embed, counts = self._embeds[request_id]
        texts = embed.texts or []
        if "hang" in texts:
            return
        del self._embeds[request_id]
        if "die" in texts:
            self._writer.close()
            return
        if "fail" in texts:
            error = WireError(type="server_error", message="bad luck", code="unlucky", status=500)
            self.send(Failed(request_id=request_id, error=error))
            return
        counts = [1000] if "lie" in texts else counts
        self._send_embedded(request_id, counts, list(range(len(counts))))

    def _end_embed(self, request_id: str) -> None:
        """Of what hangs, the first text has run."""
        _, counts = self._embeds.pop(request_id)
        self._send_embedded(request_id, [counts[0], *[0] * (len(counts) - 1)], [])

    def _send_embedded(self, request_id: str, counts: list[int], rows: list[int]) -> None:
        values = [value for row in rows for value in (3.0, 4.0, float(row), 0.0)]
        self.send(
            Embedded(
                request_id=request_id,
                dimensions=4,
                data=struct.pack(f"<{len(values)}f", *values),
                num_tokens=counts,
                device_ns=1_500_000,
            )
        )

    # --- tensor programs ------------------------------------------------------------------

    def _predict(self, predict: Predict) -> None:
        """Gives its inputs back; a first `k` of 13 fails, 14 fails by its input, 99 waits and 98
        runs until it is cancelled."""
        first = first_k(predict)
        if first == 13:
            error = WireError(type="server_error", message="bad luck", code="unlucky", status=500)
            failed = Failed(request_id=predict.request_id, error=error, device_ns=self.device_ns)
            self.send(failed)
        elif first == 14:
            error = WireError(
                type="invalid_request_error", message="no", code="model_failed", status=422
            )
            failed = Failed(request_id=predict.request_id, error=error, device_ns=self.device_ns)
            self.send(failed)
        elif first in (98, 99):
            self._waiting[predict.request_id] = predict
        else:
            self._answer(predict)

    def _end(self, predict: Predict) -> None:
        if first_k(predict) == 98:
            return self._answer(predict)
        error = WireError(
            type="invalid_request_error", message="cancelled", code="cancelled", status=499
        )
        self.send(Failed(request_id=predict.request_id, error=error))

    def _answer(self, predict: Predict) -> None:
        outputs = predict.inputs or [self._summary(predict)]
        self.send(
            Predicted(
                request_id=predict.request_id,
                outputs=outputs,
                device_ns=self.device_ns,
                batch_rows=outputs[0].shape[0],
                queue_ns=10,
            )
        )

    def _summary(self, predict: Predict) -> Tensor:
        """Of texts, how many characters each row has; of an image, its bytes."""
        assert self.manifest.schema is not None
        rows = [float(sum(map(len, row))) for row in predict.texts or []]
        rows = rows or [float(len(predict.image or b""))]
        name = self.manifest.schema.outputs[0].name
        data = struct.pack(f"<{len(rows)}f", *rows)
        return Tensor(name=name, dtype="float32", shape=[len(rows)], data=data)
