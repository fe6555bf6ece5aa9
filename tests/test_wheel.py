"""The wheel holds everything that is in the repository for users, and nothing else."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The folders that hold what users get, and where each lies in the wheel: `edgert` links to the others.
SHIPPED = {
    "edgert": "edgert",
    "kernels": "edgert/kernels",
    "converters": "edgert/converters",
    "devices": "edgert/devices",
}
OLDEST_SETUPTOOLS = 77  # what [build-system] asks for


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files that git knows, relative to the root; the builder leaves files in the tree it builds from."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    done = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git cannot list the files: {done.stderr.strip()}")
    names = [Path(name) for name in done.stdout.split("\0") if name]
    return [name for name in names if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tracked: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tracked files."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    installed = int(importlib.metadata.version("setuptools").split(".")[0]) if has_setuptools() else 0
    isolation = ["--no-build-isolation"] if installed >= OLDEST_SETUPTOOLS else []
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", *isolation]
    done = subprocess.run([*command, "-w", str(built), str(source)], capture_output=True, text=True)
    if done.returncode and not isolation and "setuptools" in done.stderr:
        pytest.skip("the build needs a newer setuptools, and there is no package index to get it from")
    assert done.returncode == 0, done.stderr
    (path,) = built.glob("*.whl")
    return path


def has_setuptools() -> bool:
    try:
        importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def installed_name(name: Path) -> str | None:
    """Where a tracked file lies in the wheel; None for what is not for users."""
    top, *rest = name.parts
    if top not in SHIPPED or not rest or (ROOT / name).is_symlink():
        return None
    return "/".join([SHIPPED[top], *rest])


@pytest.mark.slow
def test_wheel_holds_every_tracked_source_and_asset(tracked: list[Path], wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        expected = {place: name for name in tracked if (place := installed_name(name))}
        assert sorted(expected.keys() - packed) == []
        assert sorted(packed - expected.keys()) == []
        for place, name in expected.items():
            assert archive.read(place) == (ROOT / name).read_bytes(), name


@pytest.mark.slow
def test_models_do_not_make_the_wheel_heavy(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        models = [entry for entry in archive.infolist() if "/assets/" in entry.filename]
        assert 0 < sum(entry.compress_size for entry in models) < 15 * 10**6


@pytest.mark.slow
def test_wheel_is_pure_python_and_has_the_command(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        points = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert "edgert = edgert.cli:main" in archive.read(points).decode()
        assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_works_on_its_own(wheel: Path, tmp_path: Path) -> None:
    """Unpacked beside nothing else of the repository; the dependencies are those of this environment."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import edgert, edgert.kernels\n"
        "print(edgert.__file__, edgert.kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.split()
    assert Path(first).is_relative_to(tmp_path) and Path(second).is_relative_to(tmp_path)
