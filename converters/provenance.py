"""What every converted file says about where it came from."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def provenance(source: Path) -> dict[str, str]:
    """Metadata of a file converted from `source`: its name and our version."""
    return {
        # The name only: a path would tell where the user keeps things.
        "source": source.resolve().name.encode("utf-8", "replace").decode("utf-8"),
        "converter": f"edgert {_version()}",
    }


def _version() -> str:
    try:
        return version("edgert")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
