"""Training data: sources, binidx files, samplers and masks."""

from __future__ import annotations

from rookery.data.binidx import BinIdx, BinIdxWriter
from rookery.data.dataset import open_dataset, open_datasets
from rookery.data.make import Made, make
from rookery.data.sampler import is_prime, magic_prime, sample_offset
from rookery.data.samples import Dataset, Facts, Sample

__all__ = [
    "BinIdx",
    "BinIdxWriter",
    "Dataset",
    "Facts",
    "Made",
    "Sample",
    "is_prime",
    "magic_prime",
    "make",
    "open_dataset",
    "open_datasets",
    "sample_offset",
]
