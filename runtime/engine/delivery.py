"""What a step's tokens become on their way to the caller: text, log probabilities, the end.

Owns `SequenceOutput`. Does not own which token was chosen, nor when the scheduler ends a sequence.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from runtime.engine.preparation import PreparedRequest
from runtime.execution.sampler import SampledToken
from runtime.protocol import FinishReason, SequenceOutput, TokenLogprob, ToolCall
from runtime.scheduling.sequence import Sequence
from runtime.text.grammars import GrammarState
from runtime.text.stream import TextStream
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_calls import ToolCallReader

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Delivery:
    """What is on its way to the caller of one sequence."""

    sequence: Sequence
    stream: TextStream | None  # None without a tokenizer
    grammar: GrammarState | None = None  # of what the answer may be
    reader: ToolCallReader | None = None  # where the answer may call tools
    echo: str = ""
    device_ns: int = 0
    is_first: bool = True


class Deliverer:
    """Makes the outputs of sequences. Calls `finish` for one that its text ends."""

    def __init__(
        self, tokenizer: Tokenizer | None, finish: Callable[[Sequence, FinishReason], None]
    ) -> None:
        self._tokenizer = tokenizer
        self._finish = finish

    def open(self, sequence: Sequence, prepared: PreparedRequest) -> Delivery:
        """The delivery of a sequence that starts."""
        delivery = Delivery(sequence, self._make_stream(prepared))
        if prepared.constraint is not None:
            delivery.grammar = prepared.constraint.grammar.start()
            if prepared.constraint.make_reader is not None:
                delivery.reader = prepared.constraint.make_reader()
        if prepared.generate.echo:
            delivery.echo = self._echo(prepared)
        return delivery

    def deliver(self, delivery: Delivery, token: SampledToken | None) -> SequenceOutput:
        """The sequence's output of this step: its new token, if any, and its end, if it ended."""
        sequence = delivery.sequence
        token_ids = [] if token is None else [token.token_id]
        text, reason = self._read(delivery, token_ids)
        calls: list[ToolCall] = []
        if delivery.reader is not None:
            text, calls, reason = _read_calls(delivery.reader, text, reason)
        return SequenceOutput(
            request_id=sequence.request_id,
            choice=sequence.choice,
            token_ids=token_ids,
            text=delivery.echo + text,
            num_cached_tokens=sequence.num_cached_tokens,
            device_ns=delivery.device_ns,
            logprobs=None if token is None else self._describe(token),
            finish_reason=reason,
            tool_calls=calls,
            stop_string=None if delivery.stream is None else delivery.stream.stop_string,
        )

    def _read(self, delivery: Delivery, token_ids: list[int]) -> tuple[str, FinishReason | None]:
        """The new text, and why the sequence ended, if it did. A tokenizer that fails on its
        tokens ends this sequence alone."""
        sequence, stream = delivery.sequence, delivery.stream
        if stream is None:
            return "", sequence.finish_reason
        if sequence.finish_reason == "stop":  # by its last token, which is no part of the text
            token_ids = []
        is_complete = token_ids != [] and self._completes(delivery)
        try:
            text = stream.add(token_ids)
            if stream.is_stopped or is_complete:
                self._finish(sequence, "stop")
            if sequence.is_finished:
                text += stream.flush()
        except Exception:  # someone else's tokenizer may raise anything
            log.exception("request %s: its text cannot be read", sequence.request_id)
            self._finish(sequence, "error")
            return "", "error"
        is_stopped = stream.is_stopped or is_complete
        return text, "stop" if is_stopped else sequence.finish_reason

    def _completes(self, delivery: Delivery) -> bool:
        """Whether the grammar allows nothing more; then the answer ends without a token that says
        so."""
        sequence, grammar = delivery.sequence, delivery.grammar
        if grammar is None:
            return False
        grammar.follow(sequence.token_ids[sequence.num_prompt_tokens :])
        return grammar.is_complete

    def _describe(self, token: SampledToken) -> list[TokenLogprob] | None:
        if token.logprob is None:
            return None
        top = [(id_, self._token_text(id_), logprob) for id_, logprob in token.top]
        text = self._token_text(token.token_id)
        return [TokenLogprob(token_id=token.token_id, text=text, logprob=token.logprob, top=top)]

    def _token_text(self, token_id: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def _make_stream(self, prepared: PreparedRequest) -> TextStream | None:
        if self._tokenizer is None:
            return None
        shown = None if prepared.constraint is None else prepared.constraint.tokenizer
        stop = prepared.generate.sampling.stop
        return TextStream(shown or self._tokenizer, prepared.token_ids, stop)

    def _echo(self, prepared: PreparedRequest) -> str:
        if prepared.generate.text is not None or self._tokenizer is None:
            return prepared.generate.text or ""
        return self._tokenizer.decode(prepared.token_ids)


def _read_calls(
    reader: ToolCallReader, text: str, reason: FinishReason | None
) -> tuple[str, list[ToolCall], FinishReason | None]:
    """The text without calls, the calls, and the reason to end, which calls change."""
    text, calls = reader.add(text)
    if reason is not None:
        text += reader.flush()
    return text, calls, "tool_calls" if reason == "stop" and reader.num_calls else reason
