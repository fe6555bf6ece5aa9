from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class States(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATES_NONE: _ClassVar[States]
    STATES_F32: _ClassVar[States]
    STATES_F16: _ClassVar[States]
    STATES_INT8: _ClassVar[States]
STATES_NONE: States
STATES_F32: States
STATES_F16: States
STATES_INT8: States

class FromEdge(_message.Message):
    __slots__ = ("hello", "rows", "ask", "draft")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    rows: Rows
    ask: Ask
    draft: Draft
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., rows: _Optional[_Union[Rows, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ..., draft: _Optional[_Union[Draft, _Mapping]] = ...) -> None: ...

class FromCloud(_message.Message):
    __slots__ = ("welcome", "ack", "answer", "resend")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    RESEND_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    ack: Ack
    answer: Answer
    resend: Resend
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., resend: _Optional[_Union[Resend, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "session", "model", "layer", "states", "sampling", "prompt", "rows", "prefix")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    version: int
    session: bytes
    model: str
    layer: int
    states: States
    sampling: Sampling
    prompt: int
    rows: int
    prefix: bytes
    def __init__(self, version: _Optional[int] = ..., session: _Optional[bytes] = ..., model: _Optional[str] = ..., layer: _Optional[int] = ..., states: _Optional[_Union[States, str]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., prompt: _Optional[int] = ..., rows: _Optional[int] = ..., prefix: _Optional[bytes] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "seed", "logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    seed: int
    logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "rows", "context", "message_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: int
    rows: int
    context: int
    message_bytes: int
    def __init__(self, version: _Optional[int] = ..., rows: _Optional[int] = ..., context: _Optional[int] = ..., message_bytes: _Optional[int] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("first", "prefix", "tokens", "states")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    first: int
    prefix: bytes
    tokens: _containers.RepeatedScalarFieldContainer[int]
    states: bytes
    def __init__(self, first: _Optional[int] = ..., prefix: _Optional[bytes] = ..., tokens: _Optional[_Iterable[int]] = ..., states: _Optional[bytes] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    def __init__(self, rows: _Optional[int] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("rows", "prefix", "most")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    rows: int
    prefix: bytes
    most: int
    def __init__(self, rows: _Optional[int] = ..., prefix: _Optional[bytes] = ..., most: _Optional[int] = ...) -> None: ...

class Draft(_message.Message):
    __slots__ = ("rows", "prefix", "tokens", "parents")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    prefix: bytes
    tokens: _containers.RepeatedScalarFieldContainer[int]
    parents: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, rows: _Optional[int] = ..., prefix: _Optional[bytes] = ..., tokens: _Optional[_Iterable[int]] = ..., parents: _Optional[_Iterable[int]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("rows", "tokens", "layer_tokens")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    layer_tokens: int
    def __init__(self, rows: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., layer_tokens: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "logprob", "top_ids", "top_logprobs")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Resend(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    def __init__(self, rows: _Optional[int] = ...) -> None: ...
