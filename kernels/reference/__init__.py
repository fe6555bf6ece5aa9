"""The NumPy twin of every kernel: its definition, its test oracle, and its stand-in without the JIT."""
