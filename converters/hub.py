"""Models named hf://org/name: the files that a conversion reads, fetched from the Hugging Face Hub.

huggingface_hub lists a model's files and knows the user's token, endpoint and folders. The bytes are
fetched here, by ranges: so that what was fetched before a cut, or in a run before this one, is kept; so
that only what is read is fetched, never a pickle or code; and so that the SHA-256 the Hub states of large
files is checked. A plan needs no more of the weights than their headers, and fetches no more.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgert.converters.hf_config import read_object, shown
from edgert.converters.report import Progress
from edgert.converters.safetensors_source import INDEX, MAX_HEADER_BYTES, WEIGHTS, shards_of
from edgert.errors import ConversionError, EdgertError, NotAModelError, UnsupportedError, UsageError

PREFIX: Final = "hf://"
FORM: Final = "hf://ORG/NAME, with @REVISION and /FILE.gguf behind it where wanted"
_NAME: Final = re.compile(
    r"hf://(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>refs/\w+/[\w.-]+|[\w.-]+))?"
    r"(?:/(?P<file>(?:[\w.-]+/)*[\w.-]+\.gguf))?",
    re.ASCII,
)
_PART: Final = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
SMALL: Final[tuple[str, ...]] = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("added_tokens.json", "chat_template.jinja"),
)
"""What a conversion reads beside the weights, where it is there."""
TOKENIZER_MODEL: Final = "tokenizer.model"  # read only where there is no tokenizer.json
PIECE: Final = 16 << 20
"""Bytes of one request, and what a cut can cost; before the first of them it takes a tenth of a second."""
WAITS: Final = (1.0, 2.0, 4.0, 8.0)
"""Seconds before a request that failed is made again; they start anew after each that did not."""
PATIENCE: Final = 30.0  # seconds without a byte


@dataclass(frozen=True, slots=True)
class HubModel:
    """What hf://org/name@revision/file says."""

    text: str
    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def parse(cls, text: str) -> "HubModel":
        """Raises UsageError for a name of another form."""
        match = _NAME.fullmatch(text)
        parts = text.removeprefix(PREFIX).split("/")
        if match is None or any(part in ("", ".", "..") for part in parts):
            raise UsageError(f"found {shown(text)}, expected {FORM}; check the model's name on its page")
        return cls(text, match["repo"], match["revision"], match["file"])


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a model on the Hub."""

    path: str
    size: int
    sha256: str | None  # of those that Git LFS keeps

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@contextmanager
def local(
    source: str | os.PathLike[str], outline: bool = False, progress: Progress | None = None
) -> Iterator[Path]:
    """Where the model of `source` lies on this disk; of a hf:// name, once its files are there.

    They are kept for later conversions, in the folder `edgert` of huggingface_hub's own, which HF_HOME
    moves. outline: a plan is all that is wanted; the weights are then files of zeros behind their headers,
    which take no room and are removed afterwards.
    Raises UsageError for a name of another form, NotAModelError for a model that is not there,
    ConversionError for a download that fails or has no room, each in one line.
    """
    if not str(source).startswith(PREFIX):
        yield Path(source)
        return
    model = HubModel.parse(str(source))
    hub = _Hub(model, progress)
    if model.file is not None:
        yield hub.gguf(model.file)
    elif outline and not hub.is_here():
        with tempfile.TemporaryDirectory() as temporary:
            yield hub.outline(Path(temporary))
    else:
        yield hub.folder()


class _Hub:
    """One revision of one model, as the Hub lists it."""

    def __init__(self, model: HubModel, progress: Progress | None) -> None:
        try:
            import huggingface_hub
        except ImportError:
            raise ConversionError(
                f"{model.text}: found no package huggingface_hub to fetch it with; "
                "install it: pip install 'edgert[convert]'"
            ) from None
        self._library, self._model, self._progress = huggingface_hub, model, progress
        with _said(model):
            info = huggingface_hub.HfApi().model_info(
                model.repo, revision=model.revision, files_metadata=True, timeout=PATIENCE
            )
        self._commit = str(info.sha)
        if not re.fullmatch("[0-9a-f]{6,64}", self._commit):
            raise ConversionError(f"{model.text}: found {shown(self._commit)} as its commit, expected a hash")
        self._files = {f.path: f for f in map(_described, info.siblings or ())}
        name = f"{model.repo.replace('/', '--')}@{self._commit}"
        self._folder = Path(huggingface_hub.constants.HF_HOME).expanduser() / "edgert" / name

    def folder(self) -> Path:
        """The folder of a model, with everything that a conversion reads."""
        self._fetch(self._small(), self._folder)
        self._fetch(self._weights(self._folder), self._folder)
        return self._folder

    def is_here(self) -> bool:
        """Whether nothing of it has to be fetched."""
        if not all((self._folder / file.name).exists() for file in self._small()):
            return False
        return all((self._folder / file.name).exists() for file in self._weights(self._folder))

    def gguf(self, path: str) -> Path:
        """A GGUF file, with its other parts beside it."""
        match = _PART.search(path)
        paths = [path]
        if match is not None:
            count = int(match[1])
            paths = [f"{path[: match.start()]}-{i + 1:05}-of-{match[1]}.gguf" for i in range(count)]
        self._fetch([self._listed(each) for each in paths], self._folder)
        return self._folder / path.rpartition("/")[2]

    def outline(self, temporary: Path) -> Path:
        """A folder whose weights are their headers and zeros: a plan sees names, types and shapes."""
        folder = temporary / self._folder.name
        self._fetch(self._small(), folder)
        with _said(self._model):
            for file in self._weights(folder):
                length = int.from_bytes(self._range(file, 0, min(8, file.size)), "little")
                end = min(file.size, 8 + min(length, MAX_HEADER_BYTES))
                with (folder / file.name).open("wb") as out:
                    for start in range(0, end, PIECE):
                        out.write(self._range(file, start, min(start + PIECE, end)))
                    out.truncate(file.size)  # a hole: it takes no room
        return folder

    def _small(self) -> list[_File]:
        """The files beside the weights, and the index of these where there is one."""
        names = [name for name in SMALL if name in self._files]
        if "tokenizer.json" not in names and TOKENIZER_MODEL in self._files:
            names.append(TOKENIZER_MODEL)
        if WEIGHTS not in self._files and INDEX in self._files:
            names.append(INDEX)
        if "config.json" not in names or not {WEIGHTS, INDEX} & set(self._files):
            raise self._no_weights()
        return [self._files[name] for name in names]

    def _weights(self, folder: Path) -> list[_File]:
        """The files of weights; of a model in several the index must be in `folder`."""
        if WEIGHTS in self._files:
            return [self._files[WEIGHTS]]
        names = shards_of(read_object(folder / INDEX), folder / INDEX)
        other = next((name for name in names if not name.endswith(".safetensors")), None)
        if other is not None:
            raise ConversionError(
                f"{self._model.text}: found {shown(other)} among its weights, expected safetensors; "
                "look for another version of the model"
            )
        return [self._listed(name) for name in names]

    def _listed(self, path: str) -> _File:
        if path not in self._files:
            raise NotAModelError(
                f"{self._model.text}: found no {shown(path)} among its {len(self._files)} files, expected "
                "it there; check its page"
            )
        return self._files[path]

    def _no_weights(self) -> EdgertError:
        what, page = self._model.text, f"{self._library.HfApi().endpoint}/{self._model.repo}"
        ggufs = sorted(path for path in self._files if path.endswith(".gguf"))
        if ggufs:
            return NotAModelError(
                f"{what}: found {len(ggufs)} GGUF files and no safetensors, expected the name of one; "
                f"name it: {what}/{ggufs[0]}"
            )
        if any(path.endswith((".bin", ".pth", ".pt")) for path in self._files):
            return UnsupportedError(
                f"{what}: found PyTorch pickles, which edgert does not read, expected safetensors; "
                "look for another version of the model, or save_pretrained it with transformers"
            )
        return NotAModelError(f"{what}: found no config.json with safetensors, expected both; see {page}")

    def _fetch(self, files: list[_File], folder: Path) -> None:
        """Fetch what `folder` does not hold yet."""
        with _said(self._model):
            folder.mkdir(parents=True, exist_ok=True)
            wanted = [file for file in files if not (folder / file.name).exists()]
            for file in list(wanted):
                cached = self._library.try_to_load_from_cache(
                    self._model.repo, file.path, revision=self._commit
                )
                if isinstance(cached, str):  # by transformers, say
                    (folder / file.name).symlink_to(cached)
                    wanted.remove(file)
            missing = sum(file.size - _size(_part(folder, file)) for file in wanted)
            free = shutil.disk_usage(folder).free
            if missing > free:
                raise ConversionError(
                    f"{self._model.text}: found {free:,} bytes of room in {folder.parent}, expected "
                    f"{missing:,}; make room, or move the folder with HF_HOME"
                )
            for file in wanted:
                self._fetch_file(file, folder)

    def _fetch_file(self, file: _File, folder: Path) -> None:
        """A whole file, from where an earlier try ended."""
        part = _part(folder, file)
        at = _size(part)
        with part.open("ab") as out:
            while at < file.size:
                out.write(self._range(file, at, min(at + PIECE, file.size)))
                out.flush()
                at = out.tell()
                if self._progress is not None:
                    self._progress(f"fetching {file.name}", at, file.size)
        if at != file.size:  # larger: not what an earlier try could have left
            part.unlink()
            raise OSError(f"{at:,} bytes of {file.name} where it has {file.size:,}")
        if file.sha256 is not None and _sha256(part) != file.sha256:
            part.unlink()
            raise ConversionError(
                f"{self._model.text}: found {file.name} damaged, expected the SHA-256 that the Hub states; "
                "run the same command again"
            )
        part.replace(folder / file.name)

    def _range(self, file: _File, start: int, end: int) -> bytes:
        """Bytes start..end-1 of a file."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = self._library.hf_hub_url(self._model.repo, file.path, revision=self._commit)
        # Compressed, a range would be one of other bytes.
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        for wait in (*WAITS, None):
            try:
                response = get_session().get(url, headers=headers, timeout=PATIENCE)
                hf_raise_for_status(response)
                content: bytes = response.content
                if len(content) == file.size > end - start:  # a server without ranges gives the whole
                    content = content[start:end]
                if len(content) == end - start:
                    return content
                problem: Exception = OSError(f"{len(content):,} bytes where {end - start:,} were asked for")
            except Exception as error:  # of whichever library huggingface_hub speaks HTTP with
                problem = error
            status = getattr(getattr(problem, "response", None), "status_code", 0)
            if wait is None or (400 <= status < 500 and status != 429):  # 429: asked too often
                break
            time.sleep(wait)
        raise problem


