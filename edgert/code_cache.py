"""Handing compiled kernels to another machine of the same CPU, and clearing out what is no longer used.

A cache of machine code is executed, so it is never taken in by itself: somebody has to ask for it, and the
file has to be theirs.
"""

import gzip
import io
import os
import re
import shutil
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

from edgert.errors import DeviceError
from edgert.kernels import jit

UNUSED_DAYS = 30
"""Age at which `prune` removes machine code: nothing compiles for so long ago and comes back."""
_MOST_BYTES = 256 << 20
"""Of an import, unpacked: a hundred times what the kernels take."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w.<>-]{0,250}")


def export_to(path: Path) -> None:
    """Write this machine's compiled kernels and tiling into one file; raises DeviceError."""
    folder = _folder()
    temporary = path.with_name(f".{path.name}.part")
    try:
        with tarfile.open(temporary, "w:gz") as archive:
            for file in sorted(folder.iterdir()):
                if _PLAIN_NAME.fullmatch(file.name):
                    archive.add(file, f"{folder.name}/{file.name}", recursive=False)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DeviceError(
            f"{path}: cannot be written ({error.strerror}); give a file in a folder of yours"
        ) from None


def import_from(path: Path) -> int:
    """Take in a file that `export_to` wrote for this very CPU; gives how many files it held.

    Raises DeviceError for a file that others could have written, that is for another CPU, or for other
    versions of edgert, Python, numba or llvmlite, and for one that is damaged. Nothing is then changed.
    """
    folder = _folder()
    try:
        refusal = jit.open_to_others(path)
        if refusal is not None:
            raise DeviceError(f"{refusal}; machine code is executed, so it must be yours alone")
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            names = _unpack(path, folder.name, Path(scratch))
            for name in names:
                (Path(scratch) / name).replace(folder / name)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DeviceError(f"{path}: damaged ({error}); copy it again from where it was exported") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DeviceError(
            f"{path}: cannot be read ({reason}); give a file of `edgert warmup --export`"
        ) from None
    return len(names)


def _unpack(path: Path, wanted: str, scratch: Path) -> list[str]:
    """The members written into `scratch`, every one checked: plain files of the wanted folder."""
    names, room = [], _MOST_BYTES
    with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            folder, _, name = member.name.partition("/")
            if folder != wanted:
                raise DeviceError(
                    f"{path}: machine code {folder[:40]!r}, expected {wanted!r}: it is for another CPU or "
                    "for other versions of edgert, Python, numba or llvmlite; export it on one like this"
                )
            room -= member.size
            if not member.isfile() or not _PLAIN_NAME.fullmatch(name) or room < 0:
                raise DeviceError(
                    f"{path}: found {member.name[:80]!r}, {member.size} bytes, expected plain files of at "
                    f"most {_MOST_BYTES >> 20} MiB together; it is no file of `edgert warmup --export`"
                )
            content = archive.extractfile(member) or io.BytesIO()
            with (scratch / name).open("xb") as file:
                shutil.copyfileobj(content, file)
            names.append(name)
        stream.read(1 << 20)  # the padding, and with the end of the stream its checksum
    return names


def prune(days: float = UNUSED_DAYS) -> int:
    """Remove machine code of other versions or CPUs that nothing used for so long; gives how much."""
    folder, removed = jit.cache_folder(), 0
    if folder is None:
        return 0
    for other in folder.parent.glob("jit-*"):
        unused = time.time() - other.stat().st_mtime > days * 86400
        if unused and other != folder and other.is_dir() and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)
            removed += 1
    os.utime(folder)
    return removed


def _folder() -> Path:
    folder = jit.cache_folder()
    if folder is None:
        raise DeviceError(f"compiled kernels are {jit.cache_report()}")
    return folder
