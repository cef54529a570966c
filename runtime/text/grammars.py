"""Constraints on what a model may say: compiled, then followed token by token.

Owns the use of the grammar library (llguidance) and its limits. Does not own what a call of a tool
looks like (tool_format.py), nor how logits are masked (runtime.execution).
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from runtime.text.grammar_literals import literal_characters
from runtime.text.schema_bounds import SchemaError, check_schema, read_schema
from runtime.text.spelling import Spelling, SpellingError, spell
from runtime.text.tokenizer import Tokenizer

MAX_COMPILE_SECONDS = 5.0
STACK_BYTES = 128 * 1024 * 1024  # of the compiling thread, which recurses; only what is used counts
NUM_PROBED = 4  # tokens that a grammar is tried with before it runs
REFUSAL = "this model's tokenizer does not allow structured output: "
MAX_MASK_SECONDS = 0.015  # of processor time, on average over so many masks
NUM_AVERAGED = 32
DISALLOWED = "doesn't satisfy the grammar"  # the library's words for a token that it does not allow
MAX_LEFT = 2  # compilations that took too long and were left to end by themselves

# About 150 bytes each for counted text, of which a character takes up to 10: enough for schemas of
# `schema_bounds.MAX_COUNTED_CHARACTERS`. Patterns of many kinds of characters take up to 1 KB each.
MAX_LEXER_STATES = 200_000

# Each bounds work or memory of one sequence; a step's share is a few milliseconds at most.
LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=MAX_LEXER_STATES,
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,  # they would quote schemas and answers
)
# Any layout within bounds: without them, a small model may write blanks without end.
ANSWER_LAYOUT = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n\r\t]{0,16}",
    "coerce_one_of": True,  # oneOf as anyOf: exclusion is beyond a grammar
}
# As `tojson` writes it, so that a call reads in the next prompt as it was generated.
ARGUMENTS_LAYOUT = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}

_stack_size_lock = threading.Lock()


class GrammarError(Exception):
    """The grammar cannot be used. The message says why."""


class GrammarBusyError(Exception):
    """Too much is being compiled; the same may work later."""


class GrammarUnavailableError(Exception):
    """The tokenizer cannot spell what the grammar asks for."""


class GrammarState:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._num_followed = 0
        self._num_masks = 0
        self._masks_ns = 0  # of processor time

    def follow(self, generated_ids: Sequence[int]) -> None:
        """Take in the tokens generated so far, those of earlier calls included; so calling it
        again, after a preemption or a failed step, changes nothing."""
        for token_id in generated_ids[self._num_followed :]:
            self._num_followed += 1
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token_id)

    def fill_mask(self, address: int, num_bytes: int) -> None:
        """Write a bit per token id, set where the token may come next; none beyond the
        vocabulary that was compiled for, which must fit."""
        started_ns = time.thread_time_ns()
        self._matcher.unsafe_compute_mask_ptr(address, num_bytes)
        self._masks_ns += time.thread_time_ns() - started_ns
        self._num_masks += 1

    @property
    def is_failed(self) -> bool:
        """The grammar met a limit, or a token that it does not allow."""
        return self._matcher.is_error()

    @property
    def is_too_complex(self) -> bool:
        """It met a limit, or its masks take too long on average: that is its schema's doing."""
        if self._matcher.is_error():
            return DISALLOWED not in self._matcher.get_error()
        most_ns = max(self._num_masks, NUM_AVERAGED) * MAX_MASK_SECONDS * 1e9
        return self._masks_ns > most_ns

    @property
    def is_complete(self) -> bool:
        """Nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


class Grammar:
    """A compiled grammar, at its beginning."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> GrammarState:
        """A state of its own for one sequence."""
        return GrammarState(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles for one tokenizer. Safe to use from several threads; nothing is built before the
    first use."""

    def __init__(
        self, tokenizer: Tokenizer, eos_token_ids: Iterable[int], vocab_size: int | None = None
    ) -> None:
        """`vocab_size` is the model's, which may have more tokens than its tokenizer or fewer."""
        self._tokenizer = tokenizer
        self._vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self._eos_token_ids = sorted(id_ for id_ in eos_token_ids if id_ < self._vocab_size)
        self._lock = threading.Lock()
        # Once it was asked for; a text says why there is none.
        self._spelling: tuple[Spelling, LLTokenizer] | str | None = None
        self._left: list[threading.Thread] = []

    def compile(self, source: str) -> Grammar:
        """`source` is of `schema_source` or of `ToolGrammar`. On a thread with a deep stack; one
        that takes too long is left to end by itself. Raises `GrammarError`, `GrammarBusyError` or
        `GrammarUnavailableError`."""
        with self._lock:
            vocabulary, results = self._spelling_of(source), list[LLMatcher]()
            self._left = [thread for thread in self._left if thread.is_alive()]
            if len(self._left) >= MAX_LEFT:
                raise GrammarBusyError("too many schemas take too long to prepare; try again later")
        thread = _start_deep(lambda: results.append(_compile(vocabulary, source)))
        thread.join(MAX_COMPILE_SECONDS)
        if not results:
            with self._lock:
                self._left.append(thread)
            raise GrammarError("it takes too long to prepare; simplify it")
        (matcher,) = results
        if matcher.is_error():
            raise GrammarError(f"it cannot be enforced: {_first_line(matcher.get_error())}")
        return Grammar(matcher)

    def _spelling_of(self, source: str) -> LLTokenizer:
        """The vocabulary, when it can spell what the grammar asks for. Raises
        `GrammarUnavailableError`."""
        if self._spelling is None:
            self._spelling = self._load_spelling()
        if isinstance(self._spelling, str):
            raise GrammarUnavailableError(REFUSAL + self._spelling)
        spelling, vocabulary = self._spelling
        missing = spelling.missing(literal_characters(source))
        if missing:
            raise GrammarUnavailableError(f"{REFUSAL}it has no token for {missing!r}")
        return vocabulary

    def _load_spelling(self) -> tuple[Spelling, LLTokenizer] | str:
        """Or why there is none."""
        try:
            spelling = spell(self._tokenizer, self._eos_token_ids, self._vocab_size)
            vocabulary = LLTokenizer(
                cast(TokenizerWrapper, spelling), eos_token=self._eos_token_ids or None
            )
        except (SpellingError, ValueError) as error:
            return str(error)
        return spelling, vocabulary


def schema_source(json_schema: str) -> str:
    """The grammar of an answer in JSON; of any object's for an empty schema. Raises
    `GrammarError`."""
    schema = checked_schema(json_schema) or {"type": "object"}
    return grammar_source("start: @answer", {"answer": schema | {"x-guidance": ANSWER_LAYOUT}})


def checked_schema(text: str) -> dict[str, Any]:
    """A schema from a caller. Raises `GrammarError`."""
    try:
        schema = read_schema(text)
        check_schema(schema)
    except SchemaError as error:
        raise GrammarError(f"it cannot be enforced: {error}") from error
    return schema


def grammar_source(rules: str, schemas: dict[str, dict[str, Any]]) -> str:
    """Rules in the library's dialect of Lark, which may refer to a schema as `@name`."""
    # Without forcing, masks cost the same however long the text is that must come.
    main = {"name": "main", "lark_grammar": f'%llguidance {{"no_forcing": true}}\n{rules}\n'}
    named = [{"name": name, "json_schema": schema} for name, schema in schemas.items()]
    return json.dumps({"grammars": [main, *named]})


def _start_deep(target: Callable[[], None]) -> threading.Thread:
    """A thread with a deep stack, which ends with the process if not before."""
    with _stack_size_lock:  # which is the process's
        previous = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=target, name="grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(previous)
    return thread


def _compile(vocabulary: LLTokenizer, source: str) -> LLMatcher:
    """A matcher, which is in its error state when it cannot be used."""
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=LIMITS)
    # What is too complex from its beginning on is known before it runs.
    probe = matcher.deep_copy()
    for _ in range(NUM_PROBED):
        if probe.is_stopped():
            break
        mask = int.from_bytes(probe.compute_bitmask(), "little")
        if mask:
            probe.consume_token((mask & -mask).bit_length() - 1)
    return probe if probe.is_error() else matcher


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0][:300] if lines else "it is too complex"
