"""ONNX models in: a safe opener, recognition by the structure of the graph, and its weights."""
