"""Takes tokens that a grammar does not allow out of the logits.

Owns the mask in memory and on the device. Does not own grammars (runtime.text.grammars).
"""

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from runtime.cache.transfer import send
from runtime.scheduling.sequence import Sequence
from runtime.text.grammars import GrammarState

WORD_BITS = 32


def mask_disallowed(
    logits: Tensor, sequences: list[Sequence], grammars: Mapping[int, GrammarState]
) -> dict[int, bool]:
    """Set the logits ([rows, vocab], in place) of tokens that may not come next to -inf, in the
    rows of `grammars`. Ids that the tokenizer lacks may never come. Returns the rows whose grammar
    cannot be followed further, and whether that is due to the schema it was made of. Doing it
    again for the same sequences changes nothing."""
    vocab_size = logits.shape[-1]
    num_words = -(-vocab_size // WORD_BITS)
    # On the processor, while the device may still be running the model.
    words = torch.zeros(len(grammars), num_words, dtype=torch.int32)
    failed: dict[int, bool] = {}
    for at, (row, grammar) in enumerate(grammars.items()):
        sequence = sequences[row]
        grammar.follow(sequence.token_ids[sequence.num_prompt_tokens :])
        grammar.fill_mask(words[at].data_ptr(), num_words * WORD_BITS // 8)
        # Where nothing may come, the schema asks for what the vocabulary cannot spell.
        if grammar.is_failed or grammar.is_too_complex or not words[at].any():
            failed[row] = grammar.is_too_complex or not grammar.is_failed
    packed = send(words.view(torch.uint8), logits.device)  # [rows, bytes], least bit first
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :vocab_size].bool()
    rows = send(torch.tensor(list(grammars)), logits.device)
    logits[rows] = logits[rows].masked_fill(~allowed, -inf)
    return failed
