"""Takes tokens that a grammar does not allow out of the logits.

Owns the mask in memory and on the device. Does not own grammars (runtime.text.grammars).
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from math import inf

import torch
from torch import Tensor

from runtime.cache.transfer import send
from runtime.scheduling.sequence import Sequence
from runtime.text.grammars import GrammarState

WORD_BITS = 32
NUM_THREADS = 2  # beside the one that steps

Ends = dict[int, bool]  # by row: whether its own schema is why it cannot go on


class GrammarMasks:
    """Which tokens may come next in each constrained sequence of a step, found by a few threads
    while the model runs."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="masks")
        self._num_words = 0  # of a row, once logits were seen
        self._begun: dict[Sequence, Future[Tensor]] = {}

    def begin(self, grammars: Mapping[Sequence, GrammarState]) -> None:
        """Start on the masks that `apply` will need. Those of a step that failed are dropped."""
        wait(self._begun.values())  # nobody else may use their grammars until then
        self._begun.clear()
        if self._num_words:
            self._submit(grammars)

    def apply(self, logits: Tensor, grammars: Mapping[int, tuple[Sequence, GrammarState]]) -> Ends:
        """Set the logits ([rows, vocab], in place) of tokens that may not come next to -inf, in
        the rows of `grammars`. Ids that the tokenizer lacks may never come. Returns the rows whose
        grammar cannot be followed further, and whether that is due to the schema it was made of.
        Doing it again for the same sequences changes nothing."""
        vocab_size = logits.shape[-1]
        if self._num_words != -(-vocab_size // WORD_BITS):
            self.begin({})
            self._num_words = -(-vocab_size // WORD_BITS)
        self._submit({seq: grammar for seq, grammar in grammars.values() if seq not in self._begun})
        # On the processor, while the device may still be running the model.
        words = torch.stack([self._begun.pop(seq).result() for seq, _ in grammars.values()])
        failed: Ends = {}
        for at, (row, (_, grammar)) in enumerate(grammars.items()):
            # Where nothing may come, the schema asks for what the vocabulary cannot spell.
            if grammar.is_failed or grammar.is_too_complex or not words[at].any():
                failed[row] = grammar.is_too_complex or not grammar.is_failed
        packed = send(words.view(torch.uint8), logits.device)  # [rows, bytes], least bit first
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :vocab_size].bool()
        rows = send(torch.tensor(list(grammars)), logits.device)
        logits[rows] = logits[rows].masked_fill(~allowed, -inf)
        return failed

    def _submit(self, grammars: Mapping[Sequence, GrammarState]) -> None:
        for sequence, grammar in grammars.items():
            self._begun[sequence] = self._executor.submit(_mask, sequence, grammar, self._num_words)


def _mask(sequence: Sequence, grammar: GrammarState, num_words: int) -> Tensor:
    """A bit per token id: int32 [words]."""
    words = torch.zeros(num_words, dtype=torch.int32)
    grammar.follow(sequence.token_ids[sequence.num_prompt_tokens :])
    grammar.fill_mask(words.data_ptr(), num_words * WORD_BITS // 8)
    return words
