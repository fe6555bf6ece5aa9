"""Experts that stay on flash and are read when a token needs them: models larger than memory."""

from edgert.experts.loading import open_streamed
from edgert.experts.store import ExpertStore, expert_parts

__all__ = ["ExpertStore", "expert_parts", "open_streamed"]
