"""Starts a decoder: its model, block pool, scheduler and text, warmed up by a short request."""

import os
from pathlib import Path

from runtime.cache.pool import KvPool, num_blocks_within
from runtime.engine import DecoderEngine
from runtime.execution.attention import choose_backend
from runtime.execution.runner import Runner
from runtime.importing.huggingface import load_decoder as load_huggingface
from runtime.importing.program import Decoder
from runtime.protocol import Generate, Manifest, Ready, SamplingParams, Serve
from runtime.scheduling.scheduler import Scheduler
from runtime.server.decoder import DecoderServer
from runtime.starting.failures import LoadError
from runtime.starting.memory import resident_bytes
from runtime.text.chat import ChatTemplate
from runtime.text.tokenizer import Tokenizer

WARM_UP_ID = "warm-up"


def load_decoder(config: Serve, manifest: Manifest) -> tuple[DecoderServer, Ready]:
    """A decoder with its block pool, after one short request."""
    model = load_huggingface(config.artifact_dir, config.device)
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
    backend = choose_backend(config.device)
    runner = Runner(model, pool, backend, make_swap(config, pool))
    engine = make_engine(config, manifest, model, runner, num_blocks)
    warm_up(engine)
    ready = Ready(
        manifest=manifest,
        memory_bytes=resident_bytes(),
        attention=backend.name,
        num_blocks=num_blocks,
        block_size=config.block_size,
    )
    return DecoderServer(engine, config), ready


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
    config: Serve, manifest: Manifest, model: Decoder, runner: Runner, num_blocks: int
) -> DecoderEngine:
    """The engine around a loaded model. Without a tokenizer it takes token ids only."""
    info = manifest.decoder or model.info
    directory = Path(config.artifact_dir)
    tokenizer = Tokenizer.load(directory) if info.has_tokenizer else None
    template = None
    if tokenizer is not None and info.has_chat_template:
        template = ChatTemplate.load(directory, tokenizer)
    scheduler = Scheduler(
        num_blocks,
        config.block_size,
        config.max_batch_tokens,
        config.max_sequences,
        num_swap_blocks=0 if runner.swap is None else runner.swap.num_blocks,
        poisons_blocks=config.poisons_blocks,
    )
    return DecoderEngine(
        runner,
        scheduler,
        tokenizer,
        info=info,
        chat_template=template,
        eos_token_ids=model.eos_token_ids,
    )


def warm_up(engine: DecoderEngine) -> None:
    """Generate two tokens, so that the first caller does not wait for what happens only once.
    Raises `LoadError` when the model cannot."""
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    request = Generate(
        request_id=WARM_UP_ID, sampling=sampling, cache_salt=os.urandom(16), token_ids=[0]
    )
    engine.add(engine.prepare(request))
    while engine.has_work:
        if any(output.finish_reason == "error" for output in engine.step()):
            raise LoadError("model_failed", "The model failed on its first token; see its log.")
