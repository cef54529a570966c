"""A decoder's requests over a stream, with an engine that does what each test needs."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from msgspec import structs

from runtime.protocol import (
    LENGTH,
    MAX_FRAME_BYTES,
    Cancel,
    Drain,
    Failed,
    Fatal,
    Generate,
    Predict,
    Prepared,
    SamplingParams,
    SequenceOutput,
    Serve,
    Start,
    Stats,
    Step,
    WireError,
    encode_frame,
    frames,
)
from runtime.server import compiling, connection, decoder, engine_thread, memory
from runtime.server.decoder import DecoderServer
from tests.runtime.server.stream import Stream

CONFIG = Serve(artifact_dir="/", max_sequences=2, max_waiting=2)


class Refused(Exception):
    def __init__(self) -> None:
        super().__init__()
        self.error = WireError(
            type="invalid_request_error", message="no", code="wrong", param="prompt", status=400
        )


class FakePrepared:
    def __init__(self, generate: Generate) -> None:
        self.generate = generate
        self.num_prompt_tokens = 3
        self.max_tokens = generate.sampling.max_tokens


class FakeEngine:
    """Gives each running choice one token a step. `on_step` and `on_prepare` may raise."""

    def __init__(self) -> None:
        self.on_step: Callable[[], None] = lambda: None
        self.on_prepare: Callable[[Generate], None] = lambda _: None
        self.on_add: Callable[[], None] = lambda: None
        self.text = "x"
        self.compiled: set[str | None] = {None}
        self.is_leaking = False
        self.num_steps = 0
        self.num_tokens = 0
        self.left: dict[str, int] = {}
        self.choices: dict[str, int] = {}
        self.aborted: list[str] = []
        self.thread_ids: set[int] = set()

    @property
    def has_work(self) -> bool:
        return bool(self.left or self.aborted)

    def prepare(self, generate: Generate) -> FakePrepared:
        self.on_prepare(generate)
        self.compiled.add(generate.json_schema)
        return FakePrepared(generate)

    def to_compile(self, generate: Generate) -> bytes | None:
        return (
            None
            if generate.json_schema in self.compiled
            else b"x" + str(generate.json_schema).encode()
        )

    def add(self, prepared: FakePrepared) -> None:
        self.on_add()
        self.left[prepared.generate.request_id] = prepared.max_tokens
        self.choices[prepared.generate.request_id] = prepared.generate.num_choices

    def abort(self, request_id: str) -> None:
        if self.left.pop(request_id, None):
            self.aborted.append(request_id)

    def step(self) -> list[SequenceOutput]:
        self.thread_ids.add(threading.get_ident())
        self.num_steps += 1
        self.on_step()
        outputs = [self._output(request_id, 0, "abort") for request_id in self.aborted]
        self.aborted.clear()
        for request_id in list(self.left):
            self.left[request_id] -= 1
            reason = None if self.left[request_id] else "length"
            outputs += [
                self._output(request_id, c, reason) for c in range(self.choices[request_id])
            ]
            self.num_tokens += self.choices[request_id]
            if reason:
                del self.left[request_id]
        return outputs

    def stats(self) -> Stats:
        return Stats(num_running=len(self.left), output_tokens=100 + self.num_tokens, free_blocks=7)

    def check_integrity(self) -> None:
        assert not self.is_leaking

    def _output(self, request_id: str, choice: int, reason: str | None) -> SequenceOutput:
        return SequenceOutput(
            request_id=request_id,
            choice=choice,
            token_ids=[1],
            text=self.text,
            num_cached_tokens=0,
            device_ns=1,
            finish_reason=reason,  # type: ignore[arg-type]
        )


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine) -> DecoderServer:
    return DecoderServer(engine, CONFIG)


def request(request_id: str, max_tokens: int = 3, num_choices: int = 1) -> Generate:
    return Generate(
        request_id=request_id,
        sampling=SamplingParams(max_tokens=max_tokens),
        cache_salt=b"",
        token_ids=[1, 2, 3],
        num_choices=num_choices,
    )


async def start(peer: Stream, request_id: str, max_tokens: int = 3, num_choices: int = 1) -> None:
    peer.send(request(request_id, max_tokens, num_choices))
    await peer.expect(Prepared, lambda each: each.request_id == request_id)
    peer.send(Start(request_id=request_id))


async def test_a_request_is_prepared_started_and_streamed(
    engine: FakeEngine, server: DecoderServer
) -> None:
    async with Stream(server) as peer:
        peer.send(request("a"))
        prepared = await peer.expect(Prepared)
        assert (prepared.num_prompt_tokens, prepared.max_tokens) == (3, 3)
        await asyncio.sleep(0.05)
        assert engine.num_steps == 0  # nothing runs before its start
        peer.send(Start(request_id="a"))
        for reason in (None, None, "length"):
            (output,) = (await peer.expect(Step)).outputs
            assert (output.request_id, output.finish_reason) == ("a", reason)
        assert server.num_requests == 0
    assert threading.get_ident() not in engine.thread_ids


async def test_nobody_waits_for_anothers_grammars(
    engine: FakeEngine, server: DecoderServer
) -> None:
    """One caller's grammars compile one by one, at most so many of them wait, and neither plain
    requests, nor grammars that are there, nor those of others wait for them."""
    gate, compiled = threading.Event(), list[str]()

    def compile_slowly(generate: Generate) -> None:
        if generate.json_schema not in engine.compiled:
            compiled.append(generate.request_id)
            if generate.fairness_key == "many":
                assert gate.wait(10)

    def constrained(request_id: str, schema: str, caller: str) -> Generate:
        plain = request(request_id)
        return structs.replace(plain, json_schema=schema, fairness_key=caller)

    engine.on_prepare = compile_slowly
    server._max_requests = 100
    async with Stream(server) as peer:
        for at in range(compiling.MAX_WAITING + 1):
            peer.send(constrained(f"m{at}", f"{at}", "many"))
        peer.send(constrained("again", "8", "many"))
        peer.send(constrained("beyond", "other", "many"))
        failed = await peer.expect(Failed)
        assert (failed.request_id, failed.error.code) == ("beyond", "too_many_grammars")
        assert failed.error.status == 429
        peer.send(request("plain"))
        assert (await peer.expect(Prepared)).request_id == "plain"
        peer.send(constrained("few", "few", "few"))
        assert (await peer.expect(Prepared)).request_id == "few"
        peer.send(constrained("few again", "few", "few"))
        assert (await peer.expect(Prepared)).request_id == "few again"
        assert compiled == ["m0", "few"]
        gate.set()
        expected = [f"m{at}" for at in range(compiling.MAX_WAITING + 1)] + ["again"]
        assert [(await peer.expect(Prepared)).request_id for _ in expected] == expected
        assert "again" not in compiled


async def test_all_of_a_steps_outputs_come_in_one_frame(
    engine: FakeEngine, server: DecoderServer
) -> None:
    may_step = threading.Event()
    engine.on_step = lambda: may_step.wait(10) and None  # type: ignore[return-value]
    async with Stream(server) as peer:
        await start(peer, "a", 2, num_choices=2)
        await start(peer, "b", 2)
        await asyncio.sleep(0.05)
        may_step.set()
        await peer.expect(Step)  # the one that `b` came too late for
        step = await peer.expect(Step)
        assert [(o.request_id, o.choice) for o in step.outputs] == [("a", 0), ("a", 1), ("b", 0)]


async def test_a_refused_prompt_is_told_why_and_a_failure_is_not(
    engine: FakeEngine, server: DecoderServer, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(generate: Generate) -> None:
        raise Refused if generate.request_id == "refused" else ValueError("a secret")

    engine.on_prepare = refuse
    async with Stream(server) as peer:
        peer.send(request("refused"))
        failed = await peer.expect_failed("refused", "wrong", 400)
        assert failed.error.param == "prompt"
        peer.send(request("broken"))
        failed = await peer.expect_failed("broken", "internal_error", 500)
        assert "secret" not in failed.error.message
        assert server.num_requests == 0
    assert "failed unexpectedly" in caplog.text


async def test_more_than_may_wait_are_refused(server: DecoderServer) -> None:
    async with Stream(server) as peer:
        peer.send(*(request(f"r{i}") for i in range(5)))
        failed = await peer.expect_failed("r4", "queue_full", 429)
        assert failed.error.type == "rate_limit_error"
        peer.send(Cancel(request_id="r0"), request("again"))
        await peer.expect(Prepared, lambda each: each.request_id == "again")


async def test_waiting_prompts_may_hold_so_much_memory_and_no_more(
    server: DecoderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MAX_WAITING_BYTES", 2 * memory.prompt_bytes(3, 1))
    async with Stream(server) as peer:
        for request_id in ("a", "b"):
            peer.send(request(request_id))
            await peer.expect(Prepared)
        peer.send(request("c"))
        await peer.expect_failed("c", "queue_full", 429)
        peer.send(Cancel(request_id="a"), Start(request_id="b"))
        await peer.expect(Step, lambda step: step.outputs[0].finish_reason is not None)
        assert server._memory.total_bytes == 0
        peer.send(request("d", num_choices=30))  # it is alone
        await peer.expect(Prepared)
        peer.send(Cancel(request_id="d"), request("e", 1))
        await peer.expect(Prepared)
        # Known to be too many copies only once it is prepared.
        peer.send(request("f", num_choices=30))
        await peer.expect_failed("f", "queue_full", 429)


async def test_cancel_before_and_during_preparation(
    engine: FakeEngine, server: DecoderServer
) -> None:
    may_prepare = threading.Event()
    engine.on_prepare = lambda _: may_prepare.wait(10) and None  # type: ignore[return-value]
    async with Stream(server) as peer:
        peer.send(request("in work"), request("queued"))
        peer.send(Cancel(request_id="in work"), Cancel(request_id="queued"))
        peer.send(Cancel(request_id="unknown"))
        await peer.expect_failed("in work", "cancelled", 499)
        await peer.expect_failed("queued", "cancelled", 499)
        may_prepare.set()
        await start(peer, "next", 1)
        await peer.expect(Step)
        prepared = [each.request_id for each in peer.received if isinstance(each, Prepared)]
        assert prepared == ["next"]


async def test_cancel_ends_a_running_request_with_abort(
    engine: FakeEngine, server: DecoderServer
) -> None:
    async with Stream(server) as peer:
        await start(peer, "a", 10**9)
        await peer.expect(Step)
        peer.send(Cancel(request_id="a"), Cancel(request_id="a"))
        await peer.expect(Step, lambda step: step.outputs[-1].finish_reason == "abort")
        assert server.num_requests == 0
        assert not engine.has_work
        peer.send(Cancel(request_id="a"))
        await start(peer, "b", 1)
        await peer.expect(Step)
        assert not [each for each in peer.received if isinstance(each, Failed)]


async def test_a_cancel_right_behind_the_start(engine: FakeEngine, server: DecoderServer) -> None:
    async with Stream(server) as peer:
        peer.send(request("a", 10**9))
        await peer.expect(Prepared)
        peer.send(Start(request_id="a"), Cancel(request_id="a"))
        await peer.expect(Step, lambda step: step.outputs[-1].finish_reason == "abort")
        assert engine.num_steps < 50


async def test_what_is_never_started_expires(
    server: DecoderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "START_SECONDS", 0.0)
    monkeypatch.setattr(connection, "STATS_SECONDS", 0.01)
    async with Stream(server) as peer:
        peer.send(request("a"))
        await peer.expect_failed("a", "start_timeout", 503)
        peer.send(Start(request_id="a"))
        await peer.expect_failed("a", "not_prepared", 500)


async def test_a_failed_step_fails_its_requests_and_no_later_one(
    engine: FakeEngine, server: DecoderServer
) -> None:
    def fail() -> None:
        if engine.left and not engine.aborted:
            engine.on_step = lambda: None
            raise RuntimeError("a secret")

    async with Stream(server) as peer:
        engine.on_step = fail
        await start(peer, "a", 10, num_choices=2)
        failed = await peer.expect_failed("a", "step_failed", 500)
        assert "secret" not in failed.error.message
        await start(peer, "b", 1)
        (output,) = (await peer.expect(Step)).outputs  # without the aborts of `a`
        assert output.request_id == "b"
        assert server.num_requests == 0


async def test_an_engine_that_keeps_failing_is_given_up(
    engine: FakeEngine, server: DecoderServer
) -> None:
    def fail() -> None:
        raise RuntimeError("a secret")

    engine.on_step = fail
    async with Stream(server) as peer:
        await start(peer, "a")
        fatal = await peer.expect(Fatal)
        assert "secret" not in fatal.error.message
        assert await peer.end() == 1
    assert engine.num_steps == engine_thread.MAX_FAILED_STEPS


async def test_a_lost_block_ends_it(
    engine: FakeEngine, server: DecoderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_thread, "INTEGRITY_SECONDS", 0.0)
    async with Stream(server) as peer:
        peer.send(request("a", 1))
        await peer.expect(Prepared)
        engine.is_leaking = True
        peer.send(Start(request_id="a"))
        await peer.expect(Step)  # what was done is still told
        await peer.expect(Fatal)
        assert await peer.end() == 1


async def test_a_step_too_large_for_a_frame_is_sent_in_parts(
    engine: FakeEngine, server: DecoderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1000)
    engine.text = "x" * 300
    async with Stream(server) as peer:
        await start(peer, "a", 1, num_choices=4)
        choices: list[int] = []
        while len(choices) < 4:
            choices += [output.choice for output in (await peer.expect(Step)).outputs]
        assert choices == [0, 1, 2, 3]


async def test_an_output_too_large_for_any_frame_fails_its_request_alone(
    engine: FakeEngine, server: DecoderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1000)
    async with Stream(server) as peer:
        engine.text = "x" * 2000
        await start(peer, "a", 10_000, num_choices=2)
        await peer.expect_failed("a", "output_too_large", 413)
        assert server.num_requests == 0
        engine.text = "x"
        await start(peer, "b", 3)
        step = await peer.expect(Step, lambda step: step.outputs[-1].finish_reason is not None)
        assert step.outputs[-1].request_id == "b"
        assert engine.aborted == []
        assert "a" not in engine.left
        failures = [each.request_id for each in peer.received if isinstance(each, Failed)]
        assert failures == ["a"]  # once, whatever the number of choices


async def test_a_request_that_cannot_be_added_fails_alone(
    engine: FakeEngine, server: DecoderServer
) -> None:
    def refuse() -> None:
        engine.on_add = lambda: None
        raise Refused

    engine.on_add = refuse
    async with Stream(server) as peer:
        await start(peer, "a")
        await peer.expect_failed("a", "wrong", 400)
        await start(peer, "b")
        await peer.expect(Step)


async def test_a_peer_that_does_not_read_stops_the_engine(
    engine: FakeEngine, server: DecoderServer
) -> None:
    engine.text = "x" * 50_000
    async with Stream(server) as peer:
        await start(peer, "a", 2000)
        num_before = -1
        while engine.num_steps != num_before:  # until it stands still
            num_before = engine.num_steps
            await asyncio.sleep(0.2)
        assert engine.num_steps < 200
        last = await peer.expect(Step, lambda step: step.outputs[-1].finish_reason is not None)
        assert last.outputs[-1].finish_reason == "length"
        assert engine.num_steps == 2000
        await start(peer, "b", 1)
        await peer.expect(Step)


async def test_draining_finishes_what_was_accepted(
    engine: FakeEngine, server: DecoderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_step = threading.Event()
    engine.on_step = lambda: may_step.wait(10) and None  # type: ignore[return-value]
    monkeypatch.setattr(decoder, "DRAINING_START_SECONDS", 0.05)
    monkeypatch.setattr(connection, "STATS_SECONDS", 0.01)
    async with Stream(server) as peer:
        await start(peer, "running", 5)
        peer.send(request("forgotten"), request("late to start"))
        await peer.expect(Prepared, lambda each: each.request_id == "late to start")
        peer.send(Drain(), Start(request_id="late to start"), request("new"))
        await peer.expect_failed("new", "draining", 503)
        await peer.expect_failed("forgotten", "start_timeout", 503)
        may_step.set()
        assert await peer.end() == 0
    finished = [
        output.request_id
        for step in peer.received
        if isinstance(step, Step)
        for output in step.outputs
        if output.finish_reason == "length"
    ]
    assert sorted(finished) == ["late to start", "running"]


async def test_idle_it_drains_at_once(server: DecoderServer) -> None:
    async with Stream(server) as peer:
        peer.send(Drain())
        assert await peer.end() == 0


async def test_stats_are_sent_when_they_change_and_leave_the_warm_up_out(
    engine: FakeEngine, server: DecoderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STATS_SECONDS", 0.01)
    async with Stream(server) as peer:
        assert await peer.expect(Stats) == Stats(free_blocks=7)
        peer.send(request("a"))
        assert (await peer.expect(Stats)).num_waiting == 1
        peer.send(Start(request_id="a"))
        await peer.expect(Stats, lambda s: s == Stats(free_blocks=7, output_tokens=3))
        num_received = len(peer.received)
        await asyncio.sleep(0.1)
        peer.send(Drain())
        await peer.end()
        assert len(peer.received) == num_received  # nothing changed, nothing was said


async def test_frames_may_come_in_pieces(server: DecoderServer) -> None:
    async with Stream(server) as peer:
        for byte in encode_frame(request("a")) + encode_frame(request("b")):
            peer.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        for request_id in ("a", "b"):
            assert (await peer.expect(Prepared)).request_id == request_id


@pytest.mark.parametrize(
    "data",
    [
        LENGTH.pack(5) + b"\xc1junk",
        LENGTH.pack(MAX_FRAME_BYTES + 1),
        LENGTH.pack(0),
        encode_frame(Serve(artifact_dir="/")),
        encode_frame(Predict(request_id="x", inputs=[])),
        encode_frame(request("same")) * 2,
        LENGTH.pack(4000) + b"\x91" * 4000,
        encode_frame(Cancel(request_id="abc")).replace(b"abc", b"a\xffc"),
    ],
    ids=[
        "garbage",
        "oversize",
        "empty",
        "second serve",
        "other kind",
        "same id",
        "deep",
        "not utf-8",
    ],
)
async def test_a_bad_frame_closes_the_stream(
    server: DecoderServer, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with Stream(server) as peer:
        peer.writer.write(data)
        assert await peer.end() == 1
    assert "closing the stream" in caplog.text
