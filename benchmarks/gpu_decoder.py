"""How fast a decoder is on a GPU: one sequence against the memory, many against transformers.

    python -m benchmarks.gpu_decoder [--size 1b|8b] [--sequences 256] [--work-dir DIR]

A random Llama of the size of Meta's in bfloat16 is stepped by the engine in this process, without
gateway and worker. One sequence reads every weight and its whole context for every token, so its
goal is the bandwidth of the memory, which is measured first. Many sequences are compared with
transformers' continuous batching of the same weights and prompts. `--size tiny --device cpu` shows
that the script runs where there is no GPU; its figures mean nothing.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from runtime.cache.pool import KvPool
from runtime.engine import DecoderEngine, StepRunner
from runtime.execution.attention import choose_backend
from runtime.execution.decode_graphs import with_decode_graphs
from runtime.execution.runner import Runner
from runtime.importing.huggingface import HuggingFaceDecoder, load_decoder
from runtime.protocol import Generate, SamplingParams
from runtime.scheduling.scheduler import Scheduler

LLAMA = {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 40_960}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
        "max_position_embeddings": 4096,
    },
    "1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
CONTEXTS = (256, 4096, 32_768)  # of the single sequence
BLOCK_SIZE = 32
MAX_BATCH_TOKENS = 8192
NUM_NEW = 256


@dataclass(frozen=True)
class Timing:
    """What one run of the engine took, compilation and capturing left out."""

    total_seconds: float
    step_seconds: list[float]  # of steps in which every sequence decoded


def make_model(size: str, directory: Path, device: str) -> None:
    """A random model of a size, saved as transformers does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], bos_token_id=0, eos_token_id=0, dtype="bfloat16")
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(directory)


def make_runner(decoder: HuggingFaceDecoder, num_tokens: int, device: str) -> Runner:
    """With room in the pool for `num_tokens`."""
    shapes = [layer.kv_shape for layer in decoder.layers]
    num_blocks = num_tokens // BLOCK_SIZE + 1
    pool = KvPool(
        shapes, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=decoder.dtype, device=device
    )
    return Runner(decoder, pool, choose_backend(device, decoder.info.max_context_tokens))


def make_engine(
    decoder: HuggingFaceDecoder, runner: Runner, steps: StepRunner, max_sequences: int
) -> DecoderEngine:
    scheduler = Scheduler(runner.pool.num_blocks, BLOCK_SIZE, MAX_BATCH_TOKENS, max_sequences)
    return DecoderEngine(steps, scheduler, None, info=decoder.info)


def run_engine(engine: DecoderEngine, prompts: list[list[int]], num_new: int) -> Timing:
    """All prompts at once, greedily, with nothing cached from before."""
    sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    salt = os.urandom(16)
    started = time.perf_counter()
    for at, prompt in enumerate(prompts):
        request = Generate(request_id=str(at), sampling=sampling, cache_salt=salt, token_ids=prompt)
        engine.add(engine.prepare(request))
    steps: list[float] = []
    while engine.has_work:
        step_started = time.perf_counter()
        outputs = engine.step()
        assert all(output.finish_reason != "error" for output in outputs), "the model failed"
        if sum(len(output.token_ids) for output in outputs) == len(prompts):
            steps.append(time.perf_counter() - step_started)
    return Timing(time.perf_counter() - started, steps[1:])  # the first ended the last prompt


def random_prompts(num_prompts: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, vocab_size, (num_prompts, length), generator=generator).tolist()


