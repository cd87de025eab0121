"""Steps of the forward around attention: `plain` in PyTorch for every device, `fused` in Triton for Hopper, one file
per kernel, and `portable` in Triton for other GPUs. `contacts` adds up attention maps.

All steps have the same functions, so that each is another's twin: `prepare` the weights, `rotary` for a batch, and for
each layer `query_key_value`, `add_attention`, `inner`, `add_inner`; `residual` or `last_norm` for wanted layers.
"""

OPTIONS = {"enable_fp_fusion": True}
"""Options of the compiler for every kernel: from Triton 3.10 on it fuses products and sums only if one asks for it."""
