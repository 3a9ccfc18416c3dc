"""The bundled base on the CPU."""

from __future__ import annotations

import torch

from runner.base.files import BUILTIN
from runner.model import base

BASE = base.Base(BUILTIN["builtin:tiny"], None, torch.device("cpu"), torch.float32)
