"""Stop strings: never delivered, held back while undecided, released when not one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.text.stream import TextStream
from runtime.text.tokenizer import Tokenizer


def run(tokenizer: Tokenizer, text: str, stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, [], stop)
    deltas = []
    for token_id in tokenizer.encode(text, is_templated=True):
        deltas.append(stream.add([token_id]))
        if stream.is_stopped:
            break
    return [*deltas, stream.flush()], stream.is_stopped


@pytest.mark.parametrize(
    ("text", "stop", "expected", "is_stopped"),
    [
        ("one two three", [], "one two three", False),
        ("one two three", ["two"], "one ", True),
        ("one two three", ["e"], "on", True),
        ("one two three", ["three", "wo t"], "one t", True),
        ("one two thre", ["three"], "one two thre", False),
        ("aaaaab", ["aab"], "aaa", True),
        ("ababac", ["abac"], "ab", True),
        ("日本語の文", ["語の"], "日本", True),
        ("stop", ["stop"], "", True),
    ],
)
def test_text_ends_before_the_first_stop_string(
    all_tokenizers: dict[str, Tokenizer],
    text: str,
    stop: list[str],
    expected: str,
    is_stopped: bool,
) -> None:
    deltas, stopped = run(all_tokenizers["byte_level"], text, stop)
    assert ("".join(deltas), stopped) == (expected, is_stopped)


def test_only_what_may_begin_a_stop_string_is_held(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["byte_level"]
    stream = TextStream(tokenizer, [], ["\n\n"])
    assert stream.add(tokenizer.encode("fox\n", is_templated=True)) == "fox"
    assert stream.add(tokenizer.encode("dog", is_templated=True)) == "\ndog"
    assert stream.flush() == ""


@given(
    text=st.text(alphabet="ab", max_size=20),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_any_stop_strings(all_tokenizers: dict[str, Tokenizer], text: str, stop: list[str]) -> None:
    deltas, is_stopped = run(all_tokenizers["byte_level"], text, stop)
    # By the definition: the first moment at which the text so far contains a stop string.
    for end in range(len(text) + 1):
        found = [at for each in stop if (at := text[:end].find(each)) >= 0]
        if found:
            assert is_stopped
            assert "".join(deltas) == text[: min(found)]
            return
    assert not is_stopped
    assert "".join(deltas) == text
