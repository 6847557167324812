"""Where this process stands among those that train together, as whatever started them says in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rookery.errors import UserError
from rookery.i18n import _

LAUNCHED = "ROOKERY_LAUNCHED"
"""Set in the environment of the processes that `rookery train --devices N` starts itself."""

FIRST_PORT, PORTS = 20_000, 20_000
"""Where ports for a run are chosen from, when its launcher names none: below those that systems give out themselves."""


@dataclass(frozen=True)
class Place:
    """One process among several."""

    launcher: str
    """For people: who started it."""
    rank: int
    world_size: int
    local_rank: int
    """Among the processes of its machine."""
    local_size: int
    address: str
    """Of the machine of rank 0."""
    port: int

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which torchrun says the same."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def find_place(env: Mapping[str, str] = os.environ) -> Place | None:
    """The place that torchrun (or a launcher that speaks like it), SLURM's srun, Open MPI, MPICH or Intel MPI gave this
    process; None when it is alone.

    Raises:
        UserError: the launcher does not say all that is needed.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        place = _torchrun(env)
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        place = _slurm(env)
    elif "OMPI_COMM_WORLD_SIZE" in env:
        place = _mpi(env, "Open MPI", "OMPI_COMM_WORLD_{}", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    elif "PMI_SIZE" in env and "PMI_RANK" in env:
        place = _mpi(env, "MPI", "PMI_{}", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    else:
        return None
    return place if place.world_size > 1 else None


def _torchrun(env: Mapping[str, str]) -> Place:
    world = int(env["WORLD_SIZE"])
    if world > 1 and not ("MASTER_ADDR" in env and "MASTER_PORT" in env):
        raise UserError(
            _("RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT: take torchrun, or unset all of them")
        )
    return Place(
        "Rookery" if LAUNCHED in env else "torchrun",
        int(env["RANK"]),
        world,
        int(env.get("LOCAL_RANK", env["RANK"])),
        int(env.get("LOCAL_WORLD_SIZE", world)),
        env.get("MASTER_ADDR", "127.0.0.1"),
        int(env.get("MASTER_PORT", FIRST_PORT)),
    )


def _slurm(env: Mapping[str, str]) -> Place:
    world, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_STEP_NUM_NODES", "1"))
    if world % nodes:
        raise UserError(
            _(
                "srun started {tasks} processes on {nodes} machines: give all of them equally many",
                tasks=world,
                nodes=nodes,
            )
        )
    hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    return Place(
        "SLURM",
        int(env["SLURM_PROCID"]),
        world,
        int(env.get("SLURM_LOCALID", "0")),
        world // nodes,
        env.get("MASTER_ADDR", first_host(hosts)),
        int(env.get("MASTER_PORT", _port(int(env.get("SLURM_JOB_ID", "0")) * 31 + int(env.get("SLURM_STEP_ID", "0"))))),
    )


def _mpi(env: Mapping[str, str], launcher: str, names: str, local_rank: str, local_size: str) -> Place:
    rank, world = int(env[names.format("RANK")]), int(env[names.format("SIZE")])
    local = int(env.get(local_size, world))
    if local < world and "MASTER_ADDR" not in env:
        raise UserError(
            _("{launcher} does not say where rank 0 runs: pass MASTER_ADDR=HOST on to every process", launcher=launcher)
        )
    return Place(
        launcher,
        rank,
        world,
        int(env.get(local_rank, rank)),
        local,
        env.get("MASTER_ADDR", "127.0.0.1"),
        # The processes of one machine have the same parent: another run beside this one has another.
        int(env.get("MASTER_PORT", _port(os.getppid() if local == world else 0))),
    )


def first_host(hosts: str) -> str:
    """The first name of a list as SLURM writes it: ``node[03-07,11],other`` -> ``node03``."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", hosts)
    if match is None:
        return hosts
    first = re.split("[-,]", match[2] or "")[0]
    return match[1] + first + (match[3] or "")


def _port(number: int) -> int:
    return FIRST_PORT + number % PORTS
