"""The one decorator that compiles kernels, and the cache their machine code is kept in.

Flags, and why: `nogil`, so that a team of threads runs; `error_model="numpy"`, no branch per
division; no fast-math flag at all, because reassociation and contraction would let each
instruction set round differently.

numba's own cache looks at one source file, so a change in a callee would be missed. Here the cache
folder's name is a hash of every kernel source, the versions of Python, numba and llvmlite, and the
CPU with its features: what it holds is valid by construction, and a folder can be handed to
another machine of the same CPU. Cache files are pickles, so a folder that somebody else could
have written is not used. Where no folder can be used the kernels are compiled in every process,
and `cache_report` says so.
"""

import hashlib
import logging
import os
import platform
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import llvmlite
import numba
from numba.core import caching, config

from edgert.kernels import target

JIT: bool = not config.DISABLE_JIT
"""False under NUMBA_DISABLE_JIT=1: every kernel is then its NumPy twin."""

_log = logging.getLogger("edgert.kernels")
_root: Path | None = None  # set by `use_cache_root`; None: as the environment says
_refusal: str | None = None  # why the cache is not used, once that is known


def use_cache_root(root: Path) -> None:
    """Keep compiled kernels under `root` from now on; call before the first kernel runs."""
    global _root, _refusal
    _root, _refusal = root, None


def cache_key() -> str:
    """A hash of all that the machine code depends on."""
    parts = hashlib.sha256()
    for name in (platform.python_version(), numba.__version__, llvmlite.__version__, platform.machine()):
        parts.update(name.encode() + b"\0")
    parts.update(target.cpu_name().encode() + b"\0" + target.features_text().encode() + b"\0")
    parts.update(str(config.BOUNDSCHECK).encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        parts.update(source.name.encode() + b"\0" + source.read_bytes())
    return parts.hexdigest()[:24]


def _default_root() -> Path | None:
    """EDGERT_CACHE_DIR, or else a folder in the user's home."""
    named = os.environ.get("EDGERT_CACHE_DIR")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "edgert"
    except RuntimeError:  # no home at all
        return None


def open_to_others(path: Path) -> str | None:
    """Why others could have written this folder or file, or None."""
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to user {status.st_uid}, not to you or root"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by other users; run: chmod go-w {path}"
    return None


def cache_folder() -> Path | None:
    """The folder of this machine code, made if it can be; None where there is none to use."""
    global _refusal
    root = _root or _default_root()
    if root is None:
        _refusal = "there is no home folder"
        return None
    folder = root / f"jit-{cache_key()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refusal = open_to_others(folder)
    except OSError as error:
        _refusal = f"{folder}: {error.strerror}"
    return folder if _refusal is None else None


def missing(functions: Iterable[Any]) -> list[str]:
    """The names of these compiled functions that are not in the cache, so that they will be compiled."""
    if not JIT:
        return []
    folder = cache_folder()
    held = {path.name.split("-")[0] for path in folder.glob("*.nbc")} if folder else set()
    # numba names a file of the cache so: the module, the function, a dash and its line.
    names = (f"{f.__module__.rpartition('.')[2]}.{f.__qualname__}" for f in functions)
    return [name for name in names if name not in held]


def cache_report() -> str:
    """One line for people: where compiled kernels are kept, or why nowhere."""
    folder = cache_folder()
    if folder is None:
        return f"not kept ({_refusal}); every start compiles anew: set EDGERT_CACHE_DIR to a folder of yours"
    return str(folder)


class _Locator(caching._CacheLocator):
    """Puts every kernel into `cache_folder`; its name is the stamp, so the stamp is constant."""

    def __init__(self, folder: Path, function: Callable[..., Any]) -> None:
        self._folder, self._line = folder, function.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return "keyed by folder"

    def get_disambiguator(self) -> str:
        return str(self._line)

    @classmethod
    def from_function(cls, function: Callable[..., Any], path: str) -> "_Locator | None":
        folder = _folder_once()
        return None if folder is None else cls(folder, function)


class _Impl(caching.CompileResultCacheImpl):
    _locator_classes: ClassVar = [_Locator]


class _FileCache(caching.FunctionCache):
    _impl_class = _Impl


_folder: tuple[Path | None] | None = None


def _folder_once() -> Path | None:
    """`cache_folder`, decided at the first kernel and then kept for the process."""
    global _folder
    if _folder is None:
        _folder = (cache_folder(),)
        if _folder[0] is None:
            _log.warning("compiled kernels are %s", cache_report())
        else:
            with suppress(OSError):  # read-only, and full of what is needed
                os.utime(_folder[0])  # when it was last used: see `edgert.code_cache.prune`
    return _folder[0]


class _Cache(caching.NullCache):
    """numba's cache, opened at first use instead of at import, and never in the way.

    A folder that cannot be written, or an entry that cannot be read, costs a compilation and a
    warning; it is not an error.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._files: _FileCache | None = None
        self._opened = False

    def _open(self) -> "_FileCache | None":
        if not self._opened:
            self._opened = True
            if _folder_once() is not None:
                self._files = _FileCache(self._function)
        return self._files

    def load_overload(self, signature: Any, context: Any) -> Any:
        files = self._open()
        if files is None:
            return None
        try:
            found = files.load_overload(signature, context)
        except Exception as error:  # a damaged pickle can raise anything
            _log.warning("compiling %s anew: its cache entry is damaged (%s)", self._function.__name__, error)
            return None
        return found

    def save_overload(self, signature: Any, compiled: Any) -> None:
        files = self._open()
        if files is None:
            return
        try:
            try:
                files.save_overload(signature, compiled)
            except OSError:
                raise
            except Exception:  # saving reads the index first, and that can be damaged too
                files.flush()
                files.save_overload(signature, compiled)
        except OSError as error:
            _log.warning("the compiled %s is not kept: %s", self._function.__name__, error)


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function` at its first call, or leave it to Python where the JIT is off."""
    if not JIT:
        return function
    dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _Cache(function)
    return dispatcher


def inlined(function: Callable[..., Any]) -> Any:
    """As `jit`, for a function with one caller: compiled as a part of it.

    LLVM optimises whatever a function calls once more with the function. But numba takes long to inline a
    large function, or one in one in one, and a caller takes longer than in proportion to its size: what is
    large is an operation by itself (operations.py).
    """
    if not JIT:
        return function
    return numba.njit(nogil=True, error_model="numpy", inline="always")(function)


def kernel(twin: Callable[..., Any], inline: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile a kernel, or make it `inlined`; where the JIT is off its NumPy twin stands in for it."""

    def decorate(function: Callable[..., Any]) -> Any:
        if not JIT:
            return twin
        return inlined(function) if inline else jit(function)

    return decorate
