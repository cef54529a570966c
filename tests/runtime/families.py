"""Every family of decoders that is known to work: a tiny model of each, and how it is served.

`python -m tests.runtime.families` writes docs/models.md anew; `test_families.py` holds it to it.
"""

import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from runtime.building.directory_routes import directory_source
from runtime.building.routes import NotThisWay
from runtime.execution.attention import LayerSpec
from runtime.importing.archive import UnpackedUpload
from runtime.importing.program import ImportFailure
from runtime.proving.decoder import DecoderProof, DecoderProver
from runtime.proving.forms import PagedForm
from runtime.proving.huggingface_original import HuggingFaceOriginal
from tests.runtime.decoders import WINDOW, save_decoder

BLOCK_SIZE = 8
# As a build tries them.
WAYS = REGISTRY, GRAPH, UNCACHED = "attention interface", "graph", "uncached"
HALF_WINDOW = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MOE |= {"moe_intermediate_size": 32, "decoder_sparse_step": 1}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
MLA |= {"v_head_dim": 20, "head_dim": 8, "num_key_value_heads": 6}
DEEPSEEK = {**MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK |= {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
MAMBA2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
MAMBA2 |= {"mamba_chunk_size": 8, "mamba_expand": 2}
MAMBA_LAYERS = ["mamba", "attention", "mamba"]
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
LINEAR |= {"linear_value_head_dim": 8}
LINEAR_LAYERS = ["linear_attention", "full_attention", "linear_attention"]


@dataclass(frozen=True)
class Family:
    """`config` differs from `decoders.COMMON` where the family needs it to show what it has."""

    model_type: str
    examples: str
    config: dict[str, Any] = field(default_factory=dict)
    is_required: bool = True  # of the default test run; the long tail is marked slow
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.model_type} ({self.variant})" if self.variant else self.model_type


def tail(model_type: str, examples: str, config: dict[str, Any] | None = None) -> Family:
    return Family(model_type, examples, config or {}, is_required=False)


FAMILIES = [
    Family("llama", "Llama 2, Llama 3, SmolLM2, TinyLlama, Yi"),
    Family("qwen2", "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen"),
    Family("qwen3", "Qwen3", {"head_dim": 20}),
    Family("mistral", "Mistral 7B", {"sliding_window": WINDOW}),
    tail("gemma", "Gemma", {"num_key_value_heads": 1}),
    Family("gemma2", "Gemma 2", {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0}),
    Family("gemma3_text", "Gemma 3 (text)", {"sliding_window": WINDOW, **HALF_WINDOW}),
    Family("gpt2", "GPT-2, DistilGPT2"),
    Family("gpt_neox", "Pythia, GPT-NeoX"),
    tail(
        "gpt_neo",
        "GPT-Neo, TinyStories",
        {"attention_types": [[["global", "local", "global"], 1]], "window_size": WINDOW},
    ),
    tail("gptj", "GPT-J", {"rotary_dim": 4}),
    Family("opt", "OPT", {"word_embed_proj_dim": 48, "ffn_dim": 64}),
    Family("phi", "Phi-1, Phi-2"),
    Family("phi3", "Phi-3, Phi-4", {"sliding_window": WINDOW}),
    Family("bloom", "BLOOM, BLOOMZ"),
    Family("mpt", "MPT", {"d_model": 48, "n_heads": 6, "n_layers": 3, "max_seq_len": 256}),
    Family("falcon", "Falcon 7B", {"head_dim": ...}),
    Family(
        "falcon",
        "Falcon 40B, 180B",
        {"head_dim": ..., "new_decoder_architecture": True, "num_kv_heads": 2},
        is_required=False,
        variant="grouped heads",
    ),
    Family("falcon", "Falcon RW", {"head_dim": ..., "alibi": True}, variant="ALiBi"),
    Family("olmo", "OLMo"),
    Family("olmo2", "OLMo 2"),
    Family("starcoder2", "StarCoder2", {"sliding_window": WINDOW}),
    Family("stablelm", "StableLM", {"head_dim": 8}),
    Family("cohere", "Command R"),
    Family("cohere2", "Command R7B, Command A", {"sliding_window": WINDOW, **HALF_WINDOW}),
    Family("granite", "Granite 3"),
    Family("smollm3", "SmolLM3"),
    Family("mixtral", "Mixtral", MOE),
    Family("qwen2_moe", "Qwen1.5-MoE", MOE),
    Family("qwen3_moe", "Qwen3 MoE", MOE),
    Family("gpt_oss", "gpt-oss", {"sliding_window": WINDOW, **MOE, **HALF_WINDOW}),
    Family("deepseek_v3", "DeepSeek-V3, R1", DEEPSEEK),
    Family("mamba", "Mamba", {"state_size": 8}),
    Family("jamba", "Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, **MOE}),
    tail(
        "llama4_text",
        "Llama 4 (text)",
        {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 16, **MOE},
    ),
    Family("helium", "Helium", {"head_dim": 8}),
    Family("glm", "GLM-4 9B"),
    Family("exaone4", "EXAONE 4", {"sliding_window": WINDOW, **HALF_WINDOW}),
    tail("apertus", "Apertus"),
    tail("arcee", "AFM"),
    tail("afmoe", "Trinity", {**MOE, "sliding_window": WINDOW, **HALF_WINDOW}),
    tail("bamba", "Bamba", {**MAMBA2, "attn_layer_indices": [1]}),
    tail("bert", "a BERT decoder", {"is_decoder": True}),
    Family("bert", "a BERT that looks ahead", {"is_decoder": False}, False, "bidirectional"),
    tail("biogpt", "BioGPT"),
    tail("codegen", "CodeGen", {"rotary_dim": 4, "hidden_size": 64, "num_attention_heads": 4}),
    tail("ctrl", "CTRL"),
    tail("cwm", "CWM", {"sliding_window": WINDOW}),
    tail("deepseek_v2", "DeepSeek-V2", {**DEEPSEEK, "topk_method": "greedy"}),
    tail("diffllama", "DiffLlama"),
    tail("doge", "Doge", {"keep_window_size": 8}),
    tail("dots1", "dots.llm1", {**DEEPSEEK, **MOE}),
    tail("ernie4_5", "ERNIE 4.5"),
    tail("ernie4_5_moe", "ERNIE 4.5 MoE", MOE),
    tail("falcon_h1", "Falcon-H1", {**MAMBA2, "mamba_d_ssm": 96}),
    tail("falcon_mamba", "Falcon Mamba", {"state_size": 8}),
    tail("flex_olmo", "FlexOlmo", MOE),
    tail("glm4", "GLM-4-0414"),
    tail("glm4_moe", "GLM-4.5", {**DEEPSEEK, "head_dim": 16}),
    tail("gpt_bigcode", "StarCoder, SantaCoder"),
    tail("granitemoe", "Granite 3 MoE", MOE),
    tail("granitemoehybrid", "Granite 4", {**MAMBA2, **MOE, "layer_types": MAMBA_LAYERS}),
    tail("hunyuan_v1_dense", "Hunyuan"),
    tail("jetmoe", "JetMoe", MOE),
    tail("laguna", "Laguna", MOE),
    tail("lfm2", "LFM2", {"layer_types": ["conv", "full_attention", "conv"]}),
    tail("mamba2", "Mamba 2", {"num_heads": 6, "head_dim": 16, "state_size": 8, "n_groups": 1}),
    tail("minimax", "MiniMax-Text-01", {**MOE, "block_size": 8}),
    tail("ministral", "Ministral 8B", {"sliding_window": WINDOW}),
    tail("modernbert-decoder", "Ettin decoders", {"local_attention": 16, "head_dim": 8}),
    tail("nemotron", "Minitron, Nemotron 4"),
    tail("olmo3", "OLMo 3", {"sliding_window": WINDOW}),
    tail("olmoe", "OLMoE", {**MOE, "head_dim": 8}),
    tail("openai-gpt", "GPT"),
    tail("persimmon", "Persimmon, Fuyu (text)", {"head_dim": 8}),
    tail("phimoe", "Phi-3.5-MoE", {**MOE, "sliding_window": WINDOW}),
    tail("qwen3_next", "Qwen3-Next", {**LINEAR, **MOE, "layer_types": LINEAR_LAYERS}),
    tail("recurrent_gemma", "RecurrentGemma", {"lru_width": 48, "attention_window_size": 16}),
    tail("roberta", "a RoBERTa decoder", {"is_decoder": True}),
    tail("rwkv", "RWKV-4", {"attention_hidden_size": 48, "context_length": 256}),
    tail("seed_oss", "Seed-OSS"),
    tail("vaultgemma", "VaultGemma", {"sliding_window": WINDOW}),
    tail("xglm", "XGLM", {"d_model": 48, "attention_heads": 6, "num_layers": 3, "ffn_dim": 64}),
]


@dataclass(frozen=True)
class Row:
    """What came of one family: `attention` is what kinds were found; `code` says why the
    attention interface did not take it."""

    family: Family
    way: str
    architecture: str
    attention: str
    code: str
    proof: DecoderProof

    @property
    def line(self) -> str:
        """Its line in the table, of which nothing depends on the machine."""
        is_equal = self.proof.verdict == "equal"
        way = self.way if is_equal else "refused"
        how = REASONS[self.code] if self.way == UNCACHED else self.attention
        verdict = "equal" if is_equal else "not equal to the original"
        name = f"`{self.architecture}` {self.family.variant}".rstrip()
        return f"| {name} | {self.family.examples} | {way} | {how} | {verdict} |"

    @property
    def closeness(self) -> float:
        """The largest error as a share of its tolerance."""
        checks = [check for check in self.proof.checks if check.tolerance]
        return max((check.error or 0.0) / (check.tolerance or 1.0) for check in checks)


def examine(family: Family, directory: Path, dtype: torch.dtype = torch.float32) -> Row:
    """Save a tiny model of the family, serve it by the first of a build's routes that is proved,
    and say how."""
    save_decoder(family.model_type, directory / "model", dtype, **family.config)
    upload = UnpackedUpload(kind="huggingface", path=directory / "model")
    prover = DecoderProver(HuggingFaceOriginal(upload.path), block_size=BLOCK_SIZE)
    code, row = "", None
    for way, route in zip(WAYS, directory_source(upload, directory).routes, strict=True):
        try:
            served = route.load(code)
        except NotThisWay as error:
            if not code and isinstance(error.__cause__, ImportFailure):
                code = error.__cause__.error.code
            continue
        form = served.form
        if isinstance(form, PagedForm):
            form = replace(form, block_size=BLOCK_SIZE)
        attention = describe(served.decoder.layers if served.decoder else [])
        proof = prover.prove(form)
        row = Row(family, way, served.info.architecture, attention, code, proof)
        if proof.verdict == "equal":
            break
    assert row is not None, "the last route takes whatever runs"
    return row


def describe(layers: list[LayerSpec]) -> str:
    """What kinds of attention were found, in few words."""
    specs = [layer.attention for layer in layers]
    kinds = [
        ("sliding window", [spec.sliding_window is not None for spec in specs]),
        ("soft cap", [spec.soft_cap is not None for spec in specs]),
        ("ALiBi", [spec.alibi_slopes is not None for spec in specs]),
        ("sinks", [spec.sinks is not None for spec in specs]),
    ]
    words = [name if all(has) else f"{name} in some layers" for name, has in kinds if any(has)]
    return ", ".join(words) or "causal"


DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
# In the table, of a family that is not paged.
REASONS = {
    "attention_not_found": "a recurrent state instead of attention",
    "attention_unsupported": "its mask depends on what tokens are",
    "mask_unsupported": "its mask is neither causal nor a sliding window",
    "mixes_tokens": "a recurrent state or a convolution beside attention",
    "positions_unsupported": "positions that depend on what tokens are",
}
HEAD = f"""# Decoders that are known to work

Any causal language model of transformers can be uploaded; none is known to the code by name. This
table is what came of building a tiny random model of each family, as wide as it takes to show
what the family has (a sliding window shorter than the prompts, several query heads per key head,
odd widths). It is written by `python -m tests.runtime.families` with transformers
{transformers.__version__}, and held to the code by `tests/runtime/test_families.py`.

How a model is **served**:

- **{REGISTRY}**: paged, batched and cached; its layers attend through transformers' registry.
- **{GRAPH}**: paged, batched and cached; exported as a graph in which attention was found.
- **{UNCACHED}**: computed whole for every token, and batched where lengths are equal, because keys
  and values in blocks do not hold all that its layers remember. The receipt says why.
- **refused**: the build fails and says why.

**Equal** means that every logit of every replayed prompt is within the tolerance of the original's
own rounding, and every clear greedy token the same: alone, in chunks, batched, on a shared prefix
and after preemption.

| Architecture | Models of it | Served | Attention, or why there is no cache | Verdict |
| --- | --- | --- | --- | --- |
"""
FOOT = """
Refused before anything is loaded, each with what to do instead: uploads with Python code of their
own, pickled weights, weights that are quantised already, adapters that were not merged,
encoder-decoder models, and configurations that describe far more than the files hold.
"""


def document(rows: list[Row]) -> str:
    return HEAD + "".join(f"{row.line}\n" for row in rows) + FOOT


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            row = examine(family, Path(directory))
        sys.stdout.write(f"{row.line} {row.closeness:.2g} of the tolerance\n")
        rows.append(row)
    DOCUMENT.write_text(document(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
