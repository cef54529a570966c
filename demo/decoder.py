"""The demo's decoder: a small Llama trained on the text of Python's own help topics.

Owns the tokenizer, the training and the Hugging Face directory it leaves. Made once.
"""

import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

VOCABULARY = 2048
WINDOW = 128  # tokens of one training example
BATCH = 8
TRAINING_SECONDS = 90
NUM_WARMUP_STEPS = 20
SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it can spell any text, whatever it was trained on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[0])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def as_chat(topic: str, text: str) -> str:
    return f"<|user|>\nExplain {topic}.<|end|>\n<|assistant|>\n{text}<|end|>\n"


def token_stream(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All topics as chats, in one long line of token ids."""
    ids = [tokenizer(as_chat(topic, text))["input_ids"] for topic, text in topics.items()]
    return torch.tensor([token for chat in ids for token in chat])


def train(tokenizer: PreTrainedTokenizerFast, say: Callable[[str], None]) -> LlamaForCausalLM:
    """About 3.5 million parameters, trained until the time is up."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,  # <|end|>, the first special token
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).train()
    stream = token_stream(tokenizer)
    optimizers = make_optimizers(model)
    started = reported = time.monotonic()
    num_steps = 0
    while (elapsed := time.monotonic() - started) < TRAINING_SECONDS:
        num_steps += 1
        pace = min(1, num_steps / NUM_WARMUP_STEPS) * max(0.05, 1 - elapsed / TRAINING_SECONDS)
        starts = torch.randint(len(stream) - WINDOW, (BATCH,))
        batch = torch.stack([stream[start : start + WINDOW] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, learning_rate in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate * pace
            optimizer.step()
            optimizer.zero_grad()
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            say(f"  {elapsed:3.0f} of {TRAINING_SECONDS} s, loss {loss.item():.2f}")
    return model.eval()


def make_optimizers(model: LlamaForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices between the layers, AdamW for the rest, with their learning rates.
    Muon needs about half the steps, and time is what a first visitor has least of."""
    named = list(model.named_parameters())
    is_matrix = {name: weight.dim() == 2 and "embed" not in name for name, weight in named}
    matrices = [weight for name, weight in named if is_matrix[name]]
    others = [weight for name, weight in named if not is_matrix[name]]
    return [
        (torch.optim.Muon(matrices, weight_decay=0.01), 0.02),
        (torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0), 6e-3),
    ]


def prepare(directory: Path, say: Callable[[str], None]) -> Path:
    """The Hugging Face directory `pydoc-llama`, made once."""
    path = directory / "pydoc-llama"
    if path.exists():
        return path
    tokenizer = train_tokenizer([as_chat(topic, text) for topic, text in topics.items()])
    model = train(tokenizer, say)
    partial = directory / "pydoc-llama.partial"
    disable_progress_bar()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(path)
    return path
