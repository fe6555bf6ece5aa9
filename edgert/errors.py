"""The exception tree. Every error a user can meet is one of these.

    EdgertError
    ├── UsageError              the arguments do not fit together (command: exit 2)
    │   └── OptionError         an option that does not apply to this model or verb
    ├── ModelFileError          a file that cannot be used
    │   ├── NotAModelError      not an .ert file, or not a model folder at all
    │   ├── FormatError         an .ert file that breaks a rule of docs/format.md
    │   ├── VersionError        an .ert file of another format version
    │   └── ChecksumError       bytes that are not those that were written
    ├── ConversionError         the source cannot be converted
    │   └── UnsupportedError    an architecture, option or tensor type we do not have
    ├── ContextLengthError      more tokens than the context holds
    ├── TemplateError           a chat template that is absent, broken or hostile
    ├── MemoryBudgetError       the plan does not fit in --ram
    ├── DeviceError             this machine lacks something (a writable cache, a core)
    └── LinkError               the cloud half cannot be reached, or refused, or broke the protocol

A message says what was found, what was expected and what to do, in one line.
"""


class EdgertError(Exception):
    """Base of all errors raised on purpose by edgert."""


class UsageError(EdgertError):
    """Arguments that do not fit together."""


class OptionError(UsageError):
    """An option that does not apply here."""


class ModelFileError(EdgertError):
    """A model file that cannot be used."""


class NotAModelError(ModelFileError):
    """The path holds no model that edgert knows."""


class FormatError(ModelFileError):
    """An .ert file that violates a rule; `rule` names it as docs/format.md does."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class VersionError(ModelFileError):
    """An .ert file of a format version this edgert does not read."""


class ChecksumError(ModelFileError):
    """Stored bytes that do not match their SHA-256."""


class ConversionError(EdgertError):
    """A source that cannot be converted."""


class UnsupportedError(ConversionError):
    """A source that uses something edgert does not have."""


class ContextLengthError(EdgertError):
    """More tokens than the context holds."""


class TemplateError(EdgertError):
    """A chat template that is absent, broken or hostile."""


class MemoryBudgetError(EdgertError):
    """A plan that does not fit in the memory it was given."""


class DeviceError(EdgertError):
    """Something this machine lacks."""


class LinkError(EdgertError):
    """A cloud half that cannot be reached or refuses, or a peer that breaks the protocol."""
