"""A fake CUDA device for an unmodified CUDA build of torch. README.md.

from tests.support import fake_cuda      # before torch is imported
device = fake_cuda.activate(devices=2)
import torch
"""

from .device import FakeDevice, activate, active

__all__ = ["FakeDevice", "activate", "active"]
