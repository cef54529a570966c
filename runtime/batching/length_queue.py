"""Decides which texts share a run: similar lengths together, fair between those who ask.

Plain Python: no clock, no threads, no tensors.
"""

from collections import deque

from runtime.protocol import Batching

SLACK_TOKENS = 8  # a text may always be padded by so much
SLACK_SHARE = 4  # or by this part of the longest
MAX_REMEMBERED_KEYS = 4096


class Text:
    """One text that waits. `request_id` and `index` say whose it is."""

    __slots__ = ("__weakref__", "index", "is_gone", "key", "request_id", "token_ids")

    def __init__(self, key: str, request_id: str, index: int, token_ids: list[int]) -> None:
        self.key = key
        self.request_id = request_id
        self.index = index
        self.token_ids = token_ids
        self.is_gone = False  # taken or removed; whatever still lists it skips it

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class LengthQueue:
    """A run begins with the longest waiting text of whoever has been served least, in order of
    arrival; texts a little shorter fill it, whoever's they are, up to `max_tokens` counted with
    their padding. So long texts hold nobody up who sends short ones under another key.
    """

    def __init__(self, max_tokens: int, max_texts: int, batching: Batching) -> None:
        assert max_tokens >= 1, "a run takes at least one token"
        assert max_texts >= 1, "a run takes at least one text"
        self._max_tokens = max_tokens
        self._max_texts = max_texts
        self._batching = batching
        self._requests: dict[str, deque[str]] = {}  # key -> its requests with texts left, in order
        self._texts: dict[str, list[Text]] = {}  # request id -> its texts, the longest last
        self._of_length: dict[int, dict[Text, None]] = {}  # those that wait, in order of arrival
        self._num_waiting: dict[str, int] = {}  # by request id
        self._served: dict[str, int] = {}  # padded tokens by key, at least those of the floor
        self._floor = 0

    def __len__(self) -> int:
        """Texts that wait."""
        return sum(self._num_waiting.values())

    def add(self, key: str, request_id: str, texts: list[list[int]]) -> None:
        """Queue a request's texts, of which there is at least one."""
        assert texts, "a request has texts"
        assert request_id not in self._texts, request_id
        made = [Text(key, request_id, index, ids) for index, ids in enumerate(texts)]
        for text in made:
            self._of_length.setdefault(text.num_tokens, {})[text] = None
        self._texts[request_id] = sorted(made, key=lambda text: text.num_tokens)
        self._num_waiting[request_id] = len(made)
        if key not in self._requests:
            self._requests[key] = deque()
            self._served[key] = max(self._served.get(key, 0), self._floor)
        self._requests[key].append(request_id)

    def remove(self, request_id: str) -> None:
        """None of the request's texts will run any more. Idempotent."""
        for text in self._texts.get(request_id, ()):
            if not text.is_gone:
                self._take(text)

    def take(self) -> list[Text]:
        """The texts of the next run; empty when none wait."""
        if not self._requests:
            return []
        key = min(self._requests, key=self._served.__getitem__)
        self._floor = max(self._floor, self._served[key])
        first = self._longest(self._requests[key][0])
        longest = first.num_tokens
        self._take(first)
        batch = [first]
        most = min(self._max_texts, max(1, self._max_tokens // longest))
        if self._batching == "alone":
            most = 1
        shortest = longest
        if self._batching == "padded":
            shortest = max(1, longest - max(SLACK_TOKENS, longest // SLACK_SHARE))
        for length in range(longest, shortest - 1, -1):
            while len(batch) < most and (text := self._first_of_length(length)) is not None:
                self._take(text)
                batch.append(text)
        for text in batch:
            self._served[text.key] += longest
        self._forget_keys()
        return batch

    def _longest(self, request_id: str) -> Text:
        texts = self._texts[request_id]
        while texts[-1].is_gone:
            texts.pop()
        return texts[-1]

    def _first_of_length(self, length: int) -> Text | None:
        return next(iter(self._of_length.get(length, ())), None)

    def _take(self, text: Text) -> None:
        text.is_gone = True
        same_length = self._of_length[text.num_tokens]
        del same_length[text]
        if not same_length:
            del self._of_length[text.num_tokens]
        request_id, key = text.request_id, text.key
        self._num_waiting[request_id] -= 1
        if self._num_waiting[request_id]:
            return
        del self._num_waiting[request_id], self._texts[request_id]
        self._requests[key].remove(request_id)
        if not self._requests[key]:
            del self._requests[key]

    def _forget_keys(self) -> None:
        """Those without texts who have been served least, half of them: they lose little."""
        if len(self._served) > MAX_REMEMBERED_KEYS:
            most = sorted(self._served, key=self._served.__getitem__)[MAX_REMEMBERED_KEYS // 2 :]
            kept = {*most, *self._requests}
            self._served = {key: self._served[key] for key in kept}
