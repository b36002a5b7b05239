"""A process with a limit of address space (ulimit -v, -d): the memory tier takes a share and leaves the rest."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from process_harness import run

LIMIT = textwrap.dedent(
    """
    import re, resource
    from pathlib import Path

    class Wide(nn.Module):
        def forward(self, x):
            return x.repeat(1, 100)

    def limit(kind, bytes):
        field = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[kind]
        status = Path("/proc/self/status").read_text()
        used = int(re.search(field + r":\\s+(\\d+) kB", status)[1]) << 10
        resource.setrlimit(getattr(resource, kind), (used + bytes, resource.RLIM_INFINITY))

    def rows(first, count):
        return torch.arange(first, first + count).float().unsqueeze(1) + torch.arange(100.)

    torchcache()(Wide())(rows(0, 3))  # loads all that there is
    """
)


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_many_caches_with_large_limits_leave_the_program_most_of_its_address_space(tmp_path: Path, kind: str) -> None:
    script = f"""
        limit("{kind}", 1000 << 20)
        caches = [torchcache(max_memory_cache_size=100e9)(Wide()) for _ in range(8)]
        for first in range(0, 400, 100):
            for cached in caches:
                assert torch.equal(cached(rows(first, 100)), Wide()(rows(first, 100)))
        assert all(cached.cache_instance.info().memory_rows == 400 for cached in caches)
        program = torch.empty(150 << 20, dtype=torch.uint8)  # what the reservation of one cache used to take
        for cached in caches:
            assert torch.equal(cached(rows(0, 400)), Wide()(rows(0, 400)))
            assert cached.cache_instance.info().memory_hits == 400
    """
    run(tmp_path, LIMIT + textwrap.dedent(script), OMP_NUM_THREADS="1")


def test_a_process_without_address_space_computes_and_keeps_what_fits(tmp_path: Path) -> None:
    script = """
        limit("RLIMIT_AS", 1000 << 20)
        cached = torchcache(max_memory_cache_size=100e9)(Wide())
        for first in range(0, 25000, 500):  # 40 kB each: more than there is
            assert torch.equal(cached(rows(first, 500)), Wide()(rows(first, 500)))
        assert cached.cache_instance.is_memory_cache_full
        kept = cached.cache_instance.info().memory_rows
        assert 5000 < kept < 24000, kept
        assert torch.equal(cached(rows(0, 500)), Wide()(rows(0, 500)))
        assert cached.cache_instance.info().memory_hits == 500
    """
    done = run(tmp_path, LIMIT + textwrap.dedent(script), OMP_NUM_THREADS="1")
    assert "address space" in done.stderr
    assert done.stderr.count("WARNING") == 3  # that, that memory is full, and that no row was found so far


def test_without_a_limit_all_rows_have_one_chunk(tmp_path: Path) -> None:
    script = """
        cached = torchcache(max_memory_cache_size=2e9)(Wide())
        for first in range(0, 4000, 1000):
            cached(rows(first, 1000))
        assert len(cached.cache_instance.tiers().memory._contents.arenas[0]._chunks) == 1
    """
    run(tmp_path, LIMIT + textwrap.dedent(script))
