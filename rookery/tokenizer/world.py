"""The World vocabulary: byte sequences, greedily matched longest first."""

from __future__ import annotations

import ast
import hashlib
import lzma
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np

from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import _trie, chat

VOCAB_SIZE = 65536
_TOKENS = 65529
_SHA256 = "2899acc059786b24ca563ca06449d2335ad4ce512b40639aca8c2cd5cf1158ae"
_PIECE = 1 << 22


class World:
    """Tokenizer of the RWKV "World" models (`rwkv_vocab_v20230424`), or of a vocabulary file in the same format.

    Any text and any bytes can be encoded, and decoding gives exactly the same bytes. Id 0 ends a document and stands
    for no bytes.

    Args:
        path: a vocabulary file (``<id> <Python literal> <byte length>`` a line); the World vocabulary when not given.

    Attributes:
        vocab_size: number of ids a model needs: 65536, or the highest id of the file plus one.
        end_of_document: 0.
        name: what `load` takes to get this tokenizer again: "world" or the path.
        dtype: numpy dtype of the ids, uint16 where they fit, else int32.
        file_suffix: of the file that `save` writes; empty for the World vocabulary, which needs none.

    Raises:
        UserError: the file is missing, or not such a vocabulary.
    """

    end_of_document = 0

    def __init__(self, path: str | Path | None = None) -> None:
        if path is None:
            self._build(*_world_vocabulary(), name="world", file_suffix="")
            self.vocab_size = VOCAB_SIZE
        else:
            self._build(*read_vocabulary(Path(path)), name=str(path), file_suffix=".txt")

    @classmethod
    def compact(cls, characters: Iterable[str]) -> World:
        """A small vocabulary for data of few characters: all 256 bytes, so that it too encodes any text, the marks of
        a conversation, and each of `characters` that is not ASCII."""
        words = {*chat.MARKS.values(), chat.SEPARATOR, *(c for c in characters if not c.isascii())}
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += sorted((word.encode("utf-8") for word in words), key=lambda token: (len(token), token))
        ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
        tokenizer = cls.__new__(cls)
        data, ids = np.frombuffer(b"".join(tokens), np.uint8), np.arange(1, len(tokens) + 1)
        tokenizer._build(data, ends, ids, name="compact", file_suffix=".txt")
        return tokenizer

    def _build(self, data: np.ndarray, ends: np.ndarray, ids: np.ndarray, name: str, file_suffix: str) -> None:
        self.name, self.file_suffix = name, file_suffix
        self.vocab_size = int(ids.max()) + 1
        self.dtype: type[np.generic] = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        self._data, self._ends, self._ids = data, ends, ids
        self._longest = int(np.diff(ends, prepend=0).max())
        self._entries, self._values = _trie.build(data, ends, ids.astype(self.dtype))

    def save(self, path: str | Path) -> None:
        """Write the vocabulary in the World format."""
        lines = [f"{i} {token!r} {len(token)}\n" for i, token in self._bytes.items() if i != self.end_of_document]
        partial = Path(f"{path}.partial")
        partial.write_text("".join(lines), encoding="utf-8", newline="\n")
        os.replace(partial, path)

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text (as UTF-8) or of bytes.

        Raises:
            UnicodeEncodeError: the text has lone surrogates, which UTF-8 cannot hold.
            UserError: a vocabulary file lacks a byte of the text.
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """As `encode`, giving an array of `dtype`."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        return self.encode_documents([data], end=False)[0]

    def encode_documents(self, documents: list[bytes], *, end: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Encode many documents at once.

        Args:
            documents: the text of each, as UTF-8.
            end: write `end_of_document` after each.

        Returns:
            ids: (sum of sizes), of `dtype`, document after document.
            sizes: int32 (documents), ids of each.
        """
        data = np.frombuffer(b"".join(documents), np.uint8)
        ends = np.cumsum(np.fromiter(map(len, documents), np.int64, len(documents)))
        ids = np.empty(data.size + len(documents), self.dtype)
        sizes = np.empty(len(documents), np.int32)
        self._run(data, ends, data.size, self.end_of_document if end else -1, ids, sizes)
        return ids[: sizes.sum(dtype=np.int64)], sizes

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode one long text that comes in pieces; the ids are those of the whole text.

        Memory holds one piece and its ids at a time.
        """
        rest = b""
        for piece in pieces:
            rest += piece.encode("utf-8")
            if len(rest) > _PIECE:
                # A token that begins this close to the end of what is known might turn out longer.
                ids, consumed = self._encode_from(rest, len(rest) - self._longest)
                rest = rest[consumed:]
                yield ids
        yield self._encode_from(rest, len(rest))[0]

    def _encode_from(self, text: bytes, stop: int) -> tuple[np.ndarray, int]:
        ids = np.empty(len(text), self.dtype)
        sizes = np.empty(1, np.int32)
        consumed = self._run(np.frombuffer(text, np.uint8), np.array([len(text)], np.int64), stop, -1, ids, sizes)
        return ids[: sizes[0]], consumed

    def _run(self, data: np.ndarray, ends: np.ndarray, stop: int, end: int, ids: np.ndarray, sizes: np.ndarray) -> int:
        consumed = _trie.encode(self._entries, self._values, data, ends, stop, end, ids, sizes)
        if consumed < 0:
            byte = int(data[-1 - consumed])
            raise UserError(_("the vocabulary {name} has no token for byte 0x{byte:02x}", name=self.name, byte=byte))
        return consumed

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; the single character U+FFFD when it is not UTF-8 or an id is not in the vocabulary."""
        try:
            return self.decode_bytes(ids).decode("utf-8")
        except ValueError:
            return "\ufffd"

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        table = self._bytes
        try:
            return b"".join([table[i] for i in ids])
        except KeyError as error:
            raise ValueError(f"token id {error.args[0]} is not in the vocabulary") from None

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        data = self._data.tobytes()
        ends = self._ends.tolist()
        starts = [0, *ends[:-1]]
        table = {i: data[a:b] for i, a, b in zip(self._ids.tolist(), starts, ends, strict=True)}
        table[self.end_of_document] = b""
        return table

    def token_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """What every id stands for, for code that walks over the bytes of tokens.

        Returns:
            data: uint8, the bytes of all ids back to back.
            offsets: int64 (vocab_size + 1); the bytes of id i are ``data[offsets[i] : offsets[i + 1]]``.
        """
        pieces = [self._bytes.get(i, b"") for i in range(self.vocab_size)]
        offsets = np.zeros(self.vocab_size + 1, np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        return np.frombuffer(b"".join(pieces), np.uint8), offsets


def _world_vocabulary() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of all tokens, end of each, ids. The packed file has the 65529 lengths, a byte each, then the tokens."""
    packed = lzma.decompress(resources.files("rookery.tokenizer").joinpath("world_v20230424.xz").read_bytes())
    if hashlib.sha256(packed).hexdigest() != _SHA256:
        raise RuntimeError("rookery/tokenizer/world_v20230424.xz is damaged; install Rookery again")
    content = np.frombuffer(packed, np.uint8)
    return content[_TOKENS:], np.cumsum(content[:_TOKENS], dtype=np.int64), np.arange(1, _TOKENS + 1)


def read_vocabulary(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a vocabulary file in the World format: LF or CRLF, with or without a last newline.

    Returns:
        data: uint8, the bytes of all tokens back to back.
        ends: int64 (n), where each ends in `data`.
        ids: int64 (n).

    Raises:
        UserError: naming the file and the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(_("cannot read the vocabulary {path}: {reason}", path=path, reason=error)) from error
    tokens: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            head, literal, length = (
                line[: line.index(" ")],
                line[line.index(" ") : line.rindex(" ")],
                line[line.rindex(" ") :],
            )
            value = ast.literal_eval(literal.strip())
            token = value.encode("utf-8") if isinstance(value, str) else value
            if not isinstance(token, bytes) or len(token) != int(length) or int(head) < 1 or not token:
                raise ValueError
            tokens[token] = int(head)
        except (ValueError, SyntaxError) as error:
            message = _(
                "{path}, line {line}: not a vocabulary entry; expected: <id> <Python string> <byte length>",
                path=path,
                line=number,
            )
            raise UserError(message) from error
    if not tokens:
        raise UserError(_("the vocabulary {path} is empty", path=path))
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    return np.frombuffer(b"".join(tokens), np.uint8), ends, np.fromiter(tokens.values(), np.int64, len(tokens))
