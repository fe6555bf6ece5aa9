"""How this machine's products are best cut: what `edgert warmup` found, kept beside the machine code.

The folder is that of one CPU and one state of the kernels (kernels/jit.py), so what it says is never stale.
"""

import json
import logging
from contextlib import suppress
from dataclasses import asdict

from edgert.config import Tiling
from edgert.kernels import jit

MOST = (8, 4, 2)
AHEAD = (64, 16, 128, 0)
UNIT_BYTES = (1 << 16, 1 << 14, 1 << 15, 1 << 17, 1 << 18)
"""What is tried of each field of a Tiling, its default first; nothing else is accepted from the file."""

_NAME = "tiling.json"
_log = logging.getLogger("edgert.tiling")


def kept() -> Tiling | None:
    """What was found on this machine; None where nothing was."""
    folder = jit.cache_folder() if jit.JIT else None
    if folder is None or not (folder / _NAME).is_file():
        return None
    try:
        found = Tiling(**json.loads((folder / _NAME).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        _log.warning("%s is not used: %s; `edgert warmup` writes it anew", folder / _NAME, error)
        return None
    if found.most in MOST and found.ahead in AHEAD and found.unit_bytes in UNIT_BYTES:
        return found
    _log.warning("%s is not used: it holds %s; `edgert warmup` writes it anew", folder / _NAME, found)
    return None


def keep(tiling: Tiling) -> None:
    """Remember it for later runs, where there is a cache folder at all."""
    folder = jit.cache_folder()
    if folder is not None:
        with suppress(OSError):  # a full or read-only disk: found again by the next warmup
            temporary = folder / f".{_NAME}"
            temporary.write_text(json.dumps(asdict(tiling)), encoding="utf-8")
            temporary.replace(folder / _NAME)


def described(tiling: Tiling) -> str:
    """One line for people."""
    return (
        f"up to {tiling.most} rows in a tile, {tiling.ahead} records prefetched, "
        f"units of {tiling.unit_bytes >> 10} KiB"
    )
