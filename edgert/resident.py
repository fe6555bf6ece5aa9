"""How much memory this process has held."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """The most resident memory this process had, in bytes.

    Linux carries `ru_maxrss` over from the program that started this one, so there the peak of this
    process's own memory is read instead; macOS counts bytes.
    """
    if _STATUS.exists():
        text = _STATUS.read_text()
        if "VmHWM:" in text:
            return int(text.split("VmHWM:")[1].split()[0]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
