"""`rookery doctor`: what this machine has, which back-end serves each op, and what to install for a faster one."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from typing import Any

import typer

from rookery.bench.machine import machine, processor, version
from rookery.cli.table import print_table
from rookery.i18n import _

app = typer.Typer(rich_markup_mode=None, add_completion=False)

PACKAGES = ("torch", "numpy", "numba", "triton", "safetensors", "wandb", "tensorboard")


@app.command()
def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON")) -> None:
    """Say what this machine has, which back-end each operation will use and why, and what would make it faster."""
    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=1))
        return
    _print(facts)


def examine() -> dict[str, Any]:
    """Machine, packages, devices, the back-ends of each op on each device, and advice."""
    facts = {
        "machine": machine(),
        "packages": {name: version(name) for name in PACKAGES},
        "devices": devices(),
        "ops": back_ends(),
    }
    return facts | {"advice": advice(facts)}


def devices() -> list[dict[str, Any]]:
    """What PyTorch can compute on: name, memory in bytes, and whether bf16 is native."""
    import torch

    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": processor(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "bf16": properties.major >= 8 or torch.version.hip is not None,
            }
        )
    return found


def back_ends() -> list[dict[str, Any]]:
    """For each op, device and precision of training: the back-end that serves it, and why others cannot.

    wkv6 stands for wkv5 too, which is computed by it.
    """
    import torch

    from rookery.ops.backend import Call
    from rookery.ops.mix7 import OP as MIX7
    from rookery.ops.pointwise import RELU_SQUARE, TOKEN_SHIFT
    from rookery.ops.wkv6 import OP as WKV6
    from rookery.ops.wkv7 import OP as WKV7

    kinds = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        kinds += [("cuda", torch.bfloat16), ("cuda", torch.float32)]
    answers = []
    for op in (WKV7, WKV6, MIX7, TOKEN_SHIFT, RELU_SQUARE):
        for device, dtype in kinds:
            call = Call(device, dtype, head_size=64, dtypes=frozenset({dtype}))
            reasons = op.explain(call)
            chosen = next(name for name, reason in reasons if reason is None)
            refused = {name: reason for name, reason in reasons if reason is not None}
            precision = str(dtype).removeprefix("torch.")
            answers.append({"op": op.name, "device": device, "dtype": precision, "uses": chosen, "refused": refused})
    return answers


def advice(facts: dict[str, Any]) -> list[str]:
    """What to install for more speed, most useful first."""
    import torch

    packages, said = facts["packages"], []
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        if torch.version.cuda is None:
            said.append(
                _(
                    "There is an NVIDIA driver, but PyTorch {version} is built for the CPU: install a CUDA build "
                    "(https://pytorch.org/get-started/locally).",
                    version=packages["torch"],
                )
            )
        else:
            said.append(
                _(
                    "PyTorch is built for CUDA {cuda} but finds no GPU: the NVIDIA driver may be older than that.",
                    cuda=torch.version.cuda,
                )
            )
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        said.append(_("Install Triton for the fast GPU kernels: pip install {package}", package=package))
    if importlib.util.find_spec("numba") is None:
        said.append(_("Install Numba for the fast CPU kernels: pip install numba"))
    return said


def _print(facts: dict[str, Any]) -> None:
    own, found = facts["machine"], facts["packages"]
    table = [
        (_("system"), own["system"]),
        ("Python", own["python"]),
        (_("processor"), _("{name}, {cores} cores", name=own["processor"], cores=own["cores"])),
        (_("memory"), _gigabytes(own["memory"])),
        (_("free disk"), _gigabytes(own["free_disk"])),
        (_("packages"), ", ".join(f"{name} {number or '-'}" for name, number in found.items())),
    ]
    for device in facts["devices"]:
        about = [device["name"]]
        if "memory" in device:
            about += [_gigabytes(device["memory"]), f"compute {device['capability']}"]
            about.append("bf16" if device["bf16"] else _("no bf16"))
        else:
            about += [_("{count} threads", count=device["threads"]), device["instructions"]]
        table.append((device["device"], ", ".join(about)))
    for answer in facts["ops"]:
        label = f"{answer['op']} {answer['device']} {answer['dtype']}"
        text = _("uses {name}", name=answer["uses"])
        text += "".join(f"\n{name}: {reason}" for name, reason in answer["refused"].items())
        table.append((label, text))
    print_table(table)
    for sentence in facts["advice"]:
        typer.echo("\n" + sentence)


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:,.1f} GiB"
