"""GPU work around an engine, one module per task: frames to its input, its outputs to packed rows.

Functions over torch tensors on one CUDA device: shapes known beforehand, no wait for the device, fixed
addresses, so that each can be captured in a CUDA graph. `jit` holds the Triton programs; they are imported
when first launched, so that everything here imports without Triton and without a GPU.
"""
