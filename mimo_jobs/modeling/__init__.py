"""The Qwen3.5-VL model on megatron-core: modules, the `MimoModel` that joins them, and one forward pass.

Needs no transformer-engine, apex or flash-linear-attention; runs on CUDA with NCCL and on CPU with gloo.
"""
