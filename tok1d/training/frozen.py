"""Networks that are used and never trained: teachers, perceptual distances, text recognisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Frozen(dict[str, Any]):
    """A dict of networks that are out of state dict, optimizer and data parallelism, and shared by deep copies.

    A module that holds one in an attribute does not see the networks inside as its children, so nothing moves them either:
    call :meth:`on` where they are used.

    Example:
        >>> class Loss(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.frozen = Frozen(teacher=nn.Linear(2, 2))
        >>> len(list(Loss().parameters())), len(Loss().state_dict())
        (0, 0)
    """

    def __init__(self, **networks: Any) -> None:
        super().__init__()
        for name, network in networks.items():
            self[name] = network

    def __setitem__(self, name: str, network: Any) -> None:
        """A module among them is put into eval mode and gets no gradients."""
        super().__setitem__(name, network.eval().requires_grad_(False) if isinstance(network, nn.Module) else network)

    def on(self, device: torch.device | str) -> Frozen:
        """Move all of them there (for free where they are there already)."""
        for network in self.values():
            if hasattr(network, "to"):
                network.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self
