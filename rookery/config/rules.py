"""The rules that fill in what a configuration leaves out. Pure functions of numbers; sources are named at each."""

from __future__ import annotations

from rookery.errors import UserError
from rookery.i18n import _

MINI_EPOCH = 40320
"""Samples of one mini-epoch in every reference trainer."""

WARMUP_STEPS = 10
"""Warm-up of the published RWKV-7 scripts."""

STATE_TUNING_RATES = 1.0, 0.01
"""First and last learning rate of RWKV-PEFT's published script for state tuning."""

STATE_TUNING_CTX_LEN = 512
"""Tokens of a sample in state tuning: what a state can hold is learnt from short texts."""

ADAPTER_RATES = 5e-5, 5e-5
"""First and last learning rate of the training page of RWKV Runner."""

FINE_TUNING_EPS = 1e-8
"""AdamW's epsilon in RWKV-PEFT and RWKV Runner."""

UNLIMITED_EPOCHS = 999999
"""The `epoch_count` by which the published scripts say "until my_exit_tokens"."""


def learning_rates(n_embd: int) -> tuple[float, float]:
    """First and last learning rate of pretraining: 0.45/n_embd and 0.04/n_embd, rounded to one significant digit.

    Source: the RWKV pre-training tutorial ("the formula is 0.45 / N_EMBD, rounded appropriately"; its worked example is
    0.45/768 = 5.86e-4 -> 6e-4). Its demo script ends at 6e-5, which no rounding to the nearest gives from 0.04/768 =
    5.2e-5: rounding up would, but would also double the rate of some widths (0.45/448 -> 2e-3).
    """
    return float(f"{0.45 / n_embd:.0e}"), float(f"{0.04 / n_embd:.0e}")


def adam_eps(version: str) -> float:
    """AdamW's epsilon: 1e-18 (RWKV-LM's current trainer, also recommended for x060), 1e-8 for x052."""
    return 1e-8 if version == "x052" else 1e-18


def dim_ffn(version: str, n_embd: int) -> int:
    """Width of channel mixing: 4 n_embd (x070), or 3.5 n_embd rounded down to a multiple of 32 (x052, x060)."""
    return 4 * n_embd if version == "x070" else int(n_embd * 3.5) // 32 * 32


def ranks(version: str, n_layer: int, n_embd: int, rule: str = "current") -> dict[str, int]:
    """Ranks of the low-rank layers of a new model.

    x070: keys w, a, v, g. Rule `current` is that of RWKV-LM's train_temp and RWKV-LM-V7: 2.5, 2.5, 1.7 and 5 times
    sqrt(n_embd). Rule `g1` gives the ranks of the released G1 models: 1.8, 1.8, 1.3 times sqrt(n_embd) and
    0.6 n_embd^0.8, with the exceptions of those files (g = 128 at width 1024; 192, 192, 128, 384 with 61 layers).
    Each is rounded to a multiple of 32, half to even, at least 32.

    x060: keys mix (32) and decay (64), both doubled at width 4096 as in the released 7B. x052 has none.
    """
    if version == "x052":
        return {}
    if version == "x060":
        large = n_embd == 4096
        return {"mix": 64 if large else 32, "decay": 128 if large else 64}
    root = n_embd**0.5
    if rule == "current":
        return {
            "w": _multiple_of_32(2.5 * root),
            "a": _multiple_of_32(2.5 * root),
            "v": _multiple_of_32(1.7 * root),
            "g": _multiple_of_32(5 * root),
        }
    if n_layer == 61:
        return {"w": 192, "a": 192, "v": 128, "g": 384}
    return {
        "w": _multiple_of_32(1.8 * root),
        "a": _multiple_of_32(1.8 * root),
        "v": _multiple_of_32(1.3 * root),
        "g": 128 if n_embd == 1024 else _multiple_of_32(0.6 * n_embd**0.8),
    }


def _multiple_of_32(x: float) -> int:
    return max(32, round(x / 32) * 32)


def epoch_steps(global_batch: int) -> int:
    """Optimiser steps of a mini-epoch of 40320 samples with `global_batch` samples a step.

    Raises:
        UserError: `global_batch` does not divide 40320; the nearest that do are named.
    """
    if MINI_EPOCH % global_batch:
        divisors = [d for d in range(1, MINI_EPOCH + 1) if MINI_EPOCH % d == 0]
        below = max((d for d in divisors if d < global_batch), default=divisors[0])
        above = min((d for d in divisors if d > global_batch), default=divisors[-1])
        raise UserError(
            _(
                "one optimiser step takes {batch} samples (micro_bsz x devices x num_nodes x accumulate_grad_batches / "
                "context_parallel), which does not divide the {mini_epoch} samples of a mini-epoch: make it {below} or "
                "{above}, or give epoch_steps",
                batch=global_batch,
                mini_epoch=MINI_EPOCH,
                below=below,
                above=above,
            )
        )
    return MINI_EPOCH // global_batch


def total_steps(exit_tokens: int, ctx_len: int, global_batch: int) -> int:
    """Optimiser steps that see `exit_tokens` tokens: the schedule has ended when steps x samples x ctx_len reach it."""
    return -(-exit_tokens // (ctx_len * global_batch))
