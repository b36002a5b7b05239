"""The command line: what is installed, how the native library is there, what cache directories hold, and their care.

The exit status is 0, or 1 where something is wrong with what was looked at, or 2 where it could not be looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from torchcache._native import build, ops
from torchcache._version import __version__
from torchcache.cli import maintenance
from torchcache.cli.export import export
from torchcache.cli.maintenance import Damage, Summary
from torchcache.cli.progress import Progress, byte_progress
from torchcache.errors import MaintenanceError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the result is the exit status."""
    chosen = _parser().parse_args(arguments)
    if chosen.command is None:
        return report()
    try:
        status: int = _COMMANDS[chosen.command](chosen)
        return status
    except (MaintenanceError, ImportError, OSError) as error:
        print(f"torchcache: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("torchcache: stopped; nothing is lost", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchcache",
        description="Looks after cache directories. Without a command: says what is installed and how the native "
        "library is there.",
    )
    parser.add_argument("--version", action="version", version=f"torchcache {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str, json: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("directory", metavar="DIR", type=Path, help="a persistent_cache_dir, or a folder in it")
        if json:
            added.add_argument("--json", action="store_true", help="for machines")
        return added

    command("ls", "Lists the folders: module hash, class, rows, bytes, when last written.", json=True)
    command("stat", "Shows layouts, codecs, segments and duplicates.", json=True)
    command("verify", "Checks every checksum. The exit status is 1 if something is damaged.", json=True)
    command("compact", "Makes few segments of many, without duplicates and damage, while others read and write.")
    prune = command("prune", "Removes segments that a rule names, the oldest first.")
    prune.add_argument("--older-than", type=_age, metavar="AGE", help="last written so long ago: 30d, 12h, 2w")
    prune.add_argument("--max-bytes", type=_size, metavar="N", help="until so much is left: 50e9, 50GB, 40GiB")
    prune.add_argument("--module-hash", metavar="H", help="of this folder only; alone: all of it")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    command("export", "Writes keys and rows of one folder to a safetensors file.").add_argument(
        "file", metavar="FILE", type=Path
    )
    return parser


def _age(text: str) -> float:
    """Seconds of an age such as 30d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"an age is a number and s, m, h, d or w, such as 30d; got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def _size(text: str) -> int:
    """Bytes of a size such as 50e9, 50GB or 40GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([kmgt]?i?)b?", text.lower())
    unit = None if match is None else (_UNITS | _BINARY).get(match[2])
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"a size is a number of bytes such as 50e9, 50GB or 40GiB; got {text!r}")
    return int(float(match[1]) * unit)


# ---- the commands


def _ls(chosen: argparse.Namespace) -> int:
    found = [maintenance.summarize(path) for path in maintenance.stores(chosen.directory)]
    if chosen.json:
        return _print_json([_as_json(summary) for summary in found])
    rows = [(s.module_hash, s.module, f"{s.rows:,}", _bytes(s.bytes), _date(s.modified)) for s in found]
    _print_table(("module hash", "class", "rows", "bytes", "last written"), rows)
    return 0


def _stat(chosen: argparse.Namespace) -> int:
    found = [maintenance.summarize(path) for path in maintenance.stores(chosen.directory)]
    if chosen.json:
        return _print_json([_as_json(s) | _details(s) for s in found])
    for summary in found:
        _print_summary(summary)
    return 0


def _print_summary(summary: Summary) -> None:
    print(f"module hash   {summary.module_hash}")
    print(f"class         {summary.module}")
    print(f"last written  {_date(summary.modified)}")
    print(f"bytes         {_bytes(summary.bytes)}")
    print(f"rows          {summary.rows:,}, {maintenance.duplicates(summary):,} of them duplicates\n")
    groups = [(f"{g.rows:,}", _bytes(g.bytes), g.codec, _bytes(g.stored_bytes), g.layout) for g in summary.groups()]
    _print_table(("rows", "bytes", "codec", "stored", "layout"), groups)
    print()
    segments = [
        (s.name, s.state, f"{s.rows:,}", str(s.blocks), _bytes(s.all_bytes), _date(s.modified))
        for s in summary.segments
    ]
    _print_table(("segment", "state", "rows", "blocks", "bytes", "last written"), segments)
    print()


def _verify(chosen: argparse.Namespace) -> int:
    paths = [path for store in maintenance.stores(chosen.directory) for path in maintenance.segments(store)]
    results: list[dict[str, Any]] = []
    with byte_progress("verify", sum(path.stat().st_size for path in paths)) as progress:
        for path in paths:
            results.append(_verified(path, progress))
    bad = [result for result in results if result["damage"] or result["error"]]
    rows = sum(result["rows"] for result in results)
    if chosen.json:
        _print_json({"segments": len(paths), "rows": rows, "damaged": bad})
    else:
        for result in bad:
            folder = Path(result["directory"])
            for damage in result["damage"]:
                print(f"damaged: {folder / str(Damage(**damage))}")
            if result["error"]:
                print(f"damaged: {result['error']}")
        print(f"{rows:,} rows in {len(paths):,} segments: {len(bad) or 'none'} damaged")
    return 1 if bad else 0


