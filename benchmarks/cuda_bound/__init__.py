"""How fast the CUDA kernels can be at best on cards that are not here: see docs/cuda-without-a-gpu.md."""
