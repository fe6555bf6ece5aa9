"""What `import edgert` gives, and what it must not bring along."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgert
from edgert import errors

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "grpc", "ray", "huggingface_hub", "gguf")
NEED_TORCH = {f"edgert.training.{name}" for name in ("draft", "exits", "predictor", "run", "teacher")}
NEED_CLOUD = {
    f"edgert.handoff.{name}"
    for name in (
        *("batches", "certs", "drafted", "gateway", "handoff_pb2", "link", "metrics", "remote", "server"),
        *("service", "sessions", "transport", "wire"),
    )
}
NEED_RAY = {"edgert.handoff.cluster"}  # imported by tests/test_handoff_cluster.py
NEED_EXTRAS = NEED_TORCH | NEED_CLOUD | NEED_RAY
ONLY_INSIDE = ("kernels", "converters", "devices")


def test_public_names_are_these() -> None:
    assert edgert.__all__ == [
        "Completion",
        "EdgertError",
        "HandoffConfig",
        "Model",
        "ModelSpec",
        "QuantSpec",
        "SamplingParams",
        "Streaming",
        "TokenEvent",
        "convert",
        "load",
    ]
    shown = {name for name in vars(edgert) if not name.startswith("_")}
    modules = {name for name in shown if type(getattr(edgert, name)).__name__ == "module"}
    annotations = {"Any", "TYPE_CHECKING"}  # of the package itself, whose names are imported when first used
    assert shown - modules - annotations <= set(edgert.__all__)


def test_version_is_that_of_the_project() -> None:
    assert f'\nversion = "{edgert.__version__}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def modules_of(code: str) -> dict[str, str]:
    """Names and files of all modules that a fresh interpreter holds after running the code."""
    files = "{name: str(getattr(m, '__file__', None)) for name, m in sys.modules.items()}"
    script = f"{code}\nimport json, sys\nprint(json.dumps({files}))"
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_import_brings_no_heavy_library_and_each_module_once() -> None:
    found = modules_of("import edgert, edgert.cli.main, edgert.cli.generate")
    assert not {name for name in found if name.split(".")[0] in HEAVY}
    assert not {name for name in found if name.split(".")[0] in ONLY_INSIDE}
    files: dict[Path, str] = {}
    for name, file in found.items():
        if name.split(".")[0] == "edgert" and file.endswith(".py"):
            path = Path(file).resolve()
            assert path not in files, f"{path} is loaded as {files.get(path)} and {name}"
            files[path] = name


def test_every_module_imports_under_its_own_name() -> None:
    names = {found.name for found in pkgutil.walk_packages(edgert.__path__, "edgert.")}
    for name in names - {"edgert.__main__"} - NEED_EXTRAS:
        assert importlib.import_module(name).__name__ == name
    # In an interpreter of its own: other tests import libraries, and theirs may have such names.
    code = "\n".join(f"import {name}" for name in names - {"edgert.__main__"} - NEED_EXTRAS)
    assert not set(ONLY_INSIDE) & set(modules_of(code))


@pytest.mark.parametrize("name", sorted(NEED_TORCH))
def test_what_needs_torch_imports_where_it_is(name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert importlib.import_module(name).__name__ == name


@pytest.mark.parametrize("name", sorted(NEED_CLOUD))
def test_what_needs_grpc_imports_where_it_is(name: str) -> None:
    pytest.importorskip("grpc")
    pytest.importorskip("cryptography")
    assert importlib.import_module(name).__name__ == name


def test_error_tree_is_the_one_drawn() -> None:
    drawn = re.findall(r"\b[A-Z]\w*Error\b", errors.__doc__ or "")
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert sorted(drawn) == sorted(classes)
    assert all(issubclass(value, edgert.EdgertError) for value in classes.values())
