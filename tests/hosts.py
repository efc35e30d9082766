"""A host with a GPU and versions of our choice, as far as a look-up asks."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

VERSION = importlib.metadata.version


def simulate(patched: pytest.MonkeyPatch, *, torch_version: str, cuda: str, triton: str) -> None:
    """Makes torch report an H200 and these versions, and the packages' metadata this Triton."""
    patched.setattr(torch, "__version__", torch_version)
    patched.setattr(torch.version, "cuda", cuda)
    patched.setattr(torch.cuda, "is_available", lambda: True)
    patched.setattr(torch.cuda, "device_count", lambda: 1)
    patched.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patched.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    patched.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(uuid="no-such-gpu"))
    patched.setattr(importlib.metadata, "version", lambda name: triton if name == "triton" else VERSION(name))
