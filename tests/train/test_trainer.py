"""Lightning's trainer of a run: its processes and how they are connected."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import TINY

from dino_xcit.errors import UserError
from dino_xcit.train.checkpoints import DurableIO
from dino_xcit.train.trainer import make_trainer

SLURM = {
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_RANK": "0",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "12910",
}


def trainer_of(**options):
    return make_trainer(dataclasses.replace(TINY, **options), DurableIO())


def by_slurm(per_node: int, nodes: int = 1) -> dict[str, str]:
    tasks = str(per_node * nodes)
    return {**SLURM, "SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": str(per_node)}


def by_torchrun(processes: int) -> dict[str, str]:
    return {**TORCHRUN, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}


@pytest.mark.parametrize(
    ("environment", "devices", "nodes", "message"),
    [
        (
            by_slurm(1),
            "8",
            1,
            r"^SLURM has started 1 process, but --devices 8 and --num_nodes 1 take 8; "
            r"start as many \(srun --nodes=1 --ntasks-per-node=8\), or set --devices to .*$",
        ),
        (by_slurm(8), "1", 1, "SLURM has started 8 processes, but --devices 1 and .* take 1;"),
        (by_slurm(2), "2", 2, "SLURM has started 2 processes, but .* --num_nodes 2 take 4;"),
        (by_torchrun(2), "4", 1, r"torchrun has started 2 .* 4; .* \(torchrun --nproc-per-node=4"),
        (by_torchrun(2), "1", 1, "torchrun has started 2 processes, but --devices 1 and .* take 1"),
        ({**SLURM, "SLURM_NTASKS": "2"}, "2", 1, "Lightning refuses .* --devices 2 .*per-node=2`"),
    ],
)
def test_another_number_of_processes_than_devices_is_refused(
    environment, devices, nodes, message, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as raised:
        trainer_of(devices=devices, num_nodes=nodes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("environment", "devices", "nodes"),
    [
        ({}, "1", 1),
        ({}, "2", 1),
        ({}, "2", 2),
        (by_slurm(1), "1", 1),
        (by_slurm(2, nodes=2), "2", 2),
        (by_torchrun(2), "2", 1),
    ],
)
def test_a_process_for_each_device_is_a_trainer(environment, devices, nodes, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert trainer_of(devices=devices, num_nodes=nodes).world_size == int(devices) * nodes
