"""Steps of the forward around attention as kernels: `fused` in Triton for Hopper, one file per kernel, and `portable`
in Triton for other GPUs. `contacts` adds up attention maps.

All steps have the same functions as those in `model.plain`, so that each is another's twin.
"""

OPTIONS = {"enable_fp_fusion": True}
"""Options of the compiler for every kernel: from Triton 3.10 on it fuses products and sums only if one asks for it."""
