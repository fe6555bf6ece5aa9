"""Bytes of a tensor from the file that holds it."""

from pathlib import Path

from edgert.errors import ConversionError


def read_bytes(path: Path, start: int, nbytes: int, name: str) -> bytes:
    """`nbytes` bytes of the tensor `name`, from `start` of the file.

    Opened anew each time: a model of 200 shards would need as many descriptors otherwise. Raises
    ConversionError for a file that cannot be read, or that ends before.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(nbytes)
    except OSError as error:
        raise ConversionError(
            f"{path}: cannot be read ({error.strerror}); check the file and its disk"
        ) from None
    if len(raw) != nbytes:
        raise ConversionError(
            f"{path}: found {len(raw)} bytes of {name}, expected {nbytes}; "
            "the file shrank while it was read, convert again"
        )
    return raw
