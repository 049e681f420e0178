"""Two processes train as one does: the schedule counts once per optimizer step, and both end with the same adapter."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

STEPS, HERE = 8, Path(__file__).parents[1]


def train(folder: Path, batch: int) -> None:
    """Train on `STEPS` batches of 4 rows, shared out among the processes, and save what came out."""
    from adapter.tiny import make_base, make_batches, make_ids
    from transformers import Trainer, TrainingArguments

    from dha_peft import DHACallback, DHAConfig, get_dha_model

    config = DHAConfig(head_budget=0.5, task_type="CAUSAL_LM", fusion="linear", grouping="learned")
    model = get_dha_model(make_base(), config, make_batches())
    rows = [{"input_ids": row, "labels": row} for row in make_ids(12)] * (2 * STEPS)
    args = TrainingArguments(
        str(folder / "trainer"), max_steps=STEPS, per_device_train_batch_size=batch, use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-2, seed=0, max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[DHACallback(project=False)])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "dha/step" in log and "train_loss" not in log]
    state = {name: tensor for name, tensor in model.state_dict().items() if "dha_" in name}
    plan = model.base_model.plan().to_dict()
    torch.save((logs, state, plan, args.world_size), folder / f"rank{os.environ.get('RANK', 0)}.pt")


def run(folder: Path, world: int) -> list:
    """`world` processes of this file; what each of them saved."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    place["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), place.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__)), str(folder), str(4 // world)]
    jobs = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}
        jobs.append(subprocess.Popen(command, env={**place, **own}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    errors = [job.communicate(timeout=120)[1].decode() for job in jobs]
    assert not any(job.returncode for job in jobs), errors
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_train_as_one(tmp_path):
    [(logs, state, plan, alone)] = run(tmp_path / "one", 1)
    (first, second) = run(tmp_path / "two", 2)
    assert alone == 1 and first[3] == second[3] == 2
    assert [log["dha/step"] for log in logs] == [
        1,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]  # the fusion starts anew after one step of search
    assert all(torch.equal(first[1][name], second[1][name]) for name in state)
    assert first[2] == second[2] == plan
    for theirs in (first[0], second[0]):
        assert [log["dha/step"] for log in theirs] == [log["dha/step"] for log in logs]
        for name in ("dha/fusion_loss", "dha/target", "dha/lambda1", "dha/lambda2"):
            assert [log[name] for log in theirs] == pytest.approx([log[name] for log in logs], rel=1e-3, abs=1e-6)
    for name, tensor in state.items():
        torch.testing.assert_close(first[1][name], tensor, atol=1e-3, rtol=1e-2)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
