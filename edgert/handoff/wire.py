"""Names and numbers of the wire that both sides share (handoff.proto)."""

from typing import Final

from edgert.handoff.handoff_pb2 import STATES_F16, STATES_F32, STATES_INT8, States
from edgert.handoff.states import Wire

VERSION: Final = 1
NAME: Final = "edgert.handoff.v1.Handoff"
METHOD: Final = f"/{NAME}/Session"
WIRE_OF: Final[dict[States, Wire]] = {STATES_F32: "f32", STATES_F16: "f16", STATES_INT8: "int8"}
STATES_OF: Final[dict[Wire, States]] = {wire: number for number, wire in WIRE_OF.items()}
