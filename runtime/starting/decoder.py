"""Starts a decoder: its model, block pool, scheduler and text, warmed up by a short request."""

import os
from pathlib import Path

import msgspec

from runtime.cache.pool import KvPool, num_blocks_within
from runtime.compiling.loading import load_paged, load_whole
from runtime.engine import DecoderEngine, StepRunner
from runtime.execution.attention import choose_backend
from runtime.execution.decode_graphs import with_decode_graphs
from runtime.execution.kernels import prefer_variant
from runtime.execution.runner import Runner
from runtime.execution.whole import WholeRunner
from runtime.protocol import DecoderInfo, Generate, Manifest, Ready, SamplingParams, Serve
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.whole import WholeScheduler
from runtime.server.decoder import DecoderServer
from runtime.starting.failures import LoadError
from runtime.starting.memory import settled_bytes
from runtime.text.chat import ChatTemplate
from runtime.text.tokenizer import Tokenizer

WARM_UP_ID = "warm-up"
NO_ATTENTION = "uncached"  # where the backend's name would be


def load_decoder(config: Serve, manifest: Manifest) -> tuple[DecoderServer, Ready]:
    """A decoder, paged or whole, after one short request."""
    assert manifest.decoder is not None, "a decoder's manifest describes it"
    start = start_paged if manifest.decoder.is_paged else start_whole
    engine, ready = start(config, manifest, manifest.decoder)
    warm_up(engine)
    ready = msgspec.structs.replace(ready, memory_bytes=settled_bytes())
    return DecoderServer(engine, config), ready


def start_paged(
    config: Serve, manifest: Manifest, info: DecoderInfo
) -> tuple[DecoderEngine, Ready]:
    """The engine of a paged decoder, with its block pool."""
    is_proved = config.device != "cpu" or not manifest.kernels or prefer_variant(manifest.kernels)
    model = load_paged(Path(config.artifact_dir), manifest, config.device)
    shapes = [layer.kv_shape for layer in model.layers]
    num_blocks = num_blocks_within(config.kv_cache_bytes, shapes, config.block_size, model.dtype)
    if num_blocks < 2:
        raise LoadError(
            "cache_too_small",
            f"A KV cache of {config.kv_cache_bytes:,} bytes does not hold two blocks of "
            f"{config.block_size} tokens of this model. Give it more, or use smaller blocks.",
        )
    pool = KvPool(
        shapes,
        num_blocks=num_blocks,
        block_size=config.block_size,
        dtype=model.dtype,
        device=config.device,
    )
    backend = choose_backend(config.device, info.max_context_tokens)
    runner = Runner(model, pool, backend, make_swap(config, pool))
    scheduler = Scheduler(
        num_blocks,
        config.block_size,
        config.max_batch_tokens,
        config.max_sequences,
        num_swap_blocks=0 if runner.swap is None else runner.swap.num_blocks,
        poisons_blocks=config.poisons_blocks,
    )
    ready = Ready(
        manifest=manifest,
        memory_bytes=0,  # known after the warm-up
        attention=backend.name if is_proved else f"{backend.name} (proved on {manifest.kernels})",
        num_blocks=num_blocks,
        block_size=config.block_size,
    )
    steps = with_decode_graphs(runner, config.max_sequences, info.max_context_tokens)
    return make_engine(config, info, model.eos_token_ids, steps, scheduler), ready


def start_whole(
    config: Serve, manifest: Manifest, info: DecoderInfo
) -> tuple[DecoderEngine, Ready]:
    """The engine of a decoder that keeps nothing between steps."""
    model = load_whole(Path(config.artifact_dir), manifest, config.device)
    max_rows = 1 if manifest.form == "alone" else config.max_sequences
    runner = WholeRunner(model, config.device, max_rows)
    scheduler = WholeScheduler(
        config.max_batch_tokens,
        config.max_sequences,
        max_sequence_tokens=info.max_context_tokens,
    )
    ready = Ready(manifest=manifest, memory_bytes=0, attention=NO_ATTENTION)
    return make_engine(config, info, model.eos_token_ids, runner, scheduler), ready


def make_swap(config: Serve, pool: KvPool) -> KvPool | None:
    """Host memory for the blocks of preempted sequences; None when it would hold none."""
    num_blocks = config.swap_bytes // pool.bytes_per_block
    if num_blocks == 0:
        return None
    return KvPool(
        pool.shapes,
        num_blocks=num_blocks,
        block_size=pool.block_size,
        dtype=pool.dtype,
        is_pinned=pool.device.type == "cuda",
    )


def make_engine(
    config: Serve,
    info: DecoderInfo,
    eos_token_ids: tuple[int, ...],
    runner: StepRunner,
    scheduler: Scheduler | WholeScheduler,
) -> DecoderEngine:
    """The engine around a loaded model. Without a tokenizer it takes token ids only."""
    directory = Path(config.artifact_dir)
    tokenizer = Tokenizer.load(directory) if info.has_tokenizer else None
    template = None
    if tokenizer is not None and info.has_chat_template:
        template = ChatTemplate.load(directory, tokenizer)
    return DecoderEngine(
        runner,
        scheduler,
        tokenizer,
        info=info,
        chat_template=template,
        eos_token_ids=eos_token_ids,
    )


def warm_up(engine: DecoderEngine) -> None:
    """Generate two tokens, so that the first caller does not wait for what happens only once.
    Raises `LoadError` when the model cannot."""
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    # A prompt of one token would be computed as a token that is generated, not as a prompt.
    prompt = [0] * min(2, max(1, engine.max_sequence_tokens - 2))
    request = Generate(
        request_id=WARM_UP_ID, sampling=sampling, cache_salt=os.urandom(16), token_ids=prompt
    )
    engine.add(engine.prepare(request))
    while engine.has_work:
        if any(output.finish_reason == "error" for output in engine.step()):
            raise LoadError("model_failed", "The model failed on its first token; see its log.")
