"""Reading the JSON files of a Hugging Face folder: bounded, typed, with errors that name the file."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from edgert.errors import ConversionError, UnsupportedError

# A config.json takes a few kilobytes, a tokenizer.json up to 35 MB; what is far larger is not one.
MAX_JSON_BYTES: Final = 256 << 20


def shown(value: object) -> str:
    """A value from a file on one line of at most about a hundred characters."""
    return reprlib.repr(value)[:100]


def read_bytes(path: Path) -> bytes:
    """A whole small file; ConversionError if it cannot be read or is absurdly large."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ConversionError(
                f"{path}: found {size:,} bytes, expected at most {MAX_JSON_BYTES:,}; download it again"
            )
        return path.read_bytes()
    except OSError as error:
        raise ConversionError(
            f"{path}: cannot be read ({error.strerror}); check the file and its rights"
        ) from None


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `data`; ConversionError, naming `path`, if it holds anything else."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ConversionError(
            f"{path}: found damaged JSON ({shown(str(error))}), expected an object; download the file again"
        ) from None
    if not isinstance(value, dict):
        raise ConversionError(
            f"{path}: found {shown(value)}, expected a JSON object; download the file again"
        )
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return parse_object(read_bytes(path), path)


class HfConfig:
    """Typed access to a JSON object; a key that is absent and one that is null are the same."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where  # opens every message: the file, and the object in it

    def renamed(self, keys: Mapping[str, str], defaults: Mapping[str, Any]) -> "HfConfig":
        """The same object with more names for some keys, new to old, and values for keys that are absent."""
        values = dict(defaults)
        values |= {key: value for key, value in self.values.items() if value is not None or key not in values}
        values |= {new: self.values[old] for new, old in keys.items() if self.has(old)}
        return HfConfig(values, self.where)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int | None = None) -> int:
        """A whole number from `least` to `most`; without a default the key is required."""
        value = self._value(key, default)
        if type(value) is not int or value < least:
            raise self._wrong(key, value, f"a whole number >= {least}")
        if most is not None and value > most:
            raise self._wrong(key, value, f"a whole number <= {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number > 0; without a default the key is required."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e38:
            raise self._wrong(key, value, "a number > 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._value(key, default)
        if type(value) is not bool:
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default the key is required."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings, empty if absent."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "a list of strings")
        return value

    def ids(self, key: str) -> list[int]:
        """Token ids, written as a number, a list, or not at all."""
        value = self._value(key, [])
        items = value if isinstance(value, list) else [value]
        if not all(type(item) is int and item >= 0 for item in items):
            raise self._wrong(key, value, "token ids >= 0")
        return items

    def child(self, key: str) -> "HfConfig":
        """A nested object, empty if absent."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return HfConfig(value, f"{self.where}: {key}")

    def refuse_unless(self, key: str, *neutral: object) -> None:
        """UnsupportedError if the key is set to anything but a value that changes nothing."""
        if self.has(key) and self.values[key] not in neutral:
            expected = " or ".join(shown(value) for value in neutral) or "it to be absent"
            raise UnsupportedError(
                f"{self.where}: found {key} {shown(self.values[key])}, which edgert does not compute, "
                f"expected {expected}; convert another version of the model"
            )

    def _value(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConversionError(
                f"{self.where}: found no {key}, expected one; download the model's files again"
            )
        return value

    def _wrong(self, key: str, value: object, expected: str) -> ConversionError:
        key = key if key.isidentifier() and len(key) < 60 else shown(key)  # some are the file's own
        return ConversionError(
            f"{self.where}: found {key} {shown(value)}, expected {expected}; download the model's files again"
        )
