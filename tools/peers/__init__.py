"""edgert beside its peers: the same work on each runtime, interleaved.

The driver (`__main__`) runs where edgert is installed; each runtime works in a process of its own
and answers on a pipe (`protocol`), so that the peers' packages need not live in edgert's environment.
"""
