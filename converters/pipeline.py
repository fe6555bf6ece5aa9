"""The stream every source format shares: read a slab, quantise it, pack it, write it.

No tensor is ever whole in memory, so the peak does not depend on the size of the model. While one slab is
hashed and written and another read, those between are rounded by other threads.
"""

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.config import QUANTS, ModelSpec, Quant, QuantSpec
from edgert.converters.compensate import COMPENSATED, Errors, round_weights
from edgert.converters.hottest_first import Firing, HottestFirst, sparsity_metadata
from edgert.converters.neurons import neuron_clusters, single_rows
from edgert.converters.outliers import APART, Outliers
from edgert.converters.quantize import CODE_RANGE, Codes, Distortion, check_weights
from edgert.converters.report import ConversionReport, Progress, TensorReport
from edgert.errors import OptionError
from edgert.format import ErtWriter, StoredTensor, declared
from edgert.format.layout import QUANTIZED
from edgert.format.tensors import POSITIONS, TOKENIZER, matrices_in
from edgert.format.uses import uses_metadata
from edgert.kernels.packing import BLOCK, pack, pack_floats
from edgert.planner import cores
from edgert.resident import peak_rss_bytes

# Weights of one slab, 2 MB as float32, of which as many as there are threads and two more are held. Smaller
# slabs spend their time on calls, larger ones leave the cache and gain nothing.
SLAB_WEIGHTS: Final = 1 << 19
# More could not be kept busy: one thread reads, hashes and writes, some 300 million weights a second.
MOST_THREADS: Final = 8
# After a calibration every slab passes over all of a Gram matrix's factor: fewer and larger ones then, one at
# a time.
COMPENSATED_WEIGHTS: Final = 1 << 20


class WeightSource(Protocol):
    """The tensors of a model under the names of `edgert.format.declared`, whatever the file format."""

    def rows(self, name: str, slab_rows: int) -> Iterator[NDArray[np.float32] | Codes]:
        """A matrix [N, K] in slabs of `slab_rows` rows, the last maybe shorter."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """A vector, among them what no source has because it is computed, like rope_frequencies."""

    def stored_as(self, name: str) -> str:
        """The source's own name for the type of a tensor, "" for one that it computes."""


class Calibration(Protocol):
    """What a model's matrices meet at work, asked for in the order of layers, the output matrix last."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file records of it."""

    def gram(self, name: str) -> NDArray[np.float32] | None:
        """The mean of x x^T over the rows x that a matrix met, [K, K]; None for one without any.

        The same array for matrices that meet the same rows: what is made of it is then made once.
        """

    def firing(self, layer: int) -> Firing | None:
        """How often the neurons of a layer fire; None for one with experts."""

    def expert_uses(self) -> NDArray[np.int64]:
        """How many tokens of the text chose each expert, [L, E]; asked for last."""

    @property
    def zeros_wanted(self) -> float:
        """The share of activations that are to be taken for zero; 0 for those that are so."""


class _Rounding:
    """What an error in a column of each matrix does, as far as a calibration knows."""

    def __init__(self, calibration: HottestFirst | Outliers | Calibration | None) -> None:
        self._calibration = calibration
        self._last: tuple[NDArray[np.float32], Errors] | None = None

    def errors(self, name: str, quant: str) -> Errors | None:
        """For a matrix to be stored as `quant`; None where it is rounded without."""
        gram = self._calibration.gram(name) if self._calibration and quant in COMPENSATED else None
        if gram is None:
            return None
        if self._last is None or self._last[0] is not gram:
            self._last = gram, Errors(gram)
        return self._last[1]


