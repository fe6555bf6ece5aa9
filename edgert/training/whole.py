"""Files of a training, written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from edgert.errors import ConversionError


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Raise ConversionError, in one line, where what is written for `path` cannot be.

    torch says RuntimeError of a full disk, safetensors an error of its own.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise ConversionError(
            f"{path}: cannot be written ({why}); check the folder's rights and the room on its disk"
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, beside `path`: the file gets its own when the block ends well, else it goes.

    Raises ConversionError as `told`.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with told(path):
            yield unfinished
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
