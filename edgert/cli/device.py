"""`edgert probe`, `edgert doctor` and `edgert warmup`."""

import dataclasses
import json
import platform
import time
from importlib import metadata
from pathlib import Path

import click

from edgert import tiling
from edgert.cli.options import FILE, size_text
from edgert.config import Tiling
from edgert.flash.source import direct_reads
from edgert.kernels import jit, target
from edgert.planner import cores


@click.command("probe")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Most threads to try. [default: all cores]")
@click.option(
    "--file", "file", type=FILE, metavar="FILE", help="Measure how fast this large file is read too."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def probe_command(threads: int | None, file: Path | None, as_json: bool) -> None:
    """Measure this device: memory bandwidth, arithmetic, what more rows cost, and flash."""
    from edgert.devices.probe import flash_rates, probe

    flash = flash_rates(file) if file else {}
    found = probe(threads or cores())
    if as_json:
        print(json.dumps(dataclasses.asdict(found) | {"flash_gb_s": flash}))
        return
    print(f"cpu        {found.cpu}, {found.lowering}, {found.cores} threads, {size_text(found.ram_bytes)}")
    print(f"memory     {_by_threads(found.stream_gb_s)} GB/s read")
    print(f"products   {_by_threads(found.q4_gop_s)} GOP/s, q4 by int8")
    costs = ", ".join(f"{n}: {cost:.2f}" for n, cost in zip(found.rows, found.row_cost, strict=True))
    print(f"rows       {costs} (time of so many rows over that of one, one thread)")
    if flash:
        ways = ", ".join(f"{way}: {speed:.2f}" for way, speed in flash.items())
        print(f"flash      {ways} GB/s (readers x piece, of 4 MiB at random places)")


def _by_threads(values: tuple[float, ...]) -> str:
    return ", ".join(f"{n}: {value:.1f}" for n, value in enumerate(values, 1))


@click.command("doctor")
def doctor_command() -> None:
    """Say what this machine offers, and what is wrong with it."""
    lowering = target.lowering()
    print(
        f"edgert      {metadata.version('edgert')}, Python {platform.python_version()}, {platform.platform()}"
    )
    print(f"libraries   {', '.join(f'{n} {metadata.version(n)}' for n in ('numpy', 'numba', 'llvmlite'))}")
    print(f"cpu         {target.cpu_name()}, {cores()} cores for this process")
    print(f"kernels     {lowering.name} (dot product: {lowering.dot})")
    print(f"cache       {jit.cache_report()}")
    found = tiling.kept()
    whence = "the default; `edgert warmup` measures" if found is None else "measured by `edgert warmup`"
    print(f"tiling      {tiling.described(found or Tiling())} ({whence})")
    print(f"flash       {_flash()}")
    for problem in _problems():
        print(f"problem     {problem}")


def _flash() -> str:
    folder = Path.cwd()
    if direct_reads(folder):
        return f"experts are read past the page cache (O_DIRECT) from {folder}"
    return f"{folder} refuses O_DIRECT: experts read from files here go through the page cache"


def _problems() -> list[str]:
    found = []
    lowering = target.lowering()
    if not jit.JIT:
        found.append("NUMBA_DISABLE_JIT is set: everything runs in NumPy, hundreds of times slower; unset it")
    elif lowering.dot == "generic":
        found.append("no int8 dot product instruction is known for this CPU: quantised models will be slow")
    if jit.cache_folder() is None:
        found.append("compiled kernels cannot be kept (see cache): every start takes the time of `warmup`")
    return found


@click.command("warmup")
@click.option("--search/--no-search", default=True, help="Find how this machine's products are best cut.")
@click.option(
    "--export", "exported", type=FILE, metavar="FILE", help="Write the result for machines of the same CPU."
)
@click.option(
    "--import",
    "imported",
    type=FILE,
    metavar="FILE",
    help="Take in such a file first. Machine code is executed: only a file of yours.",
)
def warmup_command(search: bool, exported: Path | None, imported: Path | None) -> None:
    """Compile the kernels ahead, so that the first model starts at once, and tune them to this machine."""
    from edgert import code_cache, warmup

    began = time.perf_counter()
    if imported is not None:
        print(f"{code_cache.import_from(imported)} files of machine code taken in from {imported}")
    warmup.warm_up()
    print(f"kernels ready in {time.perf_counter() - began:.1f} s; cache: {jit.cache_report()}")
    if search and imported is None and jit.JIT:
        began, found = time.perf_counter(), warmup.search(cores())
        if found is None:
            print("tiling not searched: the machine is busy with something else; run `edgert warmup` again")
        else:
            tiling.keep(found)
            print(f"tiling found in {time.perf_counter() - began:.1f} s: {tiling.described(found)}")
    removed = code_cache.prune()
    if removed:
        print(f"{removed} old caches of machine code removed")
    if exported is not None:
        code_cache.export_to(exported)
        print(f"{exported}: for machines of this CPU, with `edgert warmup --import`")
