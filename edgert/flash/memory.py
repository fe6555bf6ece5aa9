"""Memory that parts of a file are read into."""

import mmap
from contextlib import suppress


def large_pages(nbytes: int) -> mmap.mmap:
    """Zeros in large pages, where the system has them; they become resident as they are touched.

    Private, as shared memory gets small ones where Linux's `shmem_enabled` is "never", its default. One
    thread reads whole matrices 1.15 times as fast from large pages (docs/speed.md), on a busy machine 1.35.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A child of a fork would share private pages until either writes, and what a disk then writes into them
    # by itself could reach the wrong one.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            with suppress(OSError):  # a kernel that was built without it
                memory.madvise(getattr(mmap, advice))
    return memory
