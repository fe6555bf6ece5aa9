"""How much worse a model predicts with one of its tensors rounded: what decides who gets the bits.

A tensor is rounded to 3 bits, as the conversion would do it, in a private copy of the model; the loss is
the mean Kullback-Leibler divergence of the next token's distribution from that of the model as it was. Other
types follow from the squared error of each, to which the divergence is proportional while it is small.
Experts of a layer are rounded together, and their loss is shared out by the energy of what each gave: what
EdgeMoE measures expert by expert (Yi et al., 2023, arXiv:2308.14352, section 4.1), at the price of one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.config import EngineConfig, Quant
from edgert.converters.compensate import Errors, round_weights
from edgert.converters.quantize import LARGEST, quantize, relative_error
from edgert.format import ErtFile, StoredTensor
from edgert.format.tensors import matrices_in
from edgert.kernels import packing
from edgert.model.forward import Forward
from edgert.state import MAX_OUTPUTS, Weights

Floats = NDArray[np.float32]

TOKENS: Final = 1024
"""Rows compared: each tensor costs a run of so many through the layers above it."""
LOGITS: Final = 1 << 26
"""Most logits held, 256 MiB: of a vocabulary of 128k, 512 rows."""
CANDIDATES: Final[tuple[Quant, ...]] = ("q8", "q4m", "q4", "q4s", "q3", "q2")
PROBE: Final = "q3"
"""Coarse enough to be told from noise in one tensor, fine enough for the rest of the model to stay itself."""
SAMPLE: Final = 1 << 18
"""Weights of a matrix on which the squared error of each type is measured."""
Q8_ERROR: Final = 2.9e-5
"""The squared error of q8, relative to the weights': the model that is measured is in q8 itself."""


class Observed(Protocol):
    """What is needed of a TextCalibration: asked for in the order of layers."""

    def gram(self, name: str) -> Floats | None:
        """The mean of x x^T over the rows that a matrix met."""

    def rows(self, name: str) -> int:
        """How many rows a matrix met."""


@dataclass(frozen=True, slots=True)
class _Before:
    """The model as it is: hidden rows [L + 1, T, D] before each layer, and log-probabilities [T, V]."""

    hidden: Floats
    likely: Floats


