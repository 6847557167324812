"""Rank and world size from the environment that each launcher gives its processes."""

import pytest

from rookery.cli import run
from rookery.config.launcher import Place, find_place, first_host
from rookery.errors import UserError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a",
            "MASTER_PORT": "29500"}  # fmt: skip
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2",
         "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0"}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "a"}  # fmt: skip
INTEL_MPI = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "MASTER_ADDR": "a"}


@pytest.mark.parametrize(
    ("env", "launcher", "address"),
    [(TORCHRUN, "torchrun", "a"), (SLURM, "SLURM", "gpu07"), (OPEN_MPI, "Open MPI", "a"), (INTEL_MPI, "MPI", "a")],
)
def test_every_launcher_says_where_a_process_stands(env: dict[str, str], launcher: str, address: str) -> None:
    place = find_place(env)
    assert place is not None
    assert (place.launcher, place.address) == (launcher, address)
    assert (place.rank, place.world_size, place.local_rank, place.local_size) == (5, 8, 1, 4)
    assert find_place(place.environment) == Place("torchrun", 5, 8, 1, 4, address, place.port), (
        "what is handed on must say the same"
    )


def test_all_processes_of_a_step_find_the_same_port() -> None:
    ports = {find_place({**SLURM, "SLURM_PROCID": str(rank)}).port for rank in range(8)}  # type: ignore[union-attr]
    assert len(ports) == 1
    assert ports != {find_place({**SLURM, "SLURM_JOB_ID": "124"}).port}  # type: ignore[union-attr]


@pytest.mark.parametrize("env", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}])
def test_a_process_that_stands_alone(env: dict[str, str]) -> None:
    """The last is a batch script of SLURM, which only its `srun` multiplies."""
    assert find_place(env) is None


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({**OPEN_MPI, "MASTER_ADDR": None}, "MASTER_ADDR"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "7"}, "equally"),
    ],
)
def test_what_a_launcher_leaves_out_is_asked_for(env: dict[str, str | None], missing: str) -> None:
    with pytest.raises(UserError, match=missing):
        find_place({key: value for key, value in env.items() if value is not None})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node1", "node1"), ("node1,node2", "node1"), ("n[03-07,11],other", "n03"), ("r1n[5,7]-ib", "r1n5-ib")],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_several_machines_without_a_launcher_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--data_file", "none", "--num_nodes", "2", "--devices", "4"]) == 2
    assert "torchrun" in capsys.readouterr().err
