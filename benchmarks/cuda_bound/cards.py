"""What is published of the cards, and where nothing is, what is assumed (marked: assumed)."""

from dataclasses import dataclass

from synergen_ext.training.gpus import GPUS


@dataclass(frozen=True)
class Card:
    name: str
    arch: str  # whose machine code runs there
    sms: int
    clock: float  # Hz, boost
    dram: float  # bytes/s
    l2: float  # bytes/s, reads
    l2_bytes: float
    mma: float  # FLOP a cycle and SM of mma.sync, 16-bit operands, float sums, dense
    fma_lanes: int  # float32, a cycle and SM
    fp64_lanes: int
    shared_bytes: int  # of an SM, for blocks
    threads: int  # of an SM
    blocks: int
    alu_lanes: int = 64  # whole numbers
    xu_lanes: int = 16
    registers: int = 65536
    launch: float = 1.3e-6  # s, from one kernel of a CUDA graph to the next; reported for an H100, assumed elsewhere
    barrier: float = 1.2e-6  # s, of a whole grid; megakernels report 1.2 to 1.7 with what they wait for, assumed
    dram_latency: float = 0.7e-6  # s, under load; idle 0.4 to 0.6 is measured on A100 and H100, assumed
    l2_latency: float = 0.2e-6  # s; 200 to 270 cycles are measured on A100 and H100, assumed elsewhere

    @property
    def tensor(self) -> float:
        """FLOP/s of mma.sync."""
        return self.mma * self.sms * self.clock


# A100 80 GB SXM (NVIDIA's A100 whitepaper and data sheet): 108 SMs, 1.41 GHz, 2,039 GB/s, 312 TFLOP/s = 2048 FLOP a
# cycle and SM, float32 19.5, float64 9.7 TFLOP/s; L2 40 MB, 5,120 bytes a cycle; 164 KB of shared memory.
A100 = Card("A100", "80", 108, 1.41e9, GPUS["a100"].bandwidth, 5120 * 1.41e9, 40e6, 2048, 64, 32, 164 << 10, 2048, 32)

# H100 SXM (NVIDIA's H100 whitepaper and data sheet): 132 SMs, 3.35 TB/s, 989 TFLOP/s by wgmma = 4096 FLOP a cycle and
# SM at 1.83 GHz, float32 67, float64 34 TFLOP/s; L2 50 MB; 228 KB of shared memory. mma.sync reaches 62.9 % of the
# wgmma peak (microbenchmarks, arXiv 2402.13499). L2 reads: assumed 32 bytes a cycle and SM, 7.7 TB/s; 5.5 to 7 TB/s
# are measured on the PCIe card, with 114 SMs at lower clocks.
H100 = Card(
    "H100",
    "90",
    132,
    1.83e9,
    GPUS["h100"].bandwidth,
    32 * 132 * 1.83e9,
    50e6,
    0.62 * 4096,
    128,
    64,
    228 << 10,
    2048,
    32,
)

# RTX 4090 (NVIDIA's Ada whitepaper): 128 SMs, 2.52 GHz, 1,008 GB/s, 165.2 TFLOP/s with float sums = 512 FLOP a cycle
# and SM, float32 82.6, float64 1.29 TFLOP/s; L2 72 MB; 100 KB of shared memory. It runs the code of sm_80. L2 reads:
# assumed 16 bytes a cycle and SM, 5.2 TB/s, near what is measured.
RTX4090 = Card(
    "RTX 4090", "80", 128, 2.52e9, GPUS["rtx4090"].bandwidth, 16 * 128 * 2.52e9, 72e6, 512, 128, 2, 100 << 10, 1536, 24
)

# B200 (NVIDIA's data sheets, published microbenchmarks): 148 SMs, 1.85 GHz, 8 TB/s, float32 75, float64 37 TFLOP/s; L2
# 126 MB; 228 KB of shared memory. mma.sync is not its main path and no figure is published: assumed as an H100 per SM.
# L2 reads: assumed as an H100 per SM.
B200 = Card(
    "B200",
    "100",
    148,
    1.85e9,
    GPUS["b200"].bandwidth,
    32 * 148 * 1.85e9,
    126e6,
    0.62 * 4096,
    128,
    64,
    228 << 10,
    2048,
    32,
)

CARDS = (A100, H100, RTX4090, B200)
