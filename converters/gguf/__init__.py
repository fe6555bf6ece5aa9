"""GGUF files: read, decoded, and turned into what edgert stores."""
