"""`rookery bench`: speed and memory of training, operations, inference and data on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from rookery.bench.machine import record
from rookery.cli.table import print_table
from rookery.errors import UserError
from rookery.i18n import _

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="Measure speed and memory on this machine, beside other programs",
)

# As everywhere in the field, --ctx_len and --ctx-len are the same.
SETTINGS = {"token_normalize_func": lambda name: name.replace("_", "-")}

VERSION = typer.Option("x070", "--version", help="x052, x060 or x070")
N_LAYER = typer.Option(None, min=1, help="Layers; every size left out is one that this machine measures quickly")
N_EMBD = typer.Option(None, min=1, help="Width")
HEAD_SIZE = typer.Option(None, min=1, help="Channels of a head")
VOCAB_SIZE = typer.Option(None, min=2, help="Token ids")
CTX_LEN = typer.Option(None, min=1, help="Tokens of a sample or prompt")
MICRO_BSZ = typer.Option(None, min=1, help="Samples of a step")
PRECISION = typer.Option(None, help="fp32, tf32, bf16 or fp16")
KERNEL = typer.Option(None, help="Back-end of the recurrence")
DEVICE = typer.Option("auto", help="cpu, cuda or auto")
THREADS = typer.Option(0, min=0, help="Threads on a CPU; 0 = as many as PyTorch takes")
ROUNDS = typer.Option(5, min=1, help="How often each thing is measured, in turns")
AGAINST = typer.Option([], metavar="NAME", help="Compare with torch, fla, rwkv, llama or pyrwkv; can be repeated")
PEAK = typer.Option(0.0, min=0, metavar="TFLOPS", help="What the device can do at most; 0 measures a product")
OUT = typer.Option(None, "--out", "-o", metavar="FILE", help="Write the record as JSON")


@app.command(context_settings=SETTINGS)
def train(
    version: str = VERSION,
    n_layer: int = N_LAYER,
    n_embd: int = N_EMBD,
    head_size: int = HEAD_SIZE,
    vocab_size: int = VOCAB_SIZE,
    ctx_len: int = CTX_LEN,
    micro_bsz: int = MICRO_BSZ,
    precision: str = PRECISION,
    kernel: str = KERNEL,
    grad_cp: bool = typer.Option(False, "--grad-cp", help="Recompute blocks in the backward pass"),
    trained: float = typer.Option(1.0, min=0.01, max=1.0, help="Share of the targets that are not masked"),
    device: str = DEVICE,
    threads: int = THREADS,
    rounds: int = ROUNDS,
    against: list[str] = AGAINST,
    peak: float = PEAK,
    out: Path = OUT,
) -> None:
    """Training steps: tokens a second, MFU, memory, and where the time goes."""
    _quiet_profiler()
    from rookery.bench import train as bench
    from rookery.bench.setting import Setting

    setting = Setting.of(
        device, threads, version=version, n_layer=n_layer, n_embd=n_embd, head_size=head_size, vocab_size=vocab_size,
        ctx_len=ctx_len, micro_bsz=micro_bsz, precision=precision, kernel=kernel, grad_cp=grad_cp, rounds=rounds,
    )  # fmt: skip
    peers, refused = _peers(against, "train", setting.device, version)
    found = bench.measure(setting, peers, peak * 1e12, trained)
    _finish("train", found | {"left out": refused}, out, _train_rows(found))
    split = found["results"]["rookery"]["split"]
    typer.echo(_("Time of a step: {parts}", parts=", ".join(f"{part} {share:.0%}" for part, share in split.items())))
    times = next(iter(found["times its products"].values()))
    typer.echo(_("A step takes {times} times its matrix products in PyTorch.", times=f"{times:.2f}"))


@app.command(context_settings=SETTINGS)
def op(
    names: list[str] = typer.Argument(
        None,
        metavar="[OP]...",
        help="wkv7, wkv6, wkv5, head, linear, mix7, token_shift, gates7, relu_square; all if left out",
    ),
    n_embd: int = N_EMBD,
    head_size: int = HEAD_SIZE,
    vocab_size: int = VOCAB_SIZE,
    ctx_len: int = CTX_LEN,
    micro_bsz: int = MICRO_BSZ,
    precision: str = PRECISION,
    kernel: str = KERNEL,
    device: str = DEVICE,
    threads: int = THREADS,
    rounds: int = ROUNDS,
    against: list[str] = AGAINST,
    out: Path = OUT,
) -> None:
    """Single operations, forward and backward: each back-end that can run here, and its errors."""
    from rookery.bench import op as bench
    from rookery.bench.setting import Setting

    unknown = [name for name in names or () if name not in bench.CASES]
    if unknown:
        raise UserError(_("{name} is none of {known}", name=unknown[0], known=", ".join(bench.CASES)))
    setting = Setting.of(
        device, threads, n_embd=n_embd, head_size=head_size, vocab_size=vocab_size, ctx_len=ctx_len,
        micro_bsz=micro_bsz, precision=precision, kernel=kernel, rounds=rounds,
    )  # fmt: skip
    peers, refused = _peers(against, "op", setting.device)
    found = bench.measure(setting, names or list(bench.CASES), peers)
    _finish("op", found | {"left out": refused}, out, _op_rows(found))
    typer.echo(_("Times: microseconds for a head and token (wkv), milliseconds (all others)."))


@app.command(context_settings=SETTINGS)
def infer(
    version: str = VERSION,
    n_layer: int = N_LAYER,
    n_embd: int = N_EMBD,
    head_size: int = HEAD_SIZE,
    vocab_size: int = VOCAB_SIZE,
    ctx_len: int = CTX_LEN,
    dtype: list[str] = typer.Option([], help="Format of the weights: fp32, bf16, fp16, int8; can be repeated"),
    device: str = DEVICE,
    threads: int = THREADS,
    rounds: int = ROUNDS,
    against: list[str] = AGAINST,
    peak: float = PEAK,
    out: Path = OUT,
) -> None:
    """Reading a prompt and decoding, of one sequence and of several."""
    from rookery.bench import infer as bench
    from rookery.bench.setting import Setting

    setting = Setting.of(
        device, threads, version=version, n_layer=n_layer, n_embd=n_embd, head_size=head_size, vocab_size=vocab_size,
        ctx_len=ctx_len, rounds=rounds,
    )  # fmt: skip
    formats = dtype or bench.usual_formats(setting)
    for name in formats:
        if name not in bench.DTYPES:
            raise UserError(_("{name} is none of {known}", name=name, known=", ".join(bench.DTYPES)))
    peers, refused = _peers(against, "infer", setting.device, version)
    found = bench.measure(setting, formats, peers, peak * 1e12)
    _finish("infer", found | {"left out": refused}, out, _infer_rows(found))


@app.command(context_settings=SETTINGS)
def data(
    megabytes: int = typer.Option(5, min=1, help="Size of the text"),
    ctx_len: int = typer.Option(1024, min=1, help="Tokens of a sample"),
    rounds: int = ROUNDS,
    against: list[str] = AGAINST,
    out: Path = OUT,
) -> None:
    """Tokenising, making binidx data, and reading samples, on one core."""
    from rookery.bench import data as bench

    peers, refused = _peers(against, "data", "cpu")
    found = bench.measure(megabytes, ctx_len, rounds, peers)
    _finish("data", found | {"left out": refused}, out, _data_rows(found))


def _quiet_profiler() -> None:
    """PyTorch's profiler tells of itself on stderr, unless this is set before PyTorch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def _peers(against: Sequence[str], benchmark: str, device: str, version: str = "x070") -> tuple[list[str], list[str]]:
    """Those that can run here; for each other one it is said why not."""
    from rookery.bench import peers

    names = [name for words in against for name in words.split(",")]
    able, refused = peers.choose(names, benchmark, device, version)
    for sentence in refused:
        typer.echo(sentence, err=True)
    return able, refused


