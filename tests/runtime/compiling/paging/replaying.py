"""Compares a paged graph with the model it came from, in every way that serving cuts batches."""

from typing import Any

import torch
from torch import Tensor

from runtime.cache.pool import KvPool
from runtime.compiling.graph_decoder import GraphDecoder, paged_info
from runtime.compiling.paging import PagedGraph
from runtime.execution.reference import ReferenceAttention
from runtime.execution.runner import Runner
from runtime.proving.replay import Replay

BLOCK_SIZE = 4


def replay_of(paged: PagedGraph) -> Replay:
    info = paged_info(paged, "graph", has_tokenizer=False, has_chat_template=False)
    decoder = GraphDecoder(paged, info, (), [])
    shapes = [layer.kv_shape for layer in paged.layers]
    pool = KvPool(shapes, num_blocks=64, block_size=BLOCK_SIZE, dtype=paged.dtype)
    return Replay(Runner(decoder, pool, ReferenceAttention()))


def logits_of(output: Any) -> Tensor:
    """The logits among what a model returns."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return output["logits"]
    return output[-1]


def largest_difference(paged: PagedGraph, original: Any, vocab: int, dtype: Any = None) -> float:
    """Of whole, chunked, batched and prefix-sharing runs; `original` takes ids `[1, tokens]`."""
    generator = torch.Generator().manual_seed(1)
    one, two = (torch.randint(0, vocab, (size,), generator=generator).tolist() for size in (23, 9))
    branch = one[:12] + two

    @torch.inference_mode()
    def expected(tokens: list[int]) -> Tensor:
        return logits_of(original(torch.tensor([tokens], dtype=dtype)))[0].float()

    replay = replay_of(paged)
    pairs = [(replay.step({"whole": one})["whole"], expected(one))]
    chunks = [replay.step({"chunked": one[a:b]})["chunked"] for a, b in ((0, 5), (5, 6), (6, 23))]
    pairs.append((torch.cat(chunks), expected(one)))
    first = replay.step({"a": one[:7], "b": two[:3]})
    second = replay.step({"b": two[3:], "a": one[7:]})
    pairs.append((torch.cat([first["a"], second["a"]]), expected(one)))
    pairs.append((torch.cat([first["b"], second["b"]]), expected(two)))
    replay.share("whole", "branch", 12)
    leaf = replay.step({"branch": branch[12:]})["branch"]
    pairs.append((leaf, expected(branch)[12:]))
    return max(float((found - wanted).abs().max()) for found, wanted in pairs)
