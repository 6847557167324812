"""Measuring speed and memory: training, operations, inference and data, beside other programs in the same run."""
