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
TRAINING_SECONDS = 75
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
    """About four million parameters, trained until the time is up."""
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    started = reported = time.monotonic()
    while (elapsed := time.monotonic() - started) < TRAINING_SECONDS:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * max(0.05, 1 - elapsed / TRAINING_SECONDS)
        starts = torch.randint(len(stream) - WINDOW, (16,))
        batch = torch.stack([stream[start : start + WINDOW] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            say(f"  {elapsed:3.0f} of {TRAINING_SECONDS} s, loss {loss.item():.2f}")
    return model.eval()


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
