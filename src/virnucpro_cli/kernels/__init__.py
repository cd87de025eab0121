"""The steps of the forward around attention: `plain` in PyTorch for every device, `fused` in Triton, one file per kernel.

Both have the same functions, so that either is the other's twin: `arrange`, `rotary`, `rotary_linear`, `gelu_linear`,
`add_norm` and `layer_norm` (PyTorch's in both).
"""