def measured_bandwidth(device: str) -> float:
    """Bytes per second that a sum over a large tensor reads; the best of ten."""
    numbers = torch.ones((2 << 30 if device == "cuda" else 1 << 26), dtype=torch.int8)
    numbers = numbers.to(device).view(torch.int32)
    times: list[float] = []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        numbers.max()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return numbers.nbytes / min(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def weight_bytes_read(decoder: HuggingFaceDecoder) -> int:
    """By one step: all but the embedding, of which one row is read unless it is the output's."""
    embedding: Any = decoder.module.get_input_embeddings().weight
    output: Any = decoder.module.get_output_embeddings()
    tensors = [each for each in decoder.module.parameters() if each is not embedding]
    if output is not None and output.weight is embedding:
        tensors.append(embedding)
    return sum(each.nbytes for each in tensors)


def measure_one(decoder: HuggingFaceDecoder, device: str, num_new: int) -> None:
    """One sequence at several lengths of context, replayed and run anew."""
    bandwidth = measured_bandwidth(device)
    weights = weight_bytes_read(decoder)
    print(f"memory: {bandwidth / 1e9:,.0f} GB/s read; weights: {weights / 1e9:.2f} GB a step\n")
    print("| one sequence, context | graphs | ms a token | tokens/s | GB/s | of the memory's |")
    print("|---|---|---|---|---|---|")
    longest = decoder.info.max_context_tokens - num_new
    for context in sorted({min(context, longest) for context in CONTEXTS}):
        runner = make_runner(decoder, context + num_new + BLOCK_SIZE, device)
        graphs = with_decode_graphs(runner, 1, decoder.info.max_context_tokens)
        for name, steps in {"yes": graphs, "no": runner}.items():
            if name == "yes" and steps is runner:
                continue  # not on this device
            engine = make_engine(decoder, runner, steps, 1)
            prompts = random_prompts(1, context, decoder.info.vocab_size)
            run_engine(engine, prompts, 8)  # compiles and captures
            seconds = statistics.median(run_engine(engine, prompts, num_new).step_seconds)
            moved = weights + (context + num_new // 2) * decoder.info.kv_bytes_per_token
            print(
                f"| {context:,} | {name} | {seconds * 1e3:.2f} | {1 / seconds:,.0f} "
                f"| {moved / seconds / 1e9:,.0f} | {moved / seconds / bandwidth:.0%} |"
            )


def measure_many(
    decoder: HuggingFaceDecoder, device: str, prompts: list[list[int]], num_new: int
) -> float:
    """Output tokens per second of all prompts at once."""
    num_tokens = sum(len(prompt) + num_new + BLOCK_SIZE for prompt in prompts)
    runner = make_runner(decoder, num_tokens, device)
    steps = with_decode_graphs(runner, len(prompts), decoder.info.max_context_tokens)
    engine = make_engine(decoder, runner, steps, len(prompts))
    run_engine(engine, prompts, 8)
    timing = run_engine(engine, prompts, num_new)
    print(f"step of {len(prompts)}: {statistics.median(timing.step_seconds) * 1e3:.2f} ms")
    return len(prompts) * num_new / timing.total_seconds


def measure_transformers(
    directory: Path, device: str, prompts: list[list[int]], num_new: int
) -> float:
    """The same by transformers' continuous batching, once warm, with its own choice of settings."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.to(device)
    config = GenerationConfig(
        max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    best = 0.0
    for _ in range(2):
        started = time.perf_counter()
        found = model.generate_batch(
            inputs=prompts, generation_config=config, persistent_manager=True
        )
        elapsed = time.perf_counter() - started
        num_generated = sum(len(each.generated_tokens) for each in found.values())
        assert num_generated == len(prompts) * num_new, "not all was generated"
        best = max(best, num_generated / elapsed)
    model.destroy_cached_continuous_batching_manager()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=NUM_NEW)
    parser.add_argument("--no-transformers", action="store_true", help="leave the comparison out")
    parser.add_argument("--work-dir", type=Path, help="where the model is made, or already lies")
    arguments = parser.parse_args()
    device, num_new = arguments.device, arguments.new_tokens
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --size tiny --device cpu only shows that it runs")
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as temporary:
        directory = (arguments.work_dir or Path(temporary)) / f"llama-{arguments.size}"
        if not (directory / "config.json").is_file():
            make_model(arguments.size, directory, device)
        decoder = load_decoder(directory, device, is_checked=True)
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}, {arguments.size}")
        measure_one(decoder, device, num_new)
        prompts = random_prompts(
            arguments.sequences, arguments.prompt_tokens, decoder.info.vocab_size
        )
        found = {"Tapeout": measure_many(decoder, device, prompts, num_new)}
        del decoder
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        if not arguments.no_transformers:
            found["transformers"] = measure_transformers(directory, device, prompts, num_new)
        for who, rate in found.items():
            print(f"{who}: {rate:,.0f} output tokens/s, {len(prompts)} at once")


if __name__ == "__main__":
    main()
