"""Devices by name, and GPUs shared out between jobs."""

import pytest
import torch

from cospadi import devices
from cospadi.errors import UserError


def test_names():
    assert devices.pick("cpu", "calibration.device") == torch.device("cpu")
    with pytest.raises(UserError, match=r"calibration\.device=gpu is not a device"):
        devices.pick("gpu", "calibration.device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu():
    assert devices.pick("auto", "evaluation.device") == torch.device("cpu")
    with pytest.raises(UserError, match=r"evaluation\.device=cuda is set, but torch sees 0 CUDA GPUs"):
        devices.pick("cuda", "evaluation.device")


def test_jobs_take_different_gpus_until_all_are_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_identity", lambda index: f"card-{index}")
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    jobs = []
    for _ in range(3):  # a fresh memory is what another process has; locks are held by descriptors, not by processes
        monkeypatch.setattr(devices, "_HELD", {})
        jobs.append((devices.pick("auto", "x"), devices._HELD))
        assert devices.pick("auto", "x") == jobs[-1][0], "a job stays on its GPU"
    assert [str(device) for device, _ in jobs] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [len(held) for _, held in jobs] == [1, 1, 0]
    with pytest.raises(UserError, match="cuda:2 is set, but torch sees 2"):
        devices.pick("cuda:2", "factorization.device")
    for _, held in jobs:
        for descriptor in held.values():
            devices.os.close(descriptor)
