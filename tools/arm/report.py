"""Compare what both machines computed; print the result, and write it as a page of the documents.

Usage: report.py RESULTS [PAGE]. RESULTS is a folder `tools/arm64` filled. Exits with 1, and writes
no page, where a line differs.
"""

import datetime
import re
import subprocess
import sys
from pathlib import Path

DIGITS = 16
"""Of a hash in the table; whole ones are compared."""

MACHINES = ("x86_64", "arm64", "arm64-i8mm")

PAGE = """# The same bits on ARM

`tools/arm64` runs this checkout on an emulated {cpu} and on the x86-64 machine it is started on, and
compares. It unpacks the host's own Debian or Ubuntu release for arm64 (debootstrap), puts aarch64
wheels of the same versions into it, and runs its Python under qemu's user-mode emulation.
The emulator is told the CPU too, and stops at an instruction which that CPU does not have.

This page is its last result, written by `tools/arm64 --report` on {date}.

| | x86-64 | arm64, emulated |
|---|---|---|
{machines}
## Logits and tokens

{equal} lines of output, all equal: the SHA-256 of the converted file, and, for one and two threads,
the SHA-256 of all logits of a text and the tokens of a greedy continuation. The first {digits} digits
of each hash, the same on both machines:

{table}
## Instructions

Multiply instructions in the machine code of the matrix kernels; those of an ARM core with i8mm (its
emulator has every feature, the compiler is told of that one) use `smmla` for two rows and more:

| kernel | x86-64 | arm64 | arm64 with i8mm |
|---|---|---|---|
{instructions}
## Kernel tests

Compiled on the emulated CPU, compared with their NumPy twins there: {tests}.

The integer products and attention again, compiled for i8mm: {i8mm_tests}.

## Time

The arm64 fingerprint runs beside all other checks, on one core each: {times}.
"""


def main() -> int:
    """Print and perhaps write the result; 1 where the machines differ."""
    results = Path(sys.argv[1])
    ours, theirs = (_lines(results / f"{machine}-fingerprint") for machine in ("x86_64", "arm64"))
    if ours[1:] != theirs[1:]:
        _show_differences(ours[1:], theirs[1:])
        return 1
    print(f"{len(ours) - 1} lines of hashes and tokens: equal")
    for machine in MACHINES:
        print(*_lines(results / f"{machine}-instructions"), sep="\n")
    for machine in MACHINES[1:]:
        print(_tests(results, machine))
    print(_times(results))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(_page(results, ours, theirs), encoding="utf-8")
    return 0


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _show_differences(ours: list[str], theirs: list[str]) -> None:
    print(f"x86-64 gave {len(ours)} lines, arm64 {len(theirs)}; those that differ:", file=sys.stderr)
    for line in sorted({*ours} ^ {*theirs}):
        print("x86-64" if line in ours else "arm64 ", line, file=sys.stderr)


def _page(results: Path, ours: list[str], theirs: list[str]) -> str:
    machines, cpu = _machines(ours[0], theirs[0])
    counts = [_counts(results / f"{machine}-instructions") for machine in MACHINES]
    return PAGE.format(
        cpu=cpu,
        date=datetime.datetime.now(datetime.timezone.utc).date(),
        machines=machines,
        equal=len(ours) - 1,
        digits=DIGITS,
        table=_table(ours[1:]),
        instructions="".join(f"| {k} | {' | '.join(found[k] for found in counts)} |\n" for k in counts[0]),
        tests=_tests(results, "arm64"),
        i8mm_tests=_tests(results, "arm64-i8mm"),
        times=_times(results),
    )


def _machines(ours: str, theirs: str) -> tuple[str, str]:
    """The rows of the table of machines, and the name of the emulated CPU."""
    columns = [dict(word.partition("=")[::2] for word in line.split()[3:]) for line in (ours, theirs)]
    cpus = [line.split()[2] for line in (ours, theirs)]
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    emulator = subprocess.run(
        ["qemu-aarch64-static", "--version"], capture_output=True, text=True, check=True
    )
    rows = [
        ("CPU", model[1] if model else "unknown", f"qemu {emulator.stdout.split()[2]}, {cpus[1]}"),
        ("CPU to LLVM", *cpus),
        *((name, columns[0][name], columns[1][name]) for name in columns[0]),
    ]
    return "".join(f"| {name} | {x86} | {arm} |\n" for name, x86, arm in rows), cpus[1]


def _table(lines: list[str]) -> str:
    """One row per model, precision and cache; thread counts with the same result share it."""
    files: dict[str, str] = {}
    threads: dict[tuple[str, str, str, str], list[str]] = {}
    for line in lines:
        model, quant, *rest = line.split()
        values = dict(word.partition("=")[::2] for word in rest)
        if "file" in values:
            files[f"{model} {quant}"] = values["file"]
        elif "logits" in values:
            key = (f"{model} {quant}", values["kv"], values["logits"], values["tokens"])
            threads.setdefault(key, []).append(values["threads"])
    text = "| model | file | cache | threads | logits | tokens |\n|---|---|---|---|---|---|\n"
    for (label, kv, logits, tokens), counts in threads.items():
        start = " ".join(tokens.split(",")[:4])
        text += (
            f"| {label} | `{files[label][:DIGITS]}` | {kv} | {', '.join(counts)} "
            f"| `{logits[:DIGITS]}` | {start} ... ({tokens.count(',') + 1}) |\n"
        )
    return text


def _counts(path: Path) -> dict[str, str]:
    """What a kernel's line says after its name."""
    return {name: rest for name, _, rest in (line.partition(" ") for line in _lines(path)[1:])}


def _tests(results: Path, machine: str) -> str:
    """pytest's last line."""
    return _lines(results / f"{machine}-kernel-tests")[-1].strip("= ")


def _times(results: Path) -> str:
    """Seconds of each step, and of the CPU where they were measured."""
    steps = [line.split() for line in _lines(results / "times")]
    return ", ".join(f"{name} {s} s" + "".join(f" ({c} s of CPU)" for c in cpu) for name, s, *cpu in steps)


if __name__ == "__main__":
    sys.exit(main())
