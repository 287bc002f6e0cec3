"""Devices by name."""

from __future__ import annotations

import torch

from pyrolvm.errors import SettingError


def resolve_device(name: str) -> str:
    """ "auto" as the device it means; `SettingError` for one that is not known or not on this machine."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise SettingError(f"device='{name}' is not known: use auto, cpu, cuda, cuda:N or mps") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        raise SettingError(f"device='{name}' is not on this machine: use device='cpu'")
    return name
