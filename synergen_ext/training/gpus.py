"""What is published of the cards that a training is planned for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Of one card: bytes of memory (the data sheet's GB as 1e9), bytes/s of it, dense bfloat16 FLOP/s."""

    name: str
    memory: float
    bandwidth: float
    bfloat16: float


#: NVIDIA's data sheets: A100 80 GB SXM, H100 SXM, H200 SXM, HGX B200, and the Ada whitepaper (float sums). Dense: half
#: of what is printed with sparsity.
GPUS = {
    "a100": Gpu("A100", 80e9, 2.039e12, 312e12),
    "h100": Gpu("H100", 80e9, 3.35e12, 989e12),
    "h200": Gpu("H200", 141e9, 4.8e12, 989e12),
    "b200": Gpu("B200", 180e9, 8e12, 2250e12),
    "rtx4090": Gpu("RTX 4090", 24e9, 1.008e12, 165.2e12),
}
