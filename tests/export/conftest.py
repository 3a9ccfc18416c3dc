"""Fixtures of the export's tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runner.model import libraries
from tests.support.adapters import TINY


@pytest.fixture(scope="module")
def stock() -> Any:
    from diffusers import FluxPipeline

    libraries.quiet()
    pipe = FluxPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