class Sensitivity:
    """Measures every tensor of a q8 model on one text. Close it after use.

    windows: the tokens to compare on; each is looked at by itself.
    """

    def __init__(self, file: ErtFile, config: EngineConfig, windows: tuple[tuple[int, ...], ...]) -> None:
        self._spec = spec = file.spec
        # Pages that are written become this process's own; the file stays as it is.
        self._data: NDArray[np.uint8] = np.memmap(file.path, np.uint8, "c")
        self._tensors = file.tensors
        weights = Weights(spec, np.asarray(self._data), file.tensors)
        self._forward = Forward(weights, replace(config, chunk=min(config.chunk, MAX_OUTPUTS)))
        room = min(TOKENS, LOGITS // spec.vocab)
        self._windows: list[tuple[int, ...]] = []
        for window in windows:
            self._windows.append(window[:room])
            room -= len(self._windows[-1])
            if room <= 0:
                break
        self._before = self._as_it_is()

    def close(self) -> None:
        """End the threads."""
        self._forward.close()

    def losses(
        self, observed: Observed, progress: Callable[[str, int, int], None] | None = None
    ) -> dict[str, dict[Quant, float]]:
        """By tensor and type the expected divergence in nats per token."""
        found: dict[str, dict[Quant, float]] = {}
        # What is not in q8 (a table of positions) is not to be rounded.
        wanted = [t for t in self._tensors.values() if t.role in ("matrix", "expert") and t.quant == "q8"]
        wanted.sort(key=lambda t: t.name == "token_embedding")  # last: it may be the output matrix
        layers = [[t] for t in wanted if t.role == "matrix"]
        for index in range(self._spec.layers):
            experts = [t for t in wanted if t.role == "expert" and t.name.startswith(f"layers.{index}.")]
            layers += [experts] if experts else []
        layers.sort(key=lambda group: self._order(group[0].name))
        for done, group in enumerate(layers):
            found |= self._group(group, observed)
            if progress:
                progress(group[0].name, done + 1, len(layers))
        return found

    def _order(self, name: str) -> int:
        """The layer in whose turn a tensor is measured."""
        return int(name.split(".")[1]) if name.startswith("layers.") else self._spec.layers

    def _starts(self, name: str) -> int:
        """The first layer that sees a change of a tensor."""
        if name.startswith("layers."):
            return int(name.split(".")[1])
        return 0 if name == "token_embedding" else self._spec.layers

    def _group(self, group: list[StoredTensor], observed: Observed) -> dict[str, dict[Quant, float]]:
        """The losses of tensors that are rounded together."""
        if group[0].name.startswith("exits."):
            # Not part of what is compared, and small: as precise as there is.
            return {t.name: {q: float(CANDIDATES.index(q)) for q in CANDIDATES} for t in group}
        energies, squared = [], []
        with self._restored(group):
            for tensor in group:
                energy, errors = self._round(tensor, observed)
                energies.append(energy if len(group) > 1 else 1.0)
                squared.append(errors)
            loss = self._divergence(self._starts(group[0].name))
        total = sum(e * s[PROBE] for e, s in zip(energies, squared, strict=True))
        scale = loss / total if total > 0 else 0.0
        return {
            tensor.name: {quant: scale * energy * error for quant, error in errors.items()}
            for tensor, energy, errors in zip(group, energies, squared, strict=True)
        }

    def _round(self, tensor: StoredTensor, observed: Observed) -> tuple[float, dict[Quant, float]]:
        """Round a tensor in place; the energy of its output, and the squared error of each type."""
        at, energy = tensor.offset, 0.0
        sums = dict.fromkeys(CANDIDATES, 0.0)
        parts = matrices_in(tensor)
        for name, rows, columns in parts:
            n, k = packing.padded(rows, columns)
            block_bytes = k // packing.GROUP * packing.RECORD_BYTES[tensor.quant]
            stored = self._data[at : at + n // packing.BLOCK * block_bytes]
            gram = observed.gram(name)
            errors = None if gram is None else Errors(gram)
            if tensor.role == "expert" and name.endswith(".down") and gram is not None:
                whole = packing.unpack(tensor.quant, stored, rows, columns)
                energy = observed.rows(name) * float(
                    np.einsum("nk,kl,nl->", whole, gram, whole, optimize=True)
                )
            sample = max(packing.BLOCK, SAMPLE // columns // packing.BLOCK * packing.BLOCK)
            for first in range(0, rows, sample):
                last = min(first + sample, rows)
                blocks = slice(first // packing.BLOCK * block_bytes, -(-last // packing.BLOCK) * block_bytes)
                weights = packing.unpack(tensor.quant, stored[blocks], last - first, columns)
                if first == 0:
                    for quant, error in _squared_errors(weights).items():
                        sums[quant] += error / len(parts)
                probe = PROBE if np.abs(weights).max() <= LARGEST[PROBE] else "q4"
                rounded = round_weights(weights, probe, errors, name)[0].floats()
                codes = quantize(rounded, "q8", name=name)
                stored[blocks] = packing.pack("q8", codes.values, codes.scales.astype(np.float16)).reshape(-1)
            at += stored.size
        return energy, {quant: error for quant, error in sums.items() if np.isfinite(error)}

    @contextmanager
    def _restored(self, group: list[StoredTensor]) -> Iterator[None]:
        """What is changed in these tensors inside is undone at the end."""
        kept = [self._data[t.offset : t.offset + t.nbytes].copy() for t in group]
        try:
            yield
        finally:
            for tensor, data in zip(group, kept, strict=True):
                self._data[tensor.offset : tensor.offset + tensor.nbytes] = data

    def _as_it_is(self) -> _Before:
        spec, count = self._spec, sum(map(len, self._windows))
        hidden = np.empty((spec.layers + 1, count, spec.width), np.float32)
        for layer in range(spec.layers):
            self._through(layer, layer + 1, hidden[layer], hidden[layer + 1])
        return _Before(hidden, np.concatenate(list(self._likely(spec.layers, hidden[-1]))))

    def _through(self, first: int, last: int, rows: Floats, out: Floats) -> None:
        at, size = 0, self._forward.config.chunk
        for window in self._windows:
            self._forward.cache.length = 0
            for start in range(0, len(window), size):
                tokens = window[start : start + size]
                span = slice(at, at + len(tokens))
                given = rows[span] if first else None
                out[span] = self._forward.run(tokens, layers=(first, last), hidden=given)
                at = span.stop

    def _likely(self, first: int, rows: Floats) -> Iterator[Floats]:
        """Log-probabilities of what comes next, in pieces, from hidden rows before a layer on."""
        at, size, last = 0, self._forward.config.chunk, self._spec.layers
        for window in self._windows:
            self._forward.cache.length = 0
            for start in range(0, len(window), size):
                tokens = window[start : start + size]
                given = rows[at : at + len(tokens)] if first else None
                logits = self._forward.run(
                    tokens, layers=(first, last), hidden=given, outputs=range(len(tokens))
                )
                shifted = logits - logits.max(axis=1, keepdims=True)
                yield shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
                at += len(tokens)

    def _divergence(self, first: int) -> float:
        """Mean of sum p log(p / q), p as it was and q as it is now."""
        total, at = 0.0, 0
        for likely in self._likely(first, self._before.hidden[first]):
            before = self._before.likely[at : at + len(likely)]
            total += float((np.exp(before) * (before - likely)).sum(dtype=np.float64))
            at += len(likely)
        return max(0.0, total / at)


def _squared_errors(weights: Floats) -> dict[Quant, float]:
    """Relative to the weights' own; infinite for a type that cannot hold them."""
    peak = float(np.abs(weights).max())
    found: dict[Quant, float] = {}
    for quant in CANDIDATES:
        if quant == "q8":
            found[quant] = Q8_ERROR
        elif peak > LARGEST[quant]:
            found[quant] = np.inf
        else:
            found[quant] = relative_error(weights, quantize(weights, quant).floats()) ** 2
    return found
