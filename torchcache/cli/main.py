"""The command line: reports what is installed, and inspects, verifies, compacts, prunes and exports cache directories.

Exit status: 0, success; 1, something is damaged, missing or was not confirmed; 2, the command failed.
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

from torchcache import Verification
from torchcache._native import build, ops
from torchcache._version import __version__
from torchcache.cli import inspection, maintenance
from torchcache.cli.export import export
from torchcache.cli.inspection import Damage, Summary
from torchcache.cli.progress import Progress, byte_progress
from torchcache.cli.recompute import recompute
from torchcache.errors import MaintenanceError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: None: those of the process.

    Returns:
        The exit status.
    """
    args = _parser().parse_args(arguments)
    if args.command is None:
        return report()
    try:
        status: int = _COMMANDS[args.command](args)
        return status
    except (MaintenanceError, ImportError, OSError) as error:
        print(f"torchcache: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("torchcache: interrupted; no rows are lost", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchcache",
        description="Maintains cache directories. Without a command: reports what is installed and the state of the "
        "native library.",
    )
    parser.add_argument("--version", action="version", version=f"torchcache {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str, json: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("directory", metavar="DIR", type=Path, help="a persistent_cache_dir, or a folder in it")
        if json:
            added.add_argument("--json", action="store_true", help="print JSON")
        return added

    command("ls", "Lists the folders: module hash, class, rows, bytes, when last written.", json=True)
    command("stat", "Shows layouts, codecs, segments and duplicates.", json=True)
    verify = command(
        "verify", "Checks every checksum. The exit status is 1 if something is damaged or wrong.", json=True
    )
    verify.add_argument(
        "--recompute",
        metavar="MODULE:FACTORY",
        help="also compute rows and compare them with the stored ones; FACTORY() returns a cached module and batches",
    )
    command("compact", "Rewrites many segments into few, without duplicates and damage, while other processes go on.")
    prune = command("prune", "Removes segments that match a rule, the oldest first.")
    prune.add_argument("--older-than", type=_age, metavar="AGE", help="last written longer ago than this: 30d, 12h, 2w")
    prune.add_argument(
        "--max-bytes", type=_size, metavar="N", help="until at most this size remains: 50e9, 50GB, 40GiB"
    )
    prune.add_argument("--module-hash", metavar="H", help="only in this folder; without another rule: all of it")
    prune.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    command("export", "Writes keys and rows of one folder to a safetensors file.").add_argument(
        "file", metavar="FILE", type=Path
    )
    return parser


def _age(text: str) -> float:
    """An age such as 30d, in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"an age must be a number and s, m, h, d or w, such as 30d; got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def _size(text: str) -> int:
    """A size such as 50e9, 50GB or 40GiB, in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([kmgt]?i?)b?", text.lower())
    unit = None if match is None else (_UNITS | _BINARY).get(match[2])
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"a size must be a number of bytes such as 50e9, 50GB or 40GiB; got {text!r}")
    return int(float(match[1]) * unit)


# ---- the commands


def _ls(args: argparse.Namespace) -> int:
    summaries = _summaries(args)
    if args.json:
        return _print_json([_as_json(summary) for summary in summaries])
    rows = [(s.module_hash, s.module, f"{s.rows:,}", _bytes(s.bytes), _date(s.modified)) for s in summaries]
    _print_table(("module hash", "class", "rows", "bytes", "last written"), rows)
    return 0


def _summaries(args: argparse.Namespace) -> list[Summary]:
    return [inspection.summarize(path) for path in inspection.stores(args.directory)]


def _stat(args: argparse.Namespace) -> int:
    summaries = _summaries(args)
    if args.json:
        return _print_json([_as_json(s) | _details(s) for s in summaries])
    for summary in summaries:
        _print_summary(summary)
    return 0


def _print_summary(summary: Summary) -> None:
    print(f"module hash   {summary.module_hash}")
    print(f"class         {summary.module}")
    print(f"last written  {_date(summary.modified)}")
    print(f"bytes         {_bytes(summary.bytes)}")
    print(f"rows          {summary.rows:,}, {inspection.duplicates(summary):,} of them duplicates\n")
    groups = [(f"{g.rows:,}", _bytes(g.bytes), g.codec, _bytes(g.stored_bytes), g.layout) for g in summary.groups()]
    _print_table(("rows", "bytes", "codec", "stored", "layout"), groups)
    print()
    segments = [
        (s.name, s.state, f"{s.rows:,}", str(s.blocks), _bytes(s.all_bytes), _date(s.modified))
        for s in summary.segments
    ]
    _print_table(("segment", "state", "rows", "blocks", "bytes", "last written"), segments)
    print()


def _verify(args: argparse.Namespace) -> int:
    paths = [path for store in inspection.stores(args.directory) for path in inspection.segments(store)]
    with byte_progress("verify", sum(path.stat().st_size for path in paths)) as progress:
        results = [_verified(path, progress) for path in paths]
    bad = [result for result in results if result["damage"] or result["error"]]
    rows = sum(result["rows"] for result in results)
    compared = None if args.recompute is None else recompute(args.recompute, args.directory)
    if args.json:
        recomputed = {} if compared is None else {"recomputed": compared._asdict()}
        _print_json({"segments": len(paths), "rows": rows, "damaged": bad, **recomputed})
    else:
        _print_damage(bad)
        print(f"{rows:,} rows in {len(paths):,} segments: {len(bad) or 'none'} damaged")
        if compared is not None:
            _print_wrong(compared)
    return 1 if bad or (compared is not None and compared.wrong) else 0


