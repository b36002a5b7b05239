"""Options are checked when they are given; each error names the value, the range and what to do."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from torchcache import torchcache

WRONG = [
    ({"zstd_compression": True}, "zstd_compression=True needs persistent=True"),
    (
        {"zstd_compression_level": 23},
        "zstd_compression_level must be between -131072 and 22, got 23",
    ),
    ({"zstd_compression_level": 3.0}, "zstd_compression_level must be between"),
    (
        {"zstd_compression_threads": 0},
        "zstd_compression_threads must be an integer between 1 and 256, got 0",
    ),
    ({"subsample_count": 0}, "subsample_count must be an integer between 1 and 2147483648, got 0"),
    ({"max_memory_cache_size": -1}, "max_memory_cache_size must be a number of bytes, 0 or more"),
    ({"max_memory_cache_size": float("nan")}, "max_memory_cache_size .* got nan"),
    (
        {"max_persistent_cache_size": "1GB"},
        "max_persistent_cache_size must be a number of bytes.* got '1GB'",
    ),
    ({"cache_dtype": torch.int8}, "cache_dtype must be a floating-point dtype .* got torch.int8"),
    ({"cache_dtype": "half"}, "cache_dtype must be a floating-point dtype .* got 'half'"),
    ({"memory_cache_device": "gpu"}, "memory_cache_device must be a device such as .* got 'gpu'"),
    ({"memory_cache_device": "meta"}, "memory_cache_device must be a device that holds data"),
    ({"verify": 2}, 'verify must be a share of the time from 0 .* to 1 .*, or "strict", got 2'),
    ({"verify": True}, "verify must be a share of the time .* got True"),
    ({"verify": float("nan")}, "verify must be a share of the time .* got nan"),
    ({"verify": "lax"}, "verify must be a share of the time .* got 'lax'"),
    ({"persistent": "yes"}, "persistent must be True or False, got 'yes'"),
    ({"enabled": 1}, "enabled must be True or False, got 1"),
    ({"frozen": None}, "frozen must be True or False, got None"),
    (
        {"persistent_cache_dir": 5},
        "persistent_cache_dir must be the path of a directory or None, got 5",
    ),
    ({"persistent_module_hash": ""}, "persistent_module_hash must be one plain file name"),
    (
        {"persistent_module_hash": "a/b"},
        "persistent_module_hash must be one plain file name .* got 'a/b'",
    ),
    ({"persistent_module_hash": ".."}, "persistent_module_hash must be one plain file name"),
    ({"persistent_module_hash": "a\0b"}, "persistent_module_hash must be one plain file name"),
    ({"persistent_module_hash": "x" * 300}, "persistent_module_hash must be one plain file name"),
    ({"persistent_module_hash": 7}, "persistent_module_hash must be one plain file name .* got 7"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(w[0])[:50] for w in WRONG])
def test_a_wrong_option_is_an_error_when_it_is_given(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchcache(**options)  # type: ignore[arg-type]


def test_a_file_in_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"persistent_cache_dir must be a directory, but .* is a file"):
        torchcache(persistent=True, persistent_cache_dir=file)


def test_the_keywords_and_defaults_are_the_documented_ones() -> None:
    documented = {
        "enabled": True,
        "memory_cache_device": "cpu",
        "subsample_count": 10000,
        "persistent": False,
        "persistent_cache_dir": None,
        "persistent_module_hash": None,
        "max_persistent_cache_size": int(10e9),
        "max_memory_cache_size": int(1e9),
        "zstd_compression": False,
        "zstd_compression_level": 3,
        "zstd_compression_threads": 1,
        "cache_dtype": None,
        "use_mmap_on_load": False,
        "frozen": False,
        "verify": 0.01,
    }
    parameters = inspect.signature(torchcache).parameters
    assert {name: parameters[name].default for name in documented} == documented
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert set(parameters) - set(documented) == {"subsample"}
