"""Experts that stay on flash and are read when a token needs them: models larger than memory."""

from edgert.experts.config import Streaming
from edgert.experts.loading import open_streamed
from edgert.experts.segments import FileSegments, Segments
from edgert.experts.store import ExpertStore

__all__ = ["ExpertStore", "FileSegments", "Segments", "Streaming", "open_streamed"]
