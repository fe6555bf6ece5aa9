"""What lies beside an ONNX model and says what its graph cannot: ids, context, tokenizer, template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgert.converters.architectures import VARIANTS, describe
from edgert.converters.hf import config_in, metadata_of, tokenizer_json_in
from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import ConversionError, NotAModelError, UnsupportedError

# Of a folder with several, the one that computes logits: Optimum's old name for it is the second.
PREFERRED: Final = ("model.onnx", "decoder_model.onnx")


def model_in(folder: Path) -> Path | None:
    """The ONNX file of a folder, or of its folder `onnx`; None if there is none.

    Raises NotAModelError for several of which none has a usual name.
    """
    for place in (folder, folder / "onnx"):
        found = sorted(place.glob("*.onnx"))
        for name in PREFERRED:
            if place / name in found:
                return place / name
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:4])
            raise NotAModelError(f"{place}: found {names}, expected {PREFERRED[0]}; pass the file to convert")
    return None


@dataclass(frozen=True, slots=True)
class Beside:
    """The folder of a model's config and tokenizer: its own, or the one above."""

    folder: Path
    genai: HfConfig  # genai_config.json, of onnxruntime-genai
    config: HfConfig
    generation: HfConfig

    @classmethod
    def of(cls, model: Path) -> "Beside":
        """Raises ConversionError where no tokenizer is found."""
        places = (model.parent, model.resolve().parent.parent)
        for folder in places[: 2 if model.parent.name == "onnx" else 1]:
            if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
                names = ("genai_config.json", "config.json", "generation_config.json")
                genai, config, generation = (config_in(folder, name) for name in names)
                return cls(folder, genai.child("model"), config, generation)
        raise ConversionError(
            f"{model}: found no tokenizer.json beside it, expected one, with config.json or "
            "genai_config.json; copy them from the model it was exported from"
        )

    def context(self, table: int) -> int:
        """Positions the model was made for; `table`: rows of its rotary table, 0 for none."""
        if self.genai.has("context_length"):
            return self.genai.integer("context_length")
        if self.config.has("max_position_embeddings"):
            return self.config.integer("max_position_embeddings")
        if table:
            return table
        raise ConversionError(
            f"{self.folder}: found no context length in graph, genai_config.json or config.json, expected "
            "max_position_embeddings; copy config.json from the model it was exported from"
        )

    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text. Raises ConversionError if nothing says any."""
        found = [i for config in self._all() for i in config.ids("eos_token_id")]
        if not found:
            raise ConversionError(
                f"{self.folder}: found no eos_token_id in genai_config.json, config.json or "
                "generation_config.json, expected one; copy config.json from the model it was exported from"
            )
        return tuple(dict.fromkeys(found))

    def bos_id(self) -> int | None:
        """The id that starts a text."""
        return next((i for config in self._all() for i in config.ids("bos_token_id")), None)

    def windows(self, layers: int) -> tuple[int, ...]:
        """Keys visible per layer, where the graph computes its mask and config.json says what it hides."""
        if not self.config.has("sliding_window"):
            return ()
        kind = self.config.text("model_type", "")
        if kind not in VARIANTS:
            raise UnsupportedError(
                f"{self.config.where}: found sliding_window {shown(self.config.values['sliding_window'])} "
                f"of model_type {shown(kind)}, expected one of {', '.join(VARIANTS)}; convert another export"
            )
        windows = describe(self.config, self.generation).spec.windows
        if windows and len(windows) != layers:
            raise ConversionError(
                f"{self.config.where}: found {len(windows)} layers, expected the {layers} of the graph; "
                "copy config.json from the model it was exported from"
            )
        return windows

    def metadata(self, model: Path) -> dict[str, str]:
        """What the file says of its source, and what chat needs."""
        return metadata_of(self.folder) | {"source": model.name.encode("utf-8", "replace").decode("utf-8")}

    def tokenizer_json(self) -> bytes:
        """The tokenizer."""
        return tokenizer_json_in(self.folder)

    def _all(self) -> tuple[HfConfig, ...]:
        return self.genai, self.config, self.generation