@dataclass(slots=True)
class _Tally:
    """Bytes written so far, for the progress callback."""

    total: int
    progress: Progress | None
    done: int = 0
    reports: list[TensorReport] = field(default_factory=list)

    def add(self, name: str, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(name, self.done, self.total)


def quant_spec(quant: Quant | QuantSpec) -> QuantSpec:
    """One name for all matrices, or a spec; OptionError for a name that is no quantisation."""
    spec = quant if isinstance(quant, QuantSpec) else QuantSpec(matrices=quant, embedding=quant)
    for name in (spec.matrices, spec.embedding):
        if name not in QUANTS:
            raise OptionError(f"quant is {name!r}; expected one of {', '.join(QUANTS)}")
    return spec


def matrices(spec: ModelSpec) -> list[str]:
    """The names of all tensors of a model that have a choice of precision."""
    return [decl.name for decl in declared(spec) if decl.role in QUANTIZED]


def quants_of(spec: ModelSpec, quant: QuantSpec) -> dict[str, Quant]:
    """`embedding` for the token embedding, which is the output matrix too when they are tied."""
    return {name: quant.each.get(name) or _quant_of(name, quant) for name in matrices(spec)}


def _quant_of(name: str, quant: QuantSpec) -> Quant:
    if name == POSITIONS:  # it is added as it is: a rounding to 8 bits would stay in every layer's input
        return "f32" if quant.embedding == "f32" else "f16"
    if name.endswith(APART) and quant.matrices in CODE_RANGE:
        return "q8"
    return quant.embedding if name == "token_embedding" else quant.matrices


def write_model(
    out: Path,
    spec: ModelSpec,
    source: WeightSource,
    quants: Mapping[str, Quant],
    tokenizer_json: bytes | None,
    metadata: Mapping[str, str],
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    dry_run: bool = False,
) -> ConversionReport:
    """Write the .ert file of a model; on any failure nothing is left on the disk.

    `quants` gives the quantisation of every matrix by name; `quants_of` makes it of a QuantSpec.
    `metadata` is kept in the file beside `errors`, a JSON object of the relative error of every
    tensor that lost something. With `calibration` a matrix is rounded so that its products with what it
    meets change least (compensate.py), else so that it changes least itself. Raises ConversionError for
    weights that cannot be stored and for a full disk. dry_run: write nothing; errors are not known then.
    """
    started = time.monotonic()
    meets: HottestFirst | Outliers | Calibration | None = calibration
    if calibration is not None:
        metadata = {**metadata, **calibration.metadata}
        if spec.neurons:
            source = meets = HottestFirst(source, calibration)
    if spec.outliers:
        source = meets = Outliers(source, calibration, spec.outliers)
    writer = ErtWriter(out, spec, quants, tokenizer_json, metadata)
    stored = [tensor for name, tensor in writer.tensors.items() if name != TOKENIZER]
    tally = _Tally(sum(tensor.nbytes for tensor in stored), progress)
    if dry_run:
        tally.reports = [_report(tensor, source, 0.0) for tensor in stored]
    else:
        with writer, ThreadPoolExecutor(_threads()) as pool:
            rounding = _Rounding(meets)
            # Calibrated, the embedding comes last: as the output matrix it meets what leaves all layers.
            late = calibration is not None
            for tensor in sorted(stored, key=lambda t: late and t.name == "token_embedding"):
                tally.reports.append(_write_tensor(writer, tensor, source, tally, rounding, pool))
            errors = {r.name: float(f"{r.relative_error:.4g}") for r in tally.reports if r.relative_error}
            said = {"errors": json.dumps(errors, separators=(",", ":"))}
            if calibration is not None and spec.neurons:
                firing = [calibration.firing(layer) for layer in range(spec.layers)]
                said |= sparsity_metadata(calibration.zeros_wanted, [layer for layer in firing if layer])
            if calibration is not None and spec.experts:
                said |= uses_metadata(calibration.expert_uses(), spec)
            writer.finish(said)
    return ConversionReport(
        path=out,
        spec=spec,
        tensors=tuple(sorted(tally.reports, key=lambda r: r.name != "token_embedding")),
        file_bytes=writer.size,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _write_tensor(
    writer: ErtWriter,
    tensor: StoredTensor,
    source: WeightSource,
    tally: _Tally,
    rounding: _Rounding,
    pool: ThreadPoolExecutor,
) -> TensorReport:
    distortion = Distortion()
    if tensor.role == "neurons":
        writer.write(tensor.name, neuron_clusters(tensor, source, distortion, tally.add, rounding.errors))
    elif tensor.role == "rows":
        writer.write(tensor.name, single_rows(tensor, source, distortion, tally.add, rounding.errors))
    elif matrices_in(tensor):
        writer.write(tensor.name, _records(tensor, source, distortion, tally, rounding, pool))
    else:
        values = source.vector(tensor.name)
        check_weights(values, "f32", tensor.name)
        writer.write(tensor.name, values.astype("<f4", copy=False))
        tally.add(tensor.name, tensor.nbytes)
    return _report(tensor, source, distortion.relative)


def _report(tensor: StoredTensor, source: WeightSource, error: float) -> TensorReport:
    quant: Quant = next(name for name in QUANTS if name == tensor.quant)
    source_type = source.stored_as(next((name for name, _, _ in matrices_in(tensor)), tensor.name))
    return TensorReport(tensor.name, tensor.shape, source_type, quant, tensor.nbytes, error)


def _records(
    tensor: StoredTensor,
    source: WeightSource,
    distortion: Distortion,
    tally: _Tally,
    rounding: _Rounding,
    pool: ThreadPoolExecutor,
) -> Iterator[NDArray[np.uint8]]:
    """The packed bytes of a matrix, or of the three of an expert, whole blocks of rows at a time."""
    for name, _, columns in matrices_in(tensor):
        errors = rounding.errors(name, tensor.quant)
        weights = SLAB_WEIGHTS if errors is None else COMPENSATED_WEIGHTS
        slabs = source.rows(name, max(1, weights // (columns * BLOCK)) * BLOCK)
        for packed, lost in _encoded(slabs, tensor.quant, name, errors, pool):
            distortion.include(lost)
            yield packed
            tally.add(tensor.name, packed.nbytes)


def _threads() -> int:
    return min(cores(), MOST_THREADS)


_Encoded = tuple[NDArray[np.uint8], Distortion]


def _encoded(
    slabs: Iterable[NDArray[np.float32] | Codes],
    quant: str,
    name: str,
    errors: Errors | None,
    pool: ThreadPoolExecutor,
) -> Iterator[_Encoded]:
    """Slabs as they are stored, in their order, and what each lost."""
    if errors is not None:  # most of that is products of matrices, which take all threads by themselves
        yield from (_encode(slab, quant, name, errors) for slab in slabs)
        return
    waiting: deque[Future[_Encoded]] = deque()
    try:
        for slab in slabs:
            waiting.append(pool.submit(_encode, slab, quant, name, None))
            if len(waiting) > _threads() + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _encode(slab: NDArray[np.float32] | Codes, quant: str, name: str, errors: Errors | None) -> _Encoded:
    if not isinstance(slab, Codes):
        return encode(slab, quant, name, errors)
    if slab.fit(quant):
        return pack_codes(slab, quant), Distortion()
    near = slab.nearest(quant)
    if near is None:
        return encode(slab.floats(), quant, name, errors)
    lost = Distortion()
    lost.add(slab.floats(), near.floats())
    return pack_codes(near, quant), lost


def pack_codes(codes: Codes, quant: str) -> NDArray[np.uint8]:
    """Codes that fit `quant` to its record bytes; what they decode to is what they were."""
    minimums = None if codes.minimums is None else codes.minimums.astype(np.float16)
    return pack(quant, codes.values, codes.scales.astype(np.float16), minimums)


def encode(weights: NDArray[np.float32], quant: str, name: str, errors: Errors | None = None) -> _Encoded:
    """float32 [N, K] to record bytes (kernels/packing.py), and what they lose.

    errors: what an error in a column does, for a quantisation in COMPENSATED. Raises ConversionError as
    `check_weights`.
    """
    if quant in CODE_RANGE:
        codes, lost = round_weights(weights, quant, errors, name)
        return pack_codes(codes, quant), lost
    check_weights(weights, quant, name)
    lost = Distortion()
    if quant == "f32":
        return pack_floats(weights), lost
    half = weights.astype(np.float16)
    lost.add(weights, half.astype(np.float32))
    return pack_floats(half), lost
