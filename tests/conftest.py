"""How the tests run: hypothesis needs no network, no clock and no memory of earlier runs."""

import os

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