def _print_wrong(compared: Verification) -> None:
    for key in compared.wrong:
        print(f"wrong: row {key}")
    print(f"recomputed: {compared}")


def _print_damage(results: list[dict[str, Any]]) -> None:
    for result in results:
        folder = Path(result["directory"])
        for damage in result["damage"]:
            print(f"damaged: {folder / str(Damage(**damage))}")
        if result["error"]:
            print(f"damaged: {result['error']}")


def _verified(path: Path, progress: Progress) -> dict[str, Any]:
    """The damage of a segment. An unreadable one is an error, one that a compaction has removed meanwhile is not."""
    rows, damage, error = 0, list[Damage](), None
    try:
        rows, damage = inspection.verify(path, progress)
    except MaintenanceError as problem:
        error = str(problem) if path.exists() else None
    damaged = [dataclasses.asdict(d) for d in damage]
    return {"directory": str(path.parent), "segment": path.name, "rows": rows, "damage": damaged, "error": error}


def _compact(args: argparse.Namespace) -> int:
    for directory in inspection.stores(args.directory):
        total = sum(path.stat().st_size for path in inspection.segments(directory))
        with byte_progress(f"compact {directory.name}", total) as progress:
            done = maintenance.compact(directory, progress)
        print(
            f"{directory.name}: {done.removed:,} segments became {done.written:,}; {done.rows:,} rows copied, "
            f"{done.duplicates:,} duplicates and {done.damaged:,} damaged rows dropped"
            + (f"; {done.left:,} segments stay because a process may still write them" if done.left else "")
        )
    return 0


def _prune(args: argparse.Namespace) -> int:
    if args.older_than is None and args.max_bytes is None and args.module_hash is None:
        raise MaintenanceError("no rule says what to remove: add --older-than, --max-bytes or --module-hash")
    summaries = _summaries(args)
    if args.module_hash is not None:
        summaries = [_named(summaries, args.module_hash)]
    segments = maintenance.prunable(summaries, args.older_than, args.max_bytes)
    busy = sum(segment.state == "written" for summary in summaries for segment in summary.segments)
    if busy:
        print(f"{busy:,} segments stay because a process may still write them")
    if not segments:
        print("nothing to remove")
        return 0
    rows, size = sum(s.rows for _, s in segments), sum(s.all_bytes for _, s in segments)
    if not args.yes and not _is_confirmed(f"Remove {rows:,} rows, {len(segments):,} segments, {_bytes(size)}?"):
        print("nothing was removed")
        return 1
    removed, freed = maintenance.prune(segments)
    print(f"removed {removed:,} segments, {_bytes(freed)}")
    return 0


def _named(summaries: list[Summary], module_hash: str) -> Summary:
    for summary in summaries:
        if summary.module_hash == module_hash:
            return summary
    names = ", ".join(summary.module_hash for summary in summaries)
    raise MaintenanceError(f"no folder is named {module_hash!r}: name one of {names}")


def _is_confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise MaintenanceError(f"{question} Standard input is not a terminal, so nobody can answer: add --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _export(args: argparse.Namespace) -> int:
    folders = inspection.stores(args.directory)
    if len(folders) != 1:
        names = ", ".join(path.name for path in folders) or "none"
        raise MaintenanceError(f"{str(args.directory)!r} has {len(folders)} folders with rows ({names}): name one")
    with byte_progress("export", inspection.summarize(folders[0]).bytes) as progress:
        rows = export(folders[0], args.file, progress)
    print(f"{rows:,} rows in {args.file}")
    return 0


_COMMANDS = {"ls": _ls, "stat": _stat, "verify": _verify, "compact": _compact, "prune": _prune, "export": _export}


# ---- output


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
    return {"duplicates": inspection.duplicates(summary), "layouts": layouts, "segments": segments}


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


# ---- the report


def report() -> int:
    """Prints versions, and the state and path of the native library.

    Returns:
        The exit status.
    """
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
    """Loads the native library, compiling it if necessary.

    Returns:
        In words whether and where it is, and the exit status.
    """
    try:
        path = build.library()
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except (ImportError, OSError) as error:
        return f"missing: {error}", 1
    return f"{'compiled ahead' if path == build.ahead() else 'compiled on first use'}: {path}", 0


def _cuda() -> str:
    """The compute capabilities that the native library has code for, in words."""
    built = ", ".join(f"{number / 100:.1f}" for number in ops.cuda_architectures())
    if not built:
        return "not built in"
    return f"built in for compute capability {built}"


def _source() -> str:
    """The argument of pip that installs the same torchcache again."""
    try:
        recorded = importlib.metadata.distribution("torchcache").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        recorded = None
    url = urlparse(json.loads(recorded)["url"] if recorded else "")
    return unquote(url.path) if url.scheme == "file" else "the folder of torchcache's sources"