def _finish(benchmark: str, found: dict[str, Any], out: Path | None, rows: Iterable[Sequence[str]]) -> None:
    """Print the first row as headings of the others, and write the record."""
    headings, *others = rows
    print_table(others, headings)
    content = record(benchmark, found)
    load = content["machine"]["load per core"]
    if load is not None and load > 0.7:
        typer.echo(
            _("This machine is busy (load {load} per core): trust the CPU times, not the wall times.", load=load)
        )
    if out:
        from rookery.eval import write_report

        write_report(out, content)
        typer.echo(_("Results: {path}", path=out))


def _number(value: float | None) -> str:
    """With three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _both(values: dict[str, float]) -> list[str]:
    """By wall and by CPU clock."""
    return [_number(values.get("wall")), _number(values.get("cpu"))]


def _train_rows(found: dict[str, Any]) -> list[list[str]]:
    per_second, per_cpu = _("tokens/s"), _("tokens/CPU s")
    rows = [["", per_second, per_cpu, "MFU", _("MFU by CPU time"), _("memory"), _("first loss")]]
    for name, row in found["results"].items():
        shares = [f"{row['mfu'][clock]:.1%}" if clock in row["mfu"] else "" for clock in ("wall", "cpu")]
        size = f"{row['peak bytes'] / 2**20:,.0f} MiB"
        rows.append([name, *_both(row["tokens a second"]), *shares, size, f"{row['first loss']:.4f}"])
    return rows


def _op_rows(found: dict[str, Any]) -> list[list[str]]:
    forward, both = _("forward"), _("forward and backward")
    rows = [["", "", forward, _("by CPU time"), both, _("by CPU time"), _("largest error")]]
    for name, results in found["results"].items():
        for label, row in results.items():
            if "errors" in row:
                times = [
                    _number(row[passes].get(clock, {}).get("median"))
                    for passes in ("forward", "forward and backward")
                    for clock in ("wall", "cpu")
                ]
                rows.append([name, label, *times, f"{max(row['errors'].values()):.1e}"])
    return rows


def _infer_rows(found: dict[str, Any]) -> list[list[str]]:
    per_second, per_cpu = _("tokens/s"), _("tokens/CPU s")
    rows = [["", f"{_('prompt')}: {per_second}", per_cpu, f"{_('answer')}: {per_second}", per_cpu, _("error")]]
    for name, row in found["results"].items():
        speeds = [value for what in ("prompt", "decode") for value in _both(row[what]["tokens a second"])]
        error = row["error of the logits"]
        rows.append([name, *speeds, "" if error is None else f"{error:.1e}"])
    return rows


def _data_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = [["", _("MB/s"), _("MB/CPU s"), _("times as fast, by CPU time")]]
    for name, row in found["results"].items():
        if "MB a second" in row:
            ratio = found["rookery is faster by"].get(name, {}).get("cpu")
            rows.append([name, *_both(row["MB a second"]), _number(ratio)])
    speed = found["results"]["read samples"]["tokens a second"]
    return [*rows, ["read samples", *(f"{value / 1e6:,.0f} M tokens/s" for value in speed.values()), ""]]
