"""From what a user asks for (`--draft`) to drafters."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgert.config import EngineConfig, KvType, ModelSpec
from edgert.errors import ModelFileError, OptionError
from edgert.format import ErtFile
from edgert.model.forward import Forward
from edgert.planner import plan, run_bytes
from edgert.speculation.controller import Controller, Steady
from edgert.speculation.decoder import Speculation
from edgert.speculation.drafter import Drafter
from edgert.speculation.lookup import LookupDrafter, read_store, write_store
from edgert.speculation.model_drafter import ModelDrafter
from edgert.speculation.self_drafter import ExitDrafter, SparseDrafter
from edgert.speculation.tree import MAX_NODES
from edgert.state import Weights
from edgert.tokenizer import Tokenizer

DEFAULT_TREE = 32
"""Nodes of a tree when no number is given. Past it even a good draft's guesses are worth less than a
row costs on any machine measured; the controller takes fewer where they are."""

Draft = str | os.PathLike[str]


@dataclass(slots=True)
class Drafting:
    """What was asked for, checked and opened: what a decoder is made of."""

    names: list[str]  # "lookup", "exit", "sparse" or "model"
    tree: int  # most nodes
    learn: bool = False  # whether heads are corrected by what is accepted
    store: Path | None = None  # where lookups are kept between runs
    file: ErtFile | None = None  # the draft model
    config: EngineConfig | None = None  # and how it is run

    @property
    def nbytes(self) -> int:
        """Resident memory that the draft model takes, in bytes."""
        if self.file is None or self.config is None:
            return 0
        return self.file.size + run_bytes(self.file.spec, self.config)

    def decoder(self, spec: ModelSpec, always: bool = False) -> Speculation:
        """The decoder for a target; it owns what was opened. always: guess whether it pays or not."""
        makers: dict[str, Callable[[], Drafter]] = {
            "lookup": lambda: _KeptLookup(self.store, spec.vocab) if self.store else LookupDrafter(),
            "exit": lambda: ExitDrafter(spec, self.learn),
            "sparse": lambda: SparseDrafter(spec, self.learn),
            "model": lambda: self._model(spec.vocab),
        }
        controller = Steady(self.names, self.tree) if always else Controller(self.names, self.tree)
        return Speculation([makers[name]() for name in self.names], controller)

    def close(self) -> None:
        """Give the draft's file back where no decoder was made of it."""
        if self.file is not None:
            self.file.close()

    def _model(self, vocab: int) -> Drafter:
        assert self.file is not None and self.config is not None
        forward = Forward(Weights.of_file(self.file), self.config)
        return ModelDrafter(forward, vocab, learn=self.learn, release=self.file.close)


class _KeptLookup(LookupDrafter):
    """Lookups that begin with what earlier runs saw, and are written back at the end."""

    def __init__(self, path: Path, vocab: int) -> None:
        super().__init__(read_store(path, vocab))
        self._path = path

    def close(self) -> None:
        """Write the store."""
        write_store(self._path, self.trie)


def drafting(
    target: ErtFile,
    draft: Draft | Sequence[Draft],
    *,
    tree: int | None = None,
    store: Draft | None = None,
    learn: bool = False,
    threads: int | None = None,
    context: int | None = None,
    kv: KvType = "f16",
) -> Drafting:
    """Check and open what `draft` names: "lookup", "exit", "sparse", "auto", a file, or several of them.

    auto: every drafter at hand: NAME.draft.ert beside NAME.ert, or else the file's own exits; and
    lookup. Raises OptionError for what does not fit, ModelFileError for a draft that cannot be used.
    """
    if tree is not None and (not isinstance(tree, int) or not 2 <= tree <= MAX_NODES):
        raise OptionError(f"tree is {tree!r}; expected 2 to {MAX_NODES} nodes")
    asked = [draft] if isinstance(draft, str | os.PathLike) else list(draft)
    if not asked:
        raise OptionError("draft names nothing; expected lookup, exit, sparse, auto or an .ert file")
    names: list[str] = []
    exits = target.spec.exits
    files: list[Path] = []
    for one in asked:
        if one == "auto":
            beside = target.path.with_suffix(".draft.ert")
            files += [beside] if beside.exists() else []
            names += ["lookup", "exit"] if exits and not files else ["lookup"]
        elif one == "lookup":
            names.append("lookup")
        elif one == "exit":
            if not exits:
                raise OptionError(
                    f"{target.path} has no exits to draft with; train them with `edgert train exits` and "
                    "convert again with --exits"
                )
            names.append("exit")
        elif one == "sparse":
            thresholds = target.sparsity is not None and any(target.sparsity.thresholds)
            foretold = target.spec.predictors or target.spec.core
            if not thresholds and not foretold and target.inputs is None:
                raise OptionError(
                    f"{target.path} has no thresholds to draft with; convert the model again with a share of "
                    "zeros, --sparsity 0.4 --calibrate TEXT, or one with ReLU with --predictor FILE"
                )
            names.append("sparse")
        else:
            files.append(Path(one))
    if len(files) > 1:
        raise OptionError(f"draft names {len(files)} files; expected at most one")
    if store is not None and "lookup" not in names:
        raise OptionError("a draft store keeps what lookup sees; draft with lookup, or give no store")
    # The model guesses last: where a lookup has guessed the same, its own time is saved.
    if learn and not (files or "exit" in names or "sparse" in names):
        raise OptionError("a lookup learns anyway; draft_learn belongs to a draft model or to exits")
    kept = None if store is None else Path(store)
    made = Drafting(list(dict.fromkeys(names)), tree or DEFAULT_TREE, learn, kept)
    if files:
        made.file = _open_draft(files[0], target)
        made.config = _config(made.file, threads, context, kv)
        made.names.append("model")
    return made


def _open_draft(path: Path, target: ErtFile) -> ErtFile:
    file = ErtFile.open(path)
    try:
        _same_tokens(file, target)
    except BaseException:
        file.close()
        raise
    return file


def _config(file: ErtFile, threads: int | None, context: int | None, kv: KvType) -> EngineConfig:
    """A draft sees as much of the sequence as it can; its threads are as many as its size is worth."""
    room = None if context is None else min(context, file.spec.context)
    own = plan(file.spec, file.size, context=room, kv=kv)
    return own if threads is None else replace(own, threads=min(threads, own.threads))


def _same_tokens(draft: ErtFile, target: ErtFile) -> None:
    """Raise ModelFileError unless both models mean the same by every token id."""
    mine, theirs = draft.tokenizer_json(), target.tokenizer_json()
    if mine == theirs and mine is not None:
        return
    if mine is None or theirs is None:
        without = draft if mine is None else target
        if mine is None and theirs is None and draft.spec.vocab == target.spec.vocab:
            return
        raise ModelFileError(
            f"{without.path} holds no tokenizer to compare with the other model's; expected the same one in "
            "both; convert it again from a folder with tokenizer.json"
        )
    a, b = Tokenizer(mine), Tokenizer(theirs)
    for token in range(max(a.vocab_size, b.vocab_size)):
        if a.id_to_token(token) != b.id_to_token(token):
            raise ModelFileError(
                f"{draft.path}: token {token} is {a.id_to_token(token)!r}, but {b.id_to_token(token)!r} in "
                f"{target.path}; a draft needs the target's tokenizer: make one with `edgert train draft`"
            )