def _described(sibling: Any) -> _File:
    """A file as huggingface_hub lists it."""
    lfs = sibling.lfs
    return _File(str(sibling.rfilename), int(sibling.size or 0), lfs.sha256 if lfs else None)


def _part(folder: Path, file: _File) -> Path:
    """Where a file lies until it is whole."""
    return folder / f"{file.name}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _said(model: HubModel) -> Iterator[None]:
    """Whatever goes wrong with the Hub, as one of our errors."""
    from huggingface_hub import errors

    try:
        yield
    except EdgertError:
        raise
    except errors.GatedRepoError as error:  # before its base
        raise ConversionError(
            f"{model.text}: found a model whose owner asks for consent, expected a token that has it; agree "
            "on the model's page, and set HF_TOKEN to a token of yours"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotAModelError(
            f"{model.text}: found no such model, or it is private; check its name, or set HF_TOKEN to a "
            "token that may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotAModelError(
            f"{model.text}: found no revision {model.revision} of {model.repo}; expected a branch, a tag or "
            "a commit"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise ConversionError(
            f"{model.text}: found HF_HUB_OFFLINE set, expected it not to be; unset it, or convert a folder "
            "on this disk"
        ) from error
    except Exception as error:  # of whichever library huggingface_hub speaks HTTP with, or of the disk
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            problem = "the disk is full; make room, or move the folder with HF_HOME"
        else:
            text = " ".join(str(error).split())[:200]
            problem = f"it could not be fetched ({type(error).__name__}: {text}); check the network"
        raise ConversionError(
            f"{model.text}: {problem}, and run the same command again: what was fetched is kept"
        ) from error
