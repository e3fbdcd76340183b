"""Pack codes into words of 32 bits as most engines do: one little-endian bit stream per row.

Code i of a row has the bits ``i * bits`` to ``(i + 1) * bits - 1`` of the stream, lowest bit first. Bit k of the stream
is bit ``k % 32`` of word ``k // 32``, so that a code may be in two words. Quantized folders of quantrature have another
layout (:func:`quantrature.ops.pack`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_CODES_AT_A_TIME = 1 << 22
"""Bounds the memory for single bits, which take a byte each meanwhile."""


def words_in_row(cols: int, bits: int) -> int:
    """Number of words that a row of ``cols`` codes takes; the last one may be partly unused."""
    return -(-cols * bits // 32)


def pack_words(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Pack codes, (rows, cols), each below ``2**bits``; returns (rows, :func:`words_in_row`)."""
    rows, cols = codes.shape
    words = np.zeros((rows, words_in_row(cols, bits)), dtype="<u4")
    for block in _blocks(rows, cols):
        single = np.unpackbits(codes[block, :, None], axis=2, count=bits, bitorder="little")
        packed = np.packbits(single.reshape(len(single), -1), axis=1, bitorder="little")
        words.view(np.uint8)[block, : packed.shape[1]] = packed
    return words


def unpack_words(words: npt.NDArray[np.uint32], bits: int, cols: int) -> npt.NDArray[np.uint8]:
    """Unpack ``cols`` codes of each row; the reverse of :func:`pack_words`.

    Raises:
        ValueError: if the rows are not as long as so many codes are.
    """
    rows = len(words)
    if bits not in range(1, 9) or words.shape != (rows, words_in_row(cols, bits)):
        raise ValueError(f"codes of {bits} bits for {cols} columns do not take words of shape {words.shape}")
    packed = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    codes = np.empty((rows, cols), dtype=np.uint8)
    for block in _blocks(rows, cols):
        single = np.unpackbits(packed[block], axis=1, count=cols * bits, bitorder="little")
        codes[block] = np.packbits(single.reshape(len(single), cols, bits), axis=2, bitorder="little")[:, :, 0]
    return codes


def _blocks(rows: int, cols: int) -> list[slice]:
    step = max(1, _CODES_AT_A_TIME // max(1, cols))
    return [slice(begin, min(rows, begin + step)) for begin in range(0, rows, step)]
