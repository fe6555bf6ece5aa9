"""From what a user asks for to a decoder: which exit, which threshold, which upper part."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from edgert.config import ModelSpec
from edgert.decoding import Decoder
from edgert.errors import DeviceError, ModelFileError, OptionError
from edgert.format import ErtFile, ExitCalibration
from edgert.format.identity import identity, tokenizer_identity
from edgert.format.tensors import TOKENIZER
from edgert.handoff.calibration import calibration_of
from edgert.handoff.decoder import ExitPolicy, HandOff
from edgert.handoff.rules import RULES, RuleName
from edgert.handoff.schedule import Scheduled
from edgert.handoff.states import WIRES, Wire
from edgert.handoff.thresholds import (
    Fixed,
    Threshold,
    TimeBudget,
    threshold_for_agreement,
    threshold_for_budget,
)
from edgert.handoff.upper import LocalUpper, Upper

if TYPE_CHECKING:
    from edgert.handoff.link import Link

Mode = Literal["local", "collaborative", "draft", "cloud"]
MODES: Final[tuple[Mode, ...]] = ("local", "collaborative", "draft", "cloud")
_CLOUD_PACKAGES: Final = ("grpc", "grpc_health", "google.protobuf", "prometheus_client")


@dataclass(frozen=True, slots=True)
class HandoffConfig:
    """How tokens are divided between an exit, the layers behind it, and a cloud half.

    mode: "local" sends nothing, ever; "collaborative" asks the cloud where the exit is not sure; "draft" lets
    this model guess what the cloud's larger one would say; "cloud" leaves everything to the cloud. In the
    last two it holds all layers. agreement, budget or time_budget_s: how sure an exit has to be, see
    thresholds.py; with none, the exit answers only where nothing else can, so the tokens are exact.
    """

    mode: Mode = "collaborative"
    cloud: str | None = None  # HOST:PORT
    agreement: float | None = None  # tokens that should be the whole model's
    budget: float | None = None  # tokens that may be handed over
    time_budget_s: float | None = None  # seconds that a token may take, on average
    rule: RuleName = "top"
    layer: int | None = None  # of a file that was not split: where the upper part begins
    schedule: int | None = None  # leave ever earlier, down to the exit after so many layers (schedule.py)
    wire: Wire = "f32"
    deadline_s: float = 2.0
    tls: Path | None = None  # folder of `edgert certs`
    client: str = "client"  # name of this client's certificate in it

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, MODES), ("wire", self.wire, WIRES)):
            if value not in known:
                raise OptionError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if self.rule not in RULES:
            raise OptionError(f"exit rule is {self.rule!r}; expected one of {', '.join(RULES)}")
        if self.mode != "local" and self.cloud is None:
            raise OptionError(f"mode {self.mode} needs the cloud half's address; give --cloud HOST:PORT")
        thresholds = [t for t in (self.agreement, self.budget, self.time_budget_s) if t is not None]
        if self.schedule is not None and (self.mode != "local" or thresholds or self.layer is not None):
            raise OptionError("a schedule takes the place of agreement, budget and layer, in mode local only")
        if len(thresholds) > 1:
            raise OptionError("an agreement and a budget both choose the threshold; give one of them")
        if not 0 < self.deadline_s < 3600:
            raise OptionError(f"deadline is {self.deadline_s:g}; expected seconds above 0")


def check_cloud_installed() -> None:
    """Raise DeviceError unless the packages of the wire are there."""
    missing = [name for name in _CLOUD_PACKAGES if importlib.util.find_spec(name.split(".")[0]) is None]
    if missing:
        raise DeviceError(
            f"found no {missing[0]}, which the hand-off to a cloud needs; install it: "
            "pip install 'edgert[cloud]'"
        )


def make_decoder(file: ErtFile, config: HandoffConfig) -> Decoder:
    """The decoder for a file, whole or the edge half; raises OptionError for what it cannot do."""
    spec = file.spec
    if spec.first_layer:
        raise ModelFileError(
            f"{file.path}: found the cloud half of a model (layers {spec.first_layer} to {spec.layers}), "
            "expected the edge half or a whole one; serve this one with `edgert cloud`"
        )
    if config.mode == "cloud":
        check_cloud_installed()
        from edgert.handoff.remote import CloudOnly

        return CloudOnly(_link(file, config, 0))
    if config.mode == "draft":
        check_cloud_installed()
        from edgert.handoff.drafted import Drafted

        if spec.part or TOKENIZER not in file.tensors:
            raise OptionError(f"{file.path}: mode draft needs a whole model with a tokenizer")
        return Drafted(_link(file, config, 0))
    if config.schedule is not None:
        return _scheduled(file, config.schedule)
    layer = _layer(spec, config)
    policy = _policy(file, config, layer)
    if policy is None and config.mode == "local":
        raise OptionError(f"{file.path} has no exits up to layer {layer}; train some: edgert train exits")
    return HandOff(layer, policy, _upper(file, config, layer))


def _scheduled(file: ErtFile, least: int) -> Decoder:
    spec = file.spec
    if spec.part or least not in spec.exits:
        raise OptionError(
            f"schedule is {least}; expected one of the exits {list(spec.exits)} of a whole model, such as "
            "`edgert train exits` makes"
        )
    return Scheduled([*(k for k in spec.exits if k >= least), spec.layers])


def _upper(file: ErtFile, config: HandoffConfig, layer: int) -> Upper | None:
    if config.mode == "local":
        return None if file.spec.part else LocalUpper(layer)
    check_cloud_installed()
    from edgert.handoff.remote import CloudUpper

    return CloudUpper(_link(file, config, layer))


def _link(file: ErtFile, config: HandoffConfig, layer: int) -> "Link":
    from edgert.handoff.link import Link, LinkConfig
    from edgert.handoff.transport import Address, Certificates

    assert config.cloud is not None
    certificates = None if config.tls is None else Certificates.read(config.tls, config.client)
    link = LinkConfig(Address.parse(config.cloud), certificates, config.wire, config.deadline_s)
    model = tokenizer_identity(file) if config.mode == "draft" else identity(file)
    return Link(link, model, layer, file.spec.width, file.spec.vocab)


def _layer(spec: ModelSpec, config: HandoffConfig) -> int:
    """Where the upper part begins."""
    if spec.part:
        if config.layer not in (None, spec.last_layer):
            raise OptionError(
                f"layer is {config.layer}; expected {spec.last_layer}, where this half was cut, or none"
            )
        return spec.last_layer
    if config.layer is None and not spec.exits:
        raise OptionError("this file was not split and has no exits; give the layer where the cloud begins")
    layer = spec.exits[-1] if config.layer is None else config.layer
    if not 0 < layer < spec.layers or (config.mode == "local" and layer not in spec.exits):
        expected = f"1 to {spec.layers - 1}" if config.mode != "local" else f"one of the exits {spec.exits}"
        raise OptionError(f"layer is {layer}; expected {expected}")
    return layer


def _policy(file: ErtFile, config: HandoffConfig, layer: int) -> ExitPolicy | None:
    exits = tuple(k for k in file.spec.exits if k <= layer)
    if not exits:
        if (config.agreement, config.budget, config.time_budget_s) != (None, None, None):
            raise OptionError(
                f"{file.path} has no exits up to layer {layer}, so agreement and budget do not apply; "
                "train some: edgert train exits"
            )
        return None
    rule = RULES[config.rule]
    threshold = _threshold(calibration_of(file, rule, exits[-1]), config)
    return ExitPolicy(exits, tuple(file.exits[k].temperature for k in exits), rule, threshold)


def _threshold(calibration: ExitCalibration, config: HandoffConfig) -> Threshold:
    if config.time_budget_s is not None:
        return TimeBudget(calibration, config.time_budget_s)
    if config.budget is not None:
        return Fixed(threshold_for_budget(calibration, config.budget))
    return Fixed(threshold_for_agreement(calibration, 1.0 if config.agreement is None else config.agreement))
