"""The same model for every runtime, made in a working folder: random weights in a shape, or a real model."""

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edgert.config import ModelSpec
from edgert.converters import convert
from edgert.format import ErtFile, ErtWriter, declared
from edgert.model.shapes import random_weights, shape

from .measure import PACKAGE_ROOT, Runtime
from .results import LLAMA_CPP, ORT_GENAI, OURS

SMOKE = "smoke"
"""A shape in which everything is over at once: to see that all parts work, not to measure."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where model files go, and the interpreters that make and read them."""

    folder: Path
    our_python: str
    peers_python: str

    def shape(self, name: str, with_ort: bool) -> tuple[ModelSpec, list[Runtime]]:
        """Random weights in a shape. The peers' files are kept; ours takes seconds and is always new."""
        spec = _smoke_shape() if name == SMOKE else shape(name)
        text = json.dumps(spec.to_json())
        ours = self.folder / f"{name}.ert"
        _write_random(ours, spec)
        gguf = self._kept(f"{name}-{_digest(text.encode())}.q4_0.gguf", "gguf_models", text)
        runtimes = [self._ours(ours), self._llama_cpp(gguf)]
        if with_ort:
            folder = self._kept(f"{name}-{_digest(text.encode())}-int4", "ort_genai_models", text)
            runtimes.append(Runtime(ORT_GENAI, self.peers_python, "ort_genai_worker", folder))
        return spec, runtimes

    def folder_model(self, source: Path) -> tuple[ModelSpec, list[Runtime]]:
        """A Hugging Face folder with one safetensors file, each runtime rounding it to its 4 bits."""
        name = source.resolve().name
        ours = self.folder / f"{name}.ert"
        convert(source, ours, "q4")
        with ErtFile.open(ours) as file:
            spec = file.spec
        text = json.dumps(spec.to_json())
        digest = _digest(text.encode(), (source / "model.safetensors").read_bytes())
        gguf = self._kept(f"{name}-{digest}.q4_0.gguf", "gguf_models", text, str(source.resolve()))
        return spec, [self._ours(ours), self._llama_cpp(gguf)]

    def _ours(self, file: Path) -> Runtime:
        return Runtime(OURS, self.our_python, "edgert_worker", file)

    def _llama_cpp(self, file: Path) -> Runtime:
        return Runtime(LLAMA_CPP, self.peers_python, "llama_cpp_worker", file)

    def _kept(self, name: str, module: str, spec_json: str, *more: str) -> Path:
        """The file or folder `name`, made by a module in the peers' environment if it is not there yet."""
        path, log = self.folder / name, self.folder / f"{module}.log"
        if path.exists():
            return path
        print(f"making {name} ...", file=sys.stderr, flush=True)
        command = [self.peers_python, "-m", f"peers.{module}", spec_json, str(path), *more]
        environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}
        with log.open("w") as lines:  # the builders print a line per tensor
            done = subprocess.run(command, env=environment, stdout=lines, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{name} could not be made; the log is {log}")
        return path


def matrix_parameters(spec: ModelSpec) -> int:
    """Weights in matrices, the tied embedding once."""
    return sum(math.prod(decl.shape) for decl in declared(spec) if decl.role == "matrix")


def _smoke_shape() -> ModelSpec:
    return ModelSpec("llama", 2, 128, 4, 2, 32, 384, 512, 8192, 1e-5, tied_embeddings=True)


def _write_random(path: Path, spec: ModelSpec) -> None:
    # A file, not an array: mapped pages are what a user's model is read from.
    weights = random_weights(spec, "q4")
    quants = {name: tensor.quant for name, tensor in weights.tensors.items() if tensor.role == "matrix"}
    with ErtWriter(path, spec, quants) as writer:
        for name, tensor in weights.tensors.items():
            writer.write(name, weights.data[tensor.offset : tensor.offset + tensor.nbytes])
        writer.finish()


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:12]
