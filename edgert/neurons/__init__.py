"""Neurons that stay on flash and are read when they fire: feed-forwards larger than memory."""

from edgert.neurons.loading import open_streamed
from edgert.neurons.store import NeuronStore, neuron_parts

__all__ = ["NeuronStore", "neuron_parts", "open_streamed"]
