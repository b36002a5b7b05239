"""Each test of torchmb draws the same numbers, whichever tests run before it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
