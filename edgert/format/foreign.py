"""Files that are not .ert files at all: what they are, and what to do with them."""

import errno
import os
import stat
from pathlib import Path
from typing import Final

from edgert.errors import NotAModelError
from edgert.format.header import LENGTH_BYTES, MAX_HEADER, Blob

CONVERT: Final = "convert it first: edgert convert {source} -o OUT.ert"

# First bytes of what people pass by mistake, and whether `edgert convert` reads it.
_MAGICS: Final[tuple[tuple[bytes, str, bool], ...]] = (
    (b"GGUF", "a GGUF file", True),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint", False),
    (b"\x80\x02", "a Python pickle", False),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", False),
    (b"\x1f\x8b", "a gzip archive", False),
    (b"\x89HDF", "an HDF5 file", False),
)
_NOT_READ: Final = "pass an .ert file, or convert the model's folder: edgert convert FOLDER -o OUT.ert"


def open_regular(path: Path) -> int:
    """A descriptor of a regular, non-empty file; NotAModelError for anything else."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise _folder(path)
        if not stat.S_ISREG(status.st_mode):
            raise NotAModelError("found neither a file nor a folder, expected an .ert file")
        if status.st_size == 0:
            raise NotAModelError("found an empty file, expected an .ert file; copy or convert it again")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except ValueError as error:
        raise NotAModelError(f"found no path ({error}), expected the path of an .ert file") from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotAModelError("found no such file, expected an .ert file; check the path") from None
        raise NotAModelError(f"cannot be read ({error.strerror}); check the path and its rights") from None


def reject_foreign(blob: Blob, path: Path) -> None:
    """Raise NotAModelError for contents that are not those of a safetensors file, damaged or not."""
    for magic, what, readable in _MAGICS:
        if blob[: len(magic)] == magic:
            advice = CONVERT.format(source=path) if readable else _NOT_READ
            raise NotAModelError(f"found {what}, expected an .ert file; {advice}")
    if len(blob) <= LENGTH_BYTES:
        return  # too short to tell: rules F01 and F02 say it better
    length = int.from_bytes(blob[:LENGTH_BYTES], "little")
    if length > MAX_HEADER and blob[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        advice = CONVERT.format(source=path) if path.suffix == ".onnx" else _NOT_READ
        raise NotAModelError(
            f"found bytes that are not a safetensors header, expected an .ert file; {advice}"
        )


def plain_safetensors(path: Path) -> NotAModelError:
    """The error for a safetensors file that is not an edgert one."""
    advice = CONVERT.format(source=path.parent)
    return NotAModelError(
        f"found a safetensors file without edgert's metadata, expected an .ert file; "
        f"if it belongs to a Hugging Face folder, {advice}"
    )


def _folder(path: Path) -> NotAModelError:
    if (path / "config.json").is_file():
        return NotAModelError(
            f"found a Hugging Face folder, expected an .ert file; {CONVERT.format(source=path)}"
        )
    return NotAModelError("found a folder, expected an .ert file; name the file in it")
