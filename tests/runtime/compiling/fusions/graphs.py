"""Paged graphs of tiny random decoders, and their logits by a paged runner."""

from functools import cache

import torch
from torch import Tensor
from torch.export import ExportedProgram
from transformers import AutoConfig, AutoModelForCausalLM

from runtime.cache.pool import KvPool
from runtime.compiling.graph_decoder import GraphDecoder, paged_info
from runtime.compiling.huggingface_export import export_huggingface
from runtime.compiling.paging import PagedGraph, cast, page
from runtime.execution.attention import choose_backend
from runtime.execution.runner import Runner
from runtime.proving.replay import Replay
from tests.runtime.decoders import COMMON, OVERRIDES

NUM_LAYERS = 2
BLOCK_SIZE = 8
PROMPTS = {"a": list(range(3, 40)), "b": [5, 9, 2, 50, 7], "c": [90, 1, 17]}


@cache
def exported(family: str) -> ExportedProgram:
    """A float32 program with weights that make every norm, bias and angle matter."""
    torch.manual_seed(sum(family.encode()))
    options = {**COMMON, "num_hidden_layers": NUM_LAYERS, **OVERRIDES.get(family, {})}
    if family == "gptj":
        options["rotary_dim"] = 4  # a part of a head
    config = AutoConfig.for_model(family, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return export_huggingface(model.requires_grad_(False))


def paged_graph(family: str, dtype: torch.dtype = torch.float32) -> PagedGraph:
    """A fresh one each time: fusing takes it apart."""
    program = exported(family)
    program = program if dtype == torch.float32 else cast(program, dtype)
    return page(program, max_context_tokens=200)


def logits_of(paged: PagedGraph) -> Tensor:
    """float32 logits of every token of the prompts: first in chunks and together, then a token of
    each at a time."""
    info = paged_info(paged, "Tiny", has_tokenizer=False, has_chat_template=False)
    decoder = GraphDecoder(paged, info, (), [])
    shapes = [layer.kv_shape for layer in paged.layers]
    pool = KvPool(shapes, num_blocks=24, block_size=BLOCK_SIZE, dtype=paged.dtype)
    replay = Replay(Runner(decoder, pool, choose_backend("cpu")))
    steps = [
        {"a": PROMPTS["a"][:11]},
        {"a": PROMPTS["a"][11:30], "b": PROMPTS["b"]},
        {"a": PROMPTS["a"][30:], "c": PROMPTS["c"]},
        *({name: [token] for name in PROMPTS} for token in (8, 13, 21)),
    ]
    return torch.cat([logits for step in steps for logits in replay.step(step).values()])
