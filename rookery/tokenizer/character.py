"""The character vocabulary: one id a character, as RWKV-LM builds it for ``--vocab_size 0``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from rookery.errors import UserError
from rookery.i18n import _

END_OF_DOCUMENT = "\0"
"""The character that ends a document. Sorted first, it gets id 0, as in the World vocabulary."""


class Character:
    """Tokenizer with one id for each character of a vocabulary.

    Args:
        vocabulary: the characters in the order of their ids, or the path of a ``vocab.json``.

    Attributes:
        vocab_size: number of characters.
        end_of_document: id of U+0000 when the vocabulary has it (one built for documents does), else None.
        name: path of the vocabulary, or "char" when it was not read from a file.
        dtype: numpy dtype of the ids, uint16 where they fit, else int32.
        file_suffix: of the file that `save` writes.

    Raises:
        UserError: the file is missing, or not a character vocabulary.
    """

    file_suffix = ".json"

    def __init__(self, vocabulary: str | Path | Iterable[str]) -> None:
        if isinstance(vocabulary, str | Path):
            self.name = str(vocabulary)
            characters = _read(Path(vocabulary))
        else:
            self.name = "char"
            characters = list(vocabulary)
        if not characters:
            raise UserError(_("the character vocabulary {name} is empty", name=self.name))
        self.characters = characters
        self.vocab_size = len(characters)
        self.dtype: type[np.generic] = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        codes = np.array([ord(character) for character in characters])
        self._ids = np.full(codes.max() + 1, -1, np.int32)
        self._ids[codes] = np.arange(self.vocab_size)
        self.end_of_document = characters.index(END_OF_DOCUMENT) if END_OF_DOCUMENT in characters else None

    @classmethod
    def build(cls, text: Iterable[str], *, documents: bool = False) -> Character:
        """The vocabulary of a text: its characters, sorted by code point.

        Args:
            text: a string, or pieces of text, or characters.
            documents: also give an id to U+0000, which will end each document.
        """
        characters = set[str]()
        for piece in [text] if isinstance(text, str) else text:
            characters.update(piece)
        if documents:
            characters.add(END_OF_DOCUMENT)
        return cls(sorted(characters))

    def save(self, path: str | Path) -> None:
        """Write ``vocab.json`` as the reference does: ``{"0": "a", …}``, UTF-8, nothing escaped that need not be."""
        text = json.dumps({str(i): character for i, character in enumerate(self.characters)}, ensure_ascii=False)
        partial = f"{path}.partial"
        Path(partial).write_text(text, encoding="utf-8", newline="")
        os.replace(partial, path)

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text; bytes must be UTF-8.

        Raises:
            UserError: a character is not in the vocabulary; the message names it.
            UnicodeDecodeError: the bytes are not UTF-8.
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """As `encode`, giving an array of `dtype`."""
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        known = self._ids.size
        ids = self._ids[np.minimum(codes, known - 1)]
        unknown = (codes >= known) | (ids < 0)
        if unknown.any():
            character = text[int(unknown.argmax())]
            message = _(
                "the character {character} (U+{code:04X}) is not in the vocabulary {name}, which has {size} characters",
                character=repr(character),
                code=ord(character),
                name=self.name,
                size=self.vocab_size,
            )
            raise UserError(message)
        return ids.astype(self.dtype)

    def encode_documents(self, documents: list[bytes], *, end: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Encode many documents at once.

        Args:
            documents: the text of each, as UTF-8.
            end: write `end_of_document` after each.

        Returns:
            ids: (sum of sizes), of `dtype`, document after document.
            sizes: int32 (documents), ids of each.

        Raises:
            UserError: a character is not in the vocabulary, or the end of a document is not, or it is within one.
        """
        if end and self.end_of_document is None:
            message = _(
                "the vocabulary {name} has no end of document (U+0000); build one with --tokenizer char", name=self.name
            )
            raise UserError(message)
        mark = END_OF_DOCUMENT if end else ""
        texts = [document.decode("utf-8") + mark for document in documents]
        sizes = np.fromiter(map(len, texts), np.int32, len(texts))
        text = "".join(texts)
        if end and text.count(mark) > len(texts):
            raise UserError(_("a document contains the character U+0000, which ends documents in this vocabulary"))
        return self.encode_array(text), sizes

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode one long text that comes in pieces."""
        return map(self.encode_array, pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without end marks; the single character U+FFFD when an id is not in the vocabulary."""
        try:
            return self.decode_bytes(ids).decode("utf-8")
        except ValueError:
            return "\ufffd"

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `ids`.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        text = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is not in the vocabulary")
            if i != self.end_of_document:
                text.append(self.characters[i])
        return "".join(text).encode("utf-8")

    def token_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """What every id stands for, for code that walks over the bytes of tokens.

        Returns:
            data: uint8, the UTF-8 bytes of all ids back to back.
            offsets: int64 (vocab_size + 1); the bytes of id i are ``data[offsets[i] : offsets[i + 1]]``.
        """
        pieces = [self.decode_bytes([i]) for i in range(self.vocab_size)]
        offsets = np.zeros(self.vocab_size + 1, np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        return np.frombuffer(b"".join(pieces), np.uint8), offsets


def _read(path: Path) -> list[str]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(_("cannot read the vocabulary {path}: {reason}", path=path, reason=error)) from error
    if not isinstance(table, dict):
        raise UserError(
            _("{path}: a character vocabulary is an object of the form {example}", path=path, example='{"0": "a"}')
        )
    for i, (key, character) in enumerate(table.items()):
        if key != str(i) or not isinstance(character, str) or len(character) != 1:
            message = _(
                "{path}: entry {key} is {value}; ids must be 0, 1, 2, … in order, each with one character",
                path=path,
                key=repr(key),
                value=repr(character),
            )
            raise UserError(message)
    return list(table.values())
