"""The up and down of a feed-forward, neuron by neuron (kernels/neuron_packing.py), from any source."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.config import ModelSpec, Quant
from edgert.converters.compensate import Errors, round_weights
from edgert.converters.quantize import Codes, Distortion
from edgert.errors import OptionError
from edgert.format import StoredTensor
from edgert.format.tensors import matrices_in
from edgert.kernels import neuron_packing
from edgert.kernels.packing import BLOCK, GROUP

SPARSE_ACTIVATIONS: Final = ("relu", "relu2")
"""Activations that are exactly zero for about half of all inputs, and for more in models trained so."""
LEAST_WIDTH: Final = neuron_packing.SPAN * GROUP
"""Below it a row of up is mostly padding: the bundled target, 192 wide, is a fifth slower so."""
SLAB_WEIGHTS: Final = 1 << 20
"""Weights of one slab, of which one is held at a time: of the smaller ones of pipeline.py it is several."""

Sparsity = str | float
"""One of SPARSITIES, a share of activations, "core:" and a share of neurons (model/cores.py), or "teal:"
or "skip:" and another (calibration/inputs.py)."""
SPARSITIES: Final = ("auto", "exact", "none")
MOST_ZEROS: Final = 0.9
"""The largest share of zeros that can be asked for. At 0.5 a model of 8B has lost a quarter of its reasoning
(Sirius, arXiv:2409.03856, table 1); what more costs can be seen in the perplexity."""

CORE: Final = "core"
"""Before a share of neurons: those that a sequence goes on with behind its prompt."""

_Pair = tuple[NDArray[np.int8], NDArray[np.float16]]


class _Rows(Protocol):
    """What is needed of a WeightSource (pipeline.py)."""

    def rows(self, name: str, slab_rows: int) -> Iterator[NDArray[np.float32] | Codes]: ...


def share_of(sparsity: object, ways: Sequence[str]) -> tuple[str, float] | None:
    """The way, one of these, and the share in "core:0.3"; None for another sparsity.

    OptionError unless the share is above 0 and up to MOST_ZEROS.
    """
    way, colon, number = sparsity.partition(":") if isinstance(sparsity, str) else ("", "", "")
    if way not in ways or not colon:
        return None
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if not 0 < share <= MOST_ZEROS:
        raise OptionError(
            f"sparsity is {sparsity!r}; expected a share above 0 and up to {MOST_ZEROS}, like {way}:0.4"
        )
    return way, share


def check_text(sparsity: Sparsity, given: bool) -> None:
    """OptionError where a text is needed for a sparsity, and none is given."""
    core = share_of(sparsity, (CORE,)) is not None
    if not given and (core or isinstance(sparsity, int | float)):
        use = "say what it costs" if core else "find its threshold"
        raise OptionError(f"sparsity is {sparsity}, which needs a text to {use}; give calibrate")


def with_sparsity(
    spec: ModelSpec,
    quant: Quant,
    sparsity: Sparsity,
    calibrated: bool = False,
    predictors: tuple[int, ...] = (),
) -> ModelSpec:
    """The spec of a model stored neuron by neuron, where that is wanted; OptionError where it cannot be.

    A share of zeros needs a calibration, which finds the threshold for it; a core one, whose text tells what
    it costs. predictors: the rank of each layer's; with them neurons are wanted.
    """
    core = share_of(sparsity, (CORE,))
    if predictors:
        if sparsity not in ("auto", "exact"):
            raise OptionError(f"sparsity is {sparsity} with predictors; expected auto or exact")
        sparsity = "exact"
    zeros = spec.activation in SPARSE_ACTIVATIONS
    if isinstance(sparsity, int | float) and not 0 < sparsity <= MOST_ZEROS:
        raise OptionError(f"sparsity is {sparsity}; expected a share above 0 and up to {MOST_ZEROS}")
    if core is not None or isinstance(sparsity, int | float):
        check_text(sparsity, calibrated)
        zeros = True
    elif sparsity not in SPARSITIES:
        raise OptionError(
            f"sparsity is {sparsity!r}; expected one of {', '.join(SPARSITIES)}, or a share of zeros"
        )
    other = "experts" if spec.experts else "ffn_bias" if spec.ffn_bias else ""
    if spec.plain_ffn or spec.block != "pre":
        other = f"the feed-forward of {spec.architecture}"
    fits = quant in neuron_packing.QUANTS and not other
    if sparsity not in ("auto", "none") and not (zeros and fits):
        found = other or f"{spec.activation} in {quant}"
        kinds = "" if zeros else f" with {' or '.join(SPARSE_ACTIVATIONS)}"
        raise OptionError(
            f"sparsity is {sparsity} for a model with {found}; expected a dense one{kinds} in "
            f"{' or '.join(neuron_packing.QUANTS)}"
        )
    worth = sparsity != "auto" or spec.width >= LEAST_WIDTH
    neurons = zeros and fits and worth and sparsity != "none"
    share = core[1] if core is not None else 0.0
    return replace(spec, neurons=neurons, predictors=predictors if neurons else (), core=share)


def neuron_clusters(
    tensor: StoredTensor,
    source: _Rows,
    distortion: Distortion,
    done: Callable[[str, int], None],
    errors_of: Callable[[str, str], Errors | None],
) -> Iterator[NDArray[np.uint8]]:
    """The clusters of a layer, some at a time. All of down is held meanwhile, as int8.

    errors_of: what errors in the columns of a matrix to be stored so do, where that is known.
    """
    (up, neurons, width), (down, _, _) = matrices_in(tensor)
    quant = tensor.quant
    errors = errors_of(up, quant)  # in the order of use: a calibration gives them only so
    columns = _whole(source, down, width, neurons, quant, distortion, errors_of(down, quant))
    slab_rows = max(1, SLAB_WEIGHTS // (width * neuron_packing.CLUSTER)) * neuron_packing.CLUSTER
    at = 0
    for slab in source.rows(up, slab_rows):
        codes = _codes(slab, quant, up, distortion, errors)
        rows = slice(at, at + len(codes[0]))
        groups = slice(at // GROUP, -(-rows.stop // GROUP))
        packed = neuron_packing.pack_clusters(quant, codes, (columns[0][:, rows], columns[1][:, groups]))
        yield packed
        done(tensor.name, packed.nbytes)
        at = rows.stop


def single_rows(
    tensor: StoredTensor,
    source: _Rows,
    distortion: Distortion,
    done: Callable[[str, int], None],
    errors_of: Callable[[str, str], Errors | None],
) -> Iterator[NDArray[np.uint8]]:
    """A matrix of single rows (the `rows1` layout), some at a time; errors_of as for `neuron_clusters`."""
    _, width = tensor.shape
    errors = errors_of(tensor.name, tensor.quant)
    for slab in source.rows(tensor.name, max(1, SLAB_WEIGHTS // (width * BLOCK)) * BLOCK):
        codes = _codes(slab, tensor.quant, tensor.name, distortion, errors)
        packed = neuron_packing.pack_rows(tensor.quant, *codes)
        yield packed
        done(tensor.name, packed.nbytes)


def _whole(
    source: _Rows,
    name: str,
    rows: int,
    columns: int,
    quant: str,
    distortion: Distortion,
    errors: Errors | None,
) -> _Pair:
    values = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, -(-columns // GROUP)), np.float16)
    at = 0
    for slab in source.rows(name, max(1, SLAB_WEIGHTS // columns)):
        part = _codes(slab, quant, name, distortion, errors)
        span = slice(at, at + len(part[0]))
        values[span], scales[span] = part
        at = span.stop
    return values, scales


def _codes(
    slab: NDArray[np.float32] | Codes, quant: str, name: str, distortion: Distortion, errors: Errors | None
) -> _Pair:
    """Quantised rows; those that a source stores as we do stay what they are."""
    if isinstance(slab, Codes) and slab.fit(quant):
        return slab.values, slab.scales.astype(np.float16)
    weights = slab.floats() if isinstance(slab, Codes) else slab
    codes, lost = round_weights(weights, quant, errors, name)
    distortion.include(lost)
    return codes.values, codes.scales.astype(np.float16)
