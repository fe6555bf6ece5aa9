"""Weights that stay on flash and are read when a token needs them, whatever they are: segments of a file."""

from edgert.flash.config import Streaming
from edgert.flash.reading import Reading
from edgert.flash.segments import Index, Key, Segment
from edgert.flash.source import FileSource, Joined, Source
from edgert.flash.store import SegmentStore
from edgert.flash.streamed import Parts, Store

__all__ = [
    "FileSource",
    "Index",
    "Joined",
    "Key",
    "Parts",
    "Reading",
    "Segment",
    "SegmentStore",
    "Source",
    "Store",
    "Streaming",
]
