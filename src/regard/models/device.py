"""Devices by name."""

from __future__ import annotations

import torch

from regard.errors import ArgumentError


def device_here(device: str | torch.device) -> torch.device:
    """The device of that name. Raises ArgumentError where torch has none here, or it holds no numbers ("meta")."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ArgumentError("device", repr(str(device)), f"a device that torch has here ({reason})") from error
    if found.type == "meta":
        raise ArgumentError("device", "'meta'", "a device that torch has here (meta holds shapes only)")
    return found
