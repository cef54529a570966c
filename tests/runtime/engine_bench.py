"""An engine over a tiny deterministic model that can only know what is in its cache."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from runtime.engine import DecoderEngine, PreparedRequest
from runtime.execution.batch import StepBatch
from runtime.protocol import DecoderInfo, Generate, SamplingParams, SequenceOutput
from runtime.scheduling.plan import BlockMoves
from runtime.scheduling.scheduler import Scheduler
from runtime.text.chat import ChatTemplate
from runtime.text.tokenizer import Tokenizer

EOS = 1
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def make_tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator([], trainer)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


TOKENIZER = make_tokenizer()  # one token per byte
VOCAB_SIZE = TOKENIZER.vocab_size
NextToken = Callable[[list[int]], int]


def pseudo_random_token(prefix: list[int]) -> int:
    """Depends on every token of the prefix and on their order; never the end of sequence."""
    return 2 + sum((at + 1) * token for at, token in enumerate(prefix)) % (VOCAB_SIZE - 2)


def says(text: str) -> NextToken:
    """A model that recites `text`, then ends, whatever the prompt; the prompt ends with '>'."""
    script = [*TOKENIZER.encode(text), EOS]
    end_of_prompt = TOKENIZER.encode(">")[0]
    return lambda prefix: script[len(prefix) - 1 - prefix.index(end_of_prompt)]


class FakeRunner:
    """A model whose K/V is the token itself. What it says next is a function of the tokens that
    it finds in the cache through the block table, so a wrong slot changes the answer."""

    def __init__(self, num_blocks: int, block_size: int, next_token: NextToken) -> None:
        self.block_size = block_size
        self.slots = torch.full((num_blocks * block_size,), -1)
        self.host = torch.full((num_blocks * block_size,), -1)
        self.next_token = next_token
        self.num_tokens = 0
        self.is_broken: Callable[[list[int]], bool] = lambda prefix: False
        self.is_poisoned: Callable[[list[int]], bool] = lambda prefix: False

    def prefix(self, batch: StepBatch, row: int) -> list[int]:
        positions = torch.arange(int(batch.context_lens[row]))
        blocks = batch.block_tables[row][positions // self.block_size].long()
        return self.slots[blocks * self.block_size + positions % self.block_size].tolist()

    def move(self, moves: BlockMoves) -> None:
        blocks, host = self.slots.view(-1, self.block_size), self.host.view(-1, self.block_size)
        for block, at in moves.swap_outs:
            host[at] = blocks[block]
        blocks[moves.poisons] = -1
        for at, block in moves.swap_ins:
            blocks[block] = host[at]
        for source, block in moves.copies:
            blocks[block] = blocks[source]

    def run(self, batch: StepBatch) -> torch.Tensor:
        self.num_tokens += len(batch.token_ids)
        self.slots[batch.slots] = batch.token_ids
        logits = torch.zeros(len(batch.sample_indices), VOCAB_SIZE)
        for at, token_row in enumerate(batch.sample_indices.tolist()):
            row = int(torch.searchsorted(batch.query_start, token_row, right=True)) - 1
            prefix = self.prefix(batch, row)
            assert -1 not in prefix, "read a slot that was never written"
            if self.is_broken(prefix):
                raise ValueError("index out of range in self")
            logits[at, self.next_token(prefix)] = 20.0
            if self.is_poisoned(prefix):
                logits[at, 5] = float("nan")
        return logits


class Bench:
    """An engine, and its requests' outputs put together."""

    def __init__(
        self,
        next_token: NextToken = pseudo_random_token,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_batch_tokens: int = 32,
        max_sequences: int = 8,
        tokenizer: Tokenizer | None = TOKENIZER,
        max_context_tokens: int = 200,
        eos_token_ids: Sequence[int] = (EOS,),
        num_swap_blocks: int = 0,
        poisons_blocks: bool = True,
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        self.runner = FakeRunner(num_blocks, block_size, next_token)
        scheduler = Scheduler(
            num_blocks,
            block_size,
            max_batch_tokens,
            max_sequences,
            num_swap_blocks=num_swap_blocks,
            poisons_blocks=poisons_blocks,
        )
        self.engine = DecoderEngine(
            self.runner,
            scheduler,
            tokenizer,
            info=DecoderInfo(
                architecture="fake",
                vocab_size=vocab_size,
                max_context_tokens=max_context_tokens,
                num_layers=1,
                kv_bytes_per_token=8,
                dtype="float32",
                has_tokenizer=tokenizer is not None,
                has_chat_template=True,
            ),
            chat_template=ChatTemplate(TEMPLATE, {}),
            eos_token_ids=eos_token_ids,
        )
        self.outputs: dict[tuple[str, int], list[SequenceOutput]] = defaultdict(list)

    def prepare(self, request_id: str = "r", **fields: Any) -> PreparedRequest:
        prompt = {"text", "token_ids", "messages"} & fields.keys()
        sampling = {
            key: fields.pop(key) for key in list(fields) if key in SamplingParams.__struct_fields__
        }
        return self.engine.prepare(
            Generate(
                request_id=request_id,
                sampling=SamplingParams(**{"temperature": 0.0, "max_tokens": 50} | sampling),
                cache_salt=fields.pop("cache_salt", b""),
                **({} if prompt else {"text": ">"}) | fields,
            )
        )

    def add(self, request_id: str = "r", **fields: Any) -> PreparedRequest:
        prepared = self.prepare(request_id, **fields)
        self.engine.add(prepared)
        return prepared

    def step(self) -> list[SequenceOutput]:
        outputs = self.engine.step()
        for output in outputs:
            self.outputs[output.request_id, output.choice].append(output)
        self.engine.check_integrity()
        return outputs

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()

    def text(self, request_id: str = "r", choice: int = 0) -> str:
        return "".join(output.text for output in self.outputs[request_id, choice])

    def token_ids(self, request_id: str = "r", choice: int = 0) -> list[int]:
        return [id_ for output in self.outputs[request_id, choice] for id_ in output.token_ids]

    def finish_reason(self, request_id: str = "r", choice: int = 0) -> str | None:
        *earlier, last = self.outputs[request_id, choice]
        assert all(output.finish_reason is None for output in earlier)
        return last.finish_reason

    def ask(self, **fields: Any) -> tuple[str, str | None]:
        self.add(**fields)
        self.finish()
        return self.text(), self.finish_reason()


def continuation(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(pseudo_random_token(tokens))
    return tokens[len(prompt) :]


def plant_stale_blocks(scheduler: Scheduler) -> None:
    """A fault: from now on the prefix index does not forget what was given up."""
    scheduler.index.forget = lambda block: None
    pool, acquire = scheduler.pool, scheduler.pool.acquire

    def unchecked(block: int) -> None:
        if block in pool._free:
            pool._free.remove(block)
        pool._is_findable[block] = True
        acquire(block)

    pool.acquire = unchecked
