"""The `edgert` command: verbs, and the only reader of arguments and environment."""

from edgert.cli.main import main

__all__ = ["main"]
