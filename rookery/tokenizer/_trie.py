"""Longest-match encoding with a double-array trie, compiled by Numba.

A node of the trie is a slot of `entries`: the child of a node for byte c sits at slot ``base(node) + c``. Slots 0..255
are the first bytes. An entry is one uint32: bits 0..8 the byte plus one (0 = free slot), bit 9 "a token ends here",
bits 10..31 the base of the children (0 = none). Bases are unique, so comparing the byte is enough to know the parent.
The token id of a slot is kept apart in `values`, read only once a token, so that the walk stays in a small table.
"""

from __future__ import annotations

import numpy as np
from numba import njit

LABEL = np.uint32(0x1FF)
TOKEN = np.uint32(0x200)
BASE = np.uint32(10)
MAX_SLOTS = 1 << 22


def build(data: np.ndarray, ends: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The trie of a vocabulary.

    Args:
        data: uint8, the bytes of all tokens back to back.
        ends: int64 (n), where each token ends in `data`; no token is empty.
        ids: (n), their ids, of the dtype that encoding is to return.

    Returns:
        entries: uint32 (slots).
        values: (slots), dtype of `ids`.

    Raises:
        ValueError: more than 4 million slots.
    """
    first, sibling, label, token = _link(data, ends)
    base, slots = _place(first, sibling, label)
    if slots > MAX_SLOTS:
        raise ValueError(f"a vocabulary of {first.size} prefixes is too large")
    return _fill(first, sibling, label, token, base, ids, slots)


@njit(cache=True)
def _link(data, ends):
    """The trie as linked nodes: first child, next sibling, byte, token or -1. 0 = no node; 1..256 = the first bytes."""
    capacity = data.size + 257
    first = np.zeros(capacity, np.int32)
    sibling = np.zeros(capacity, np.int32)
    label = np.zeros(capacity, np.uint8)
    token = np.full(capacity, -1, np.int32)
    for byte in range(256):
        label[1 + byte] = byte
    count = 257
    start = 0
    for t in range(ends.size):
        node = 1 + data[start]
        for k in range(start + 1, ends[t]):
            child = first[node]
            while child != 0 and label[child] != data[k]:
                child = sibling[child]
            if child == 0:
                child = count
                count += 1
                label[child] = data[k]
                sibling[child] = first[node]
                first[node] = child
            node = child
        token[node] = t
        start = ends[t]
    return first[:count], sibling[:count], label[:count], token[:count]


@njit(cache=True)
def _place(first, sibling, label):
    """The base of every node (0 = no children), first fit, and the number of slots.

    Nodes with several children go first; only children fill the holes that remain. A search leaves a region behind once
    half of it is taken: otherwise it would be quadratic.
    """
    count = first.size
    taken = np.zeros(512 * 256 + 4 * count, np.bool_)
    base_taken = np.zeros(taken.size, np.bool_)
    base = np.zeros(count, np.int32)
    taken[:256] = True
    slots = 256
    for only_child in (False, True):
        start = 256
        for node in range(1, count):
            child = first[node]
            if child == 0 or (sibling[child] == 0) != only_child:
                continue
            position = start
            full = 0
            while True:
                here = position - label[child]
                if taken[position]:
                    full += 1
                elif not base_taken[here]:
                    other = sibling[child]
                    while other != 0 and not taken[here + label[other]]:
                        other = sibling[other]
                    if other == 0:
                        break
                position += 1
            base[node] = here
            base_taken[here] = True
            while child != 0:
                taken[here + label[child]] = True
                slots = max(slots, here + label[child] + 1)
                child = sibling[child]
            if position - start > 64 and 2 * full >= position - start:
                start = position
            while taken[start]:
                start += 1
    return base, slots


@njit(cache=True)
def _fill(first, sibling, label, token, base, ids, slots):
    # 256 slots more than used: a walk may look at base + byte for any byte
    entries = np.zeros(slots + 256, np.uint32)
    values = np.zeros(slots + 256, ids.dtype)
    slot = np.zeros(first.size, np.int32)
    slot[1:257] = np.arange(256)
    for node in range(1, first.size):
        child = first[node]
        while child != 0:
            slot[child] = base[node] + label[child]
            child = sibling[child]
    for node in range(1, first.size):
        entry = np.uint32(label[node]) + np.uint32(1) | np.uint32(base[node]) << BASE
        if token[node] >= 0:
            entry |= TOKEN
            values[slot[node]] = ids[token[node]]
        entries[slot[node]] = entry
    return entries, values


@njit(cache=True, nogil=True)
def encode(entries, values, data, ends, stop, end_of_document, out, sizes):
    """Encode documents that lie back to back, each by the longest token that matches at every position.

    Args:
        entries, values: the trie from `build`.
        data: uint8, the bytes of all documents.
        ends: int64 (documents), where each ends in `data`.
        stop: no token is begun at or after this byte (the length of `data`, or less when more text will follow).
        end_of_document: id written after each document, or -1 for none.
        out: written, dtype of `values`, room for one id a byte and one a document.
        sizes: int32 (documents), written: ids of each document.

    Returns:
        The byte after the last token; ``-1 - position`` where no token matches.
    """
    position = np.uint64(0)
    count = 0
    for document in range(ends.size):
        begun = count
        end = np.uint64(ends[document])
        limit = min(end, np.uint64(stop))
        while position < limit:
            slot = np.uint64(data[position])
            entry = entries[slot]
            best = slot
            matched = np.uint64(0)
            if entry & TOKEN:
                matched = position + np.uint64(1)
            ahead = position + np.uint64(1)
            while ahead < end:
                base = entry >> BASE
                if base == 0:
                    break
                byte = data[ahead]
                slot = np.uint64(base) + np.uint64(byte)
                entry = entries[slot]
                if entry & LABEL != np.uint32(byte) + np.uint32(1):
                    break
                ahead += np.uint64(1)
                if entry & TOKEN:
                    best = slot
                    matched = ahead
            if matched == 0:
                return -1 - np.int64(position)
            out[count] = values[best]
            count += 1
            position = matched
        if end_of_document >= 0:
            out[count] = end_of_document
            count += 1
        sizes[document] = count - begun
    return np.int64(position)
