"""What is said where a GPU is asked for and none is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar import gpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a build for CUDA and nothing else."""
    monkeypatch.setattr("torch.version.cuda", "12.6")
    monkeypatch.setattr(gpu, "_loads", lambda library: False)
    monkeypatch.setattr("platform.release", lambda: "6.1.0")
    monkeypatch.setattr(gpu, "_DEVICE", Path("/nowhere/nvidiactl"))
    monkeypatch.setattr(gpu, "_WSL_DEVICE", Path("/nowhere/dxg"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_a_build_without_cuda(machine: pytest.MonkeyPatch) -> None:
    machine.setattr("torch.version.cuda", None)
    assert "is built without CUDA" in gpu.why_no_gpu()


def test_no_driver(machine: pytest.MonkeyPatch) -> None:
    said = gpu.why_no_gpu()
    assert said.startswith("looked for libcuda.so.1 (not found) and /nowhere/nvidiactl (not there) for CUDA 12.6; see")


def test_hidden(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''; unset CUDA_VISIBLE_DEVICES" in gpu.why_no_gpu()


@pytest.mark.parametrize(("loads", "said"), [(False, "add /usr/lib/wsl/lib to LD_LIBRARY_PATH"),
                                             (True, "driver on Windows and WSL itself")])
def test_windows_subsystem(machine: pytest.MonkeyPatch, loads: bool, said: str) -> None:
    machine.setattr("platform.release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    machine.setattr(gpu, "_loads", lambda library: loads)
    assert said in gpu.why_no_gpu() and "/nowhere/dxg" in gpu.why_no_gpu() and "\n" not in gpu.why_no_gpu()
