"""What both sides of the wire share (handoff.proto): names, numbers, and our objects as messages."""

from typing import Final

from edgert.config import SamplingParams
from edgert.errors import LinkError
from edgert.handoff.handoff_pb2 import STATES_F16, STATES_F32, STATES_INT8, Sampling, States, Token
from edgert.handoff.states import Wire
from edgert.sampling import Choice, Sampler

VERSION: Final = 1
NAME: Final = "edgert.handoff.v1.Handoff"
METHOD: Final = f"/{NAME}/Session"
CLIENT_HEADER: Final = "edgert-client"  # metadata of a gateway's streams to a replica: whom it speaks for,
KEY_HEADER: Final = "edgert-key"  # and the proof that it is the gateway
WIRE_OF: Final[dict[States, Wire]] = {STATES_F32: "f32", STATES_F16: "f16", STATES_INT8: "int8"}
STATES_OF: Final[dict[Wire, States]] = {wire: number for number, wire in WIRE_OF.items()}


def sampling_message(sampler: Sampler) -> Sampling:
    """How tokens are chosen, seed included."""
    params = sampler.params
    return Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        seed=sampler.seed & (1 << 64) - 1,
        logprobs=params.logprobs,
    )


def read_sampling(message: Sampling) -> SamplingParams:
    """The inverse; raises OptionError for values that are none."""
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        seed=message.seed,
        logprobs=message.logprobs,
    )


def choice_message(choice: Choice) -> Token:
    """A chosen token."""
    return Token(
        id=choice.token,
        logprob=choice.logprob,
        top_ids=[token for token, _ in choice.top],
        top_logprobs=[logprob for _, logprob in choice.top],
    )


def read_choice(message: Token, vocab: int) -> Choice:
    """The inverse; raises LinkError for what is no token of the vocabulary."""
    highest = max(message.id, *message.top_ids, 0)
    if highest >= vocab or len(message.top_ids) != len(message.top_logprobs):
        raise LinkError(f"the cloud answered token {highest}, expected one of {vocab}")
    top = tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    return Choice(message.id, message.logprob, top)
