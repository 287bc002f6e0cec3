"""Devices by name."""

from __future__ import annotations

import torch

from pyrolvm.errors import SettingError


def resolve_device(name: str) -> str:
    """The device `name`, with "auto" resolved. Raises `SettingError` if it is unknown or not on this machine."""
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
