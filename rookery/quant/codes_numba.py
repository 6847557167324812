"""The loop of `rookery.quant.codes.dequantise_native`. Importing this imports Numba."""

from __future__ import annotations

from rookery.ops.jit import outer

BLOCK = 64


@outer
def nf4(first, last, codes, points, scales, weight):
    """weight (rows, in) = points[codes] * scales (rows, blocks); codes (rows, blocks * 32) uint8, two codes a byte."""
    in_features = weight.shape[1]
    for row in range(first, last):
        for block in range(scales.shape[1]):
            scale = scales[row, block]
            begin = block * BLOCK
            end = min(begin + BLOCK, in_features)
            for byte in range(begin // 2, end // 2):
                code = codes[row, byte]
                weight[row, 2 * byte] = points[code >> 4] * scale
                weight[row, 2 * byte + 1] = points[code & 15] * scale
            if end % 2:
                weight[row, end - 1] = points[codes[row, end // 2] >> 4] * scale
