"""The masked layer in Triton. Imported where a tensor is on a GPU, and by tests that interpret it.

Routing, grouping, two grouped matrix products and a combine, each a kernel of its own; no atomics,
no word from the device to the host, and grids of a size that shapes alone decide, so that CUDA
graphs capture the whole.
"""
