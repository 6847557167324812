"""Tokenizer of RWKV models for transformers: a vocabulary of byte sequences, greedily matched longest first.

Rookery copies this file into the directories it writes for Hugging Face; it needs nothing but transformers.
Token strings are the bytes of a token read as Latin-1.
"""

import ast
import os
import shutil
from typing import Any

from transformers import PreTrainedTokenizer

VOCABULARY = "rwkv_vocab_v20230424.txt"


class RwkvTokenizer(PreTrainedTokenizer):
    """Lines of the vocabulary are `<id> <Python literal> <bytes>`; id 0 ends a document."""

    vocab_files_names = {"vocab_file": VOCABULARY}  # noqa: RUF012 - as transformers declares it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, eos_token: str = "<|rwkv_tokenizer_end_of_text|>", **options: Any) -> None:
        self.vocab_file = vocab_file
        self._token_of = {0: str(eos_token)}
        self._trie: dict[int, Any] = {}
        with open(vocab_file, encoding="utf-8") as file:
            for line in file:
                number, literal = line[: line.rindex(" ")].split(" ", 1)
                token = ast.literal_eval(literal)
                content = token.encode("utf-8") if isinstance(token, str) else token
                self._token_of[int(number)] = content.decode("latin-1")
                node = self._trie
                for byte in content:
                    node = node.setdefault(byte, {})
                node[-1] = content.decode("latin-1")
        self._id_of = {token: number for number, token in self._token_of.items()}
        super().__init__(eos_token=eos_token, **options)

    @property
    def vocab_size(self) -> int:
        return max(self._token_of) + 1

    def get_vocab(self) -> dict[str, int]:
        return {**self._id_of, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        data, tokens, start = text.encode("utf-8"), [], 0
        while start < len(data):
            node, end, longest = self._trie, start, None
            while end < len(data) and data[end] in node:
                node = node[data[end]]
                end += 1
                longest = node.get(-1, longest)
            if longest is None:
                raise ValueError(f"the vocabulary has no token for byte {data[start]:#04x}")
            tokens.append(longest)
            start += len(longest)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._id_of.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._token_of.get(index, self._token_of[0])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        # What is no token of the vocabulary is one added to it, which may hold any character.
        content = b"".join(token.encode("latin-1" if token in self._id_of else "utf-8") for token in tokens)
        return content.decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        path = os.path.join(save_directory, (filename_prefix + "-" if filename_prefix else "") + VOCABULARY)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)
