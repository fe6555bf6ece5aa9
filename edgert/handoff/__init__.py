"""Answer locally when sure, hand over when not: early exits, and the cloud half (docs/handoff.md).

The modules of the wire (`link`, `service`, `server`, ...) need the extra `cloud`; nothing here imports
them before a cloud is asked for.
"""
