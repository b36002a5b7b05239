"""How the tests run: what their markers need, and a hypothesis without network, clock and memory of earlier runs."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "torchcache",
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("torchcache"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "torchcache"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test whose marker asks for something that this machine lacks."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("this test needs root")
