"""Text from ids that come one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from rookery.tokenizer.interface import Tokenizer


class StreamDecoder:
    """Decode ids as they are generated, giving out only whole characters.

    One character may be spread over several ids. Bytes that can never become UTF-8 come out as U+FFFD, one for each.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after these ids; empty while a character is incomplete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else nothing. The decoder can be used again."""
        return self._decoder.decode(b"", final=True)