def _verified(path: Path, progress: Progress) -> dict[str, Any]:
    """What is damaged; a segment that cannot be read is, one that a compaction has removed meanwhile is not."""
    rows, damage, error = 0, list[Damage](), None
    try:
        rows, damage = maintenance.verify(path, progress)
    except MaintenanceError as problem:
        error = str(problem) if path.exists() else None
    found = [dataclasses.asdict(d) for d in damage]
    return {"directory": str(path.parent), "segment": path.name, "rows": rows, "damage": found, "error": error}


def _compact(chosen: argparse.Namespace) -> int:
    for directory in maintenance.stores(chosen.directory):
        total = sum(path.stat().st_size for path in maintenance.segments(directory))
        with byte_progress(f"compact {directory.name}", total) as progress:
            done = maintenance.compact(directory, progress)
        print(
            f"{directory.name}: {done.removed:,} segments became {done.written:,}; {done.rows:,} rows kept, "
            f"{done.duplicates:,} duplicates and {done.damaged:,} damaged left out"
            + (f"; {done.left:,} segments are still written and were left" if done.left else "")
        )
    return 0


def _prune(chosen: argparse.Namespace) -> int:
    if chosen.older_than is None and chosen.max_bytes is None and chosen.module_hash is None:
        raise MaintenanceError("nothing says what to remove: give --older-than, --max-bytes or --module-hash")
    found = [maintenance.summarize(path) for path in maintenance.stores(chosen.directory)]
    if chosen.module_hash is not None:
        known = ", ".join(summary.module_hash for summary in found)
        found = [summary for summary in found if summary.module_hash == chosen.module_hash]
        if not found:
            raise MaintenanceError(f"no folder is named {chosen.module_hash!r}; there are: {known}")
    segments = maintenance.prunable(found, chosen.older_than, chosen.max_bytes)
    busy = sum(segment.state == "written" for summary in found for segment in summary.segments)
    if busy:
        print(f"{busy:,} segments are still written and stay")
    if not segments:
        print("nothing to remove")
        return 0
    rows, size = sum(s.rows for _, s in segments), sum(s.all_bytes for _, s in segments)
    if not chosen.yes and not _agreed(f"Remove {rows:,} rows, {len(segments):,} segments, {_bytes(size)}?"):
        print("nothing was removed")
        return 1
    removed, freed = maintenance.prune(segments)
    print(f"removed {removed:,} segments, {_bytes(freed)}")
    return 0


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise MaintenanceError(f"{question} There is nobody to ask: add --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _export(chosen: argparse.Namespace) -> int:
    found = maintenance.stores(chosen.directory)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise MaintenanceError(f"{str(chosen.directory)!r} has {len(found)} folders with rows ({names}): name one")
    with byte_progress("export", maintenance.summarize(found[0]).bytes) as progress:
        rows = export(found[0], chosen.file, progress)
    print(f"{rows:,} rows in {chosen.file}")
    return 0


_COMMANDS = {"ls": _ls, "stat": _stat, "verify": _verify, "compact": _compact, "prune": _prune, "export": _export}


# ---- what is shown


def _as_json(summary: Summary) -> dict[str, Any]:
    return {
        "directory": str(summary.directory),
        "module_hash": summary.module_hash,
        "class": summary.module,
        "rows": summary.rows,
        "bytes": summary.bytes,
        "segments": len(summary.segments),
        "modified": summary.modified,
    }


def _details(summary: Summary) -> dict[str, Any]:
    segments = [dataclasses.asdict(segment) for segment in summary.segments]
    for segment in segments:
        del segment["groups"]
    layouts = [dataclasses.asdict(group) for group in summary.groups()]
    return {"duplicates": maintenance.duplicates(summary), "layouts": layouts, "segments": segments}


def _print_json(value: object) -> int:
    print(json.dumps(value, indent=1))
    return 0


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _bytes(n: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n} B"


def _date(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


# ---- what is installed
def report() -> int:
    """Prints versions, the state of the native library and where it is."""
    print(f"torchcache  {__version__} in {Path(__file__).parents[1]}")
    print(f"python      {platform.python_version()}")
    print(f"torch       {torch.__version__}")
    state, status = library_state()
    print(f"library     {state}")
    if not status:
        print(f"cuda        {_cuda()}")
    if clash := build.clash(_source()):
        print(f"warning: {clash}")
    return status


def library_state() -> tuple[str, int]:
    """How the native library is there, and the exit status; compiles it if that is still to do."""
    try:
        path = build.library()
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except (ImportError, OSError) as error:
        return f"missing: {error}", 1
    return f"{'compiled ahead' if path == build.ahead() else 'compiled on first use'}: {path}", 0


def _cuda() -> str:
    """Which GPUs the native library has code for."""
    built = ", ".join(f"{number / 100:.1f}" for number in ops.cuda_architectures())
    if not built:
        return "not built in"
    return f"built in for compute capability {built}"


def _source() -> str:
    """What to give to pip to install the same torchcache again."""
    try:
        recorded = importlib.metadata.distribution("torchcache").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        recorded = None
    url = urlparse(json.loads(recorded)["url"] if recorded else "")
    return unquote(url.path) if url.scheme == "file" else "the folder of torchcache's sources"
