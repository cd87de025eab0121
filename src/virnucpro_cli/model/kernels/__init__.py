"""Steps of the forward around attention: `plain` in PyTorch for every device, `fused` in Triton, one file per kernel.

Both have the same functions, so that either is the other's twin: `prepare` the weights, `rotary` for a batch, and for
each layer `query_key_value`, `add_attention`, `inner`, `add_inner`; `residual` or `last_norm` for wanted layers.
"""
