"""Why there is no GPU where one was asked for: what was looked for, and what is usually amiss."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

_DRIVER = "libcuda.so.1"
_WSL_DRIVER = Path("/usr/lib/wsl/lib") / _DRIVER
_WSL_DEVICE, _DEVICE = Path("/dev/dxg"), Path("/dev/nvidiactl")


def why_no_gpu() -> str:
    """One line: what torch.cuda was looked for with and did not find, and the remedy."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with it"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible!r}"
    wsl = "microsoft" in platform.release().lower()
    device = _WSL_DEVICE if wsl else _DEVICE
    looked = (f"looked for {_DRIVER} ({'found' if _loads(_DRIVER) else 'not found'}) and {device} "
              f"({'there' if device.exists() else 'not there'}) for CUDA {torch.version.cuda}{shown}")
    return f"{looked}; {_remedy(wsl, visible)}"


def _remedy(wsl: bool, visible: str | None) -> str:
    if visible is not None and visible.strip() in ("", "-1"):
        return "unset CUDA_VISIBLE_DEVICES, which hides all GPUs"
    if wsl and not _loads(_DRIVER):
        found = "is there" if _WSL_DRIVER.exists() else "is missing"
        return (f"under WSL the driver is Windows's and {_WSL_DRIVER} {found}: add {_WSL_DRIVER.parent} to "
                "LD_LIBRARY_PATH, install no Linux driver beside it, and update the one on Windows if it is missing")
    if wsl:
        return "under WSL update NVIDIA's driver on Windows and WSL itself (wsl --update), then restart it"
    return "see that nvidia-smi lists a GPU, and that its driver is new enough for this CUDA"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
