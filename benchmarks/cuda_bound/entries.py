"""The kernels at their main sizes: launches, bytes and operations, as their launchers in csrc/cuda/ make them.

To add one: a function of the card that lists its launches, and an Entry below. Names of kernels are those of
tools/cuda_budgets.json; run tools/cuda_compiled.py --update afterwards.
"""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from .cards import Card
from .model import Entry, Launch

#: Turns of loops not named: none in Rows::offset where rows have one dimension, and none over what a block has not.
NO_TURNS = 0.0

# ---- rms_norm, rope: 8,192 tokens of the paper's widths


def rms_norm(card: Card) -> list[Launch]:
    rows, row = 8192, 2048 * 2
    # A thread asks for all its 16 bytes at once: 64 threads hold 4 x 16 bytes of 2,048 elements each.
    return [
        Launch("rms_norm_kernel<RmsNormParams, bf16, bf16, 8>", rows, 64, dram=2 * rows * row, l2=3 * rows * row,
               in_flight=row, others=NO_TURNS),
    ]  # fmt: skip


def rms_norm_backward(card: Card) -> list[Launch]:
    rows, row, pieces = 8192, 2048 * 2, 512
    parts = pieces * 2048 * 4
    return [
        Launch("rms_norm_backward_kernel<RmsNormBackwardParams, bf16, bf16, 8>", pieces, 256,
               dram=3 * rows * row + parts, l2=4 * rows * row + parts, in_flight=2 * row,
               per_warp={"BAR": 4 * rows / pieces * 0.4}, others=NO_TURNS,
               waits=(rows / pieces, 0)),
        Launch("rms_norm_weight_kernel<float, bf16>", 8, 256, l2=parts, per_warp={"LDG": pieces},
               waits=(0, pieces / 4)),
    ]  # fmt: skip


def rope(card: Card) -> list[Launch]:
    tokens, heads, dim = 8192, 16 + 8, 128
    size = tokens * heads * dim * 2
    items = heads * dim // 2 // 8  # two packs of 8 each
    turns = ceil(items / 128)
    return [
        Launch("rope_kernel<bf16, 8>", tokens, 128, dram=2 * size, in_flight=heads * dim * 2 / turns,
               # Half of the warps compute sines; of the code of queries and keys a turn runs one, so half.
               per_warp={"DFMA": 26 * 0.5, "LDG": 4 * 1.5 / 2}, others=NO_TURNS, waits=(1 + turns, 0)),
    ]  # fmt: skip


# ---- fold_tokens: 8 pictures of 64 x 64 tokens, 2,048 wide, 2 x 8 at a time


def fold_tokens(card: Card) -> list[Launch]:
    tokens, row, positions = 8 * 4096, 2048 * 2, 4096
    return [
        # The positions stay in L2 from one picture to the next where it is as large; they are 17 MB.
        Launch("fold_tokens_kernel<bf16, 8>", tokens // 4, 256, dram=(2 * tokens + positions) * row,
               l2=3 * tokens * row, in_flight=4 * row * 2, per_warp={"STG": 4}, waits=(2, 0)),
    ]  # fmt: skip


def fold_tokens_backward(card: Card) -> list[Launch]:
    tokens, row, vocab, raster = 8 * 4096, 2048 * 2, 32768, 4096
    tiles, pieces = tokens // 1024, tokens // 256
    words = tokens * 4
    passes = 2  # of 8 bits: the vocabulary fills 15, and the mark of an id out of range is the sixteenth
    sort = [
        Launch("fill_keys_kernel", tokens // 256, 256, dram=3 * words),
        Launch("count_digits_kernel", tiles // 4, 128, l2=words, per_warp={"ATOMS": 32}, waits=(0, 32), times=passes),
        Launch("fold_tokens_backward/scan_counts_kernel", 1, 1024, l2=3 * 256 * tiles * 4,
               per_warp={"LDG": 8}, waits=(0, 16), times=passes),
        Launch("scatter_kernel", tiles // 4, 128, l2=4 * words, per_warp={"STG": 64}, waits=(0, 64), times=passes),
        Launch("find_segments_kernel", vocab // 256 + 1, 256, l2=16 * vocab * 4, per_warp={"LDG": 15}, waits=(0, 15)),
    ]  # fmt: skip
    return [
        *sort,
        # Every token its own id, as in a picture without a plain background: rows are written where they are summed.
        Launch("sum_pieces_kernel<bf16, 8>", pieces * 2, 128, dram=2 * tokens * row, in_flight=4 * 128 * 16,
               per_warp={"STG": 48 * 256 / 4}, waits=(256 / 4, 0)),
        Launch("finish_table_kernel<bf16>", vocab, 128, l2=vocab * 8, others=NO_TURNS, waits=(0, 2)),
        Launch("sum_pictures_kernel<bf16, 8>", raster * 2, 128, dram=(tokens + raster) * row, in_flight=4 * 128 * 16,
               per_warp={"LDG": 8}, waits=(2, 0)),
    ]  # fmt: skip


# ---- add_rms_norm: x, the residual, their sum and y


def add_rms_norm(rows: int) -> Callable[[Card], list[Launch]]:
    def launches(card: Card) -> list[Launch]:
        row = 2048 * 2
        return [
            Launch("rms_norm_kernel<AddRmsNormParams, bf16, bf16, 8>", rows, 64, dram=4 * rows * row,
                   l2=5 * rows * row, in_flight=2 * row, others=NO_TURNS),
        ]  # fmt: skip

    return launches


# ---- expert_ffn: D = 2048, F = 8192, bfloat16


def route_tokens(card: Card) -> list[Launch]:
    """Once for all layers of a model."""
    tokens = 8192
    return [
        Launch("count_pairs_kernel", tokens // 256, 32, l2=tokens * 8, per_warp={"ATOMS": 8}, waits=(1, 8)),
        Launch("route_tokens/scan_counts_kernel", 1, 1024, others=NO_TURNS, waits=(0, 2)),
        Launch("scatter_pairs_kernel", tokens // 256, 32, l2=tokens * 12, per_warp={"STG": 8}, waits=(0, 9)),
    ]


def expert_ffn(card: Card) -> list[Launch]:
    tokens, dim, hidden, experts = 8192, 2048, 8192, 2
    tiles, rows, columns, shared = tokens // 128, 128, 256, 96 << 10
    weights, x, inner = experts * dim * hidden * 2, tokens * dim * 2, tokens * hidden * 2

    def product(kernel: str, width: int, depth: int, dram: float) -> Launch:
        blocks = tiles * width // columns
        # Eight warps of 64 x 64: 32 mma for 16 of the depth. Tiles of one column are neighbours, so L2 serves again.
        return Launch(f"{kernel}<TensorCores<bf16>>", blocks, 256, shared, dram=dram,
                      l2=blocks * (rows + columns) * depth * 2 + tokens * width * 2, flops=2 * tokens * width * depth,
                      per_warp={"HMMA": depth / 16 * 32}, in_flight=2 * 24 << 10)  # fmt: skip

    return [
        Launch("list_tiles_kernel", 1, 1024, others=NO_TURNS, waits=(0, 2)),  # the caller brings the routing
        product("gate_up_kernel", 2 * hidden, dim, 2 * weights + x + inner),
        product("down_kernel", dim, hidden, weights + inner + x),
    ]


def expert_ffn_decode(weight: str, bits: float) -> Callable[[Card], list[Launch]]:
    """Two rows of one expert, in one launch."""

    def launches(card: Card) -> list[Launch]:
        dim, hidden, warps, blocks = 2048, 8192, 16, 128
        dram = 3 * dim * hidden * bits / 8
        # All warps of a block have the same 16 weight rows (down), or 8 pairs of warps have (gate, up).
        depth = dim / 2 + hidden / 16
        chunk = 32 * {"bf16": 1, "signed char": 2, "Nibbles": 4}[weight]
        # A turn of the loops over rings of four chunks; over rounds, and what is in it, one for each product.
        rings = "LDS:2" if card.arch == "80" and weight != "bf16" else "LDS:3"
        return [
            Launch(f"ffn_single_kernel<bf16, {weight}>", blocks, 32 * warps, warps * 4096, dram=dram,
                   l2=dram + blocks * 2 * (dim + hidden) * 2,
                   per_warp={"HMMA": depth / 16, rings: depth / chunk / 4}, in_flight=warps * 4096,
                   # What the barrier stops has all its chunks under way but those of the warp that waits for the grid.
                   barriers=1, ahead=(warps - 1) * 4096, edges={"LDGSTS:1": 8, "BAR:2": 2, "STG:1": 1},
                   stops={"BAR:2": 2, "STG:2": 1}, waits=(2, 1)),
        ]  # fmt: skip

    return launches


# ---- linear_cross_entropy: 4,096 rows, D = 2048, V = 32,768, bfloat16


def _tiles(kernel: str, high: int, wide: int, depth: int, dram: float, times: int = 1) -> Launch:
    """A product by tiles of 128 x 256."""
    blocks = high // 128 * wide // 256
    return Launch(f"{kernel}<TensorCores<bf16>>", blocks, 256, 96 << 10, dram=dram, l2=blocks * 384 * depth * 2,
                  flops=2 * high * wide * depth, per_warp={"HMMA": depth / 16 * 32}, in_flight=2 * 24 << 10,
                  others=NO_TURNS, times=times)  # fmt: skip


def linear_cross_entropy(card: Card) -> list[Launch]:
    rows, dim, vocab = 4096, 2048, 32768
    tiles = vocab // 256
    pairs = tiles * rows * 8
    return [
        _tiles("logits_kernel", rows, vocab, dim, (rows + 2 * vocab) * dim * 2 + pairs),
        Launch("join_kernel<float>", rows // 32, 256, dram=0, l2=2 * pairs, per_warp={"LDG": tiles / 8},
               waits=(0, 2 * tiles / 8 / 4)),
    ]  # fmt: skip


def linear_cross_entropy_backward(card: Card) -> list[Launch]:
    rows, dim, vocab, piece = 4096, 2048, 32768, 8192
    pieces = vocab // piece
    p, x, sums = rows * piece * 2, rows * dim * 2, rows * dim * 4
    return [
        _tiles("probabilities_kernel", rows, piece, dim, piece * dim * 2 + x + p, pieces),
        _tiles("linear_cross_entropy_backward/input_kernel", rows, dim, piece, piece * dim * 2 + p + 2 * sums, pieces),
        _tiles("weights_kernel", piece, dim, rows, p + x + piece * dim * 2, pieces),
    ]


# ---- unfold_head: 16 steps of 4 layers and a classifier of 32,768, two rows, one picture


HEAD = {"qkv": 4096 * 2048, "out": 2048 * 2048, "hidden": 2 * 8192 * 2048, "down": 2048 * 8192}
CLASSIFIER = 32768 * 2048


def unfold_head_graph(card: Card) -> list[Launch]:
    steps, layers, warps, blocks = 16, 4, 16, 128

    def linear(elements: int, times: int) -> Launch:
        each = elements * 2 / blocks / warps  # bytes of a warp: 1 KiB holds 16 rows of 32
        return Launch("linear_kernel<bf16, 1, true>", blocks, 32 * warps, warps * 4096 + 8192, dram=elements * 2,
                      l2=elements * 2 * 1.25, per_warp={"HMMA": each / 512}, others=NO_TURNS,
                      in_flight=warps * min(4096, each), waits=(1, 1), times=times)  # fmt: skip

    return [
        Launch("embed_kernel<bf16>", 8, 512, l2=1 << 15, others=NO_TURNS, waits=(0, 2), times=steps),
        Launch("attend_kernel<bf16, true>", 32, 32, l2=1 << 18, others=1, waits=(0, 3), times=steps * layers),
        *(linear(elements, steps * layers) for elements in HEAD.values()),
        linear(CLASSIFIER, steps),
        replace(sample_tokens(1, False)(card)[0], kernel="sample_tokens_kernel<float, 4>", dram=0, times=steps),
    ]


def unfold_head_persistent(card: Card) -> list[Launch]:
    steps, layers, warps = 16, 4, 16
    elements = layers * sum(HEAD.values()) + CLASSIFIER
    barriers = layers * 6 + 3  # of a step: five products and attention a layer; classify, scan, embed
    each = steps * elements * 2 / 128 / warps
    return [
        Launch("all_kernel<bf16, 1, true>", card.sms, 32 * warps, (160 if card.shared_bytes > 200 << 10 else 80) << 10,
               dram=steps * elements * 2, l2=steps * elements * 2 * 1.25, per_warp={"HMMA": each / 512},
               others=NO_TURNS, in_flight=warps * 4096, waits=(1, steps * (layers * 7 + 12)),
               # Each counts whole, though the ring goes on reading weights meanwhile.
               barriers=steps * barriers),
    ]  # fmt: skip


# ---- decode_attention: two rows, 16 query heads, 8 key-value heads of 128


def decode_attention(keys: int) -> Callable[[Card], list[Launch]]:
    def launches(card: Card) -> list[Launch]:
        rows, kv_heads, dim = 2, 8, 128
        kernel = "decode_attention_mma_kernel<bf16, 128>"
        whole = keys <= 512
        spans = 1 if whole else ceil(keys / 256)
        span = keys if whole else 256
        warps = min(8, ceil(span / 16))
        steps = ceil(span / 16 / warps)
        size = 2 * rows * kv_heads * keys * dim * 2
        blocks = rows * kv_heads * spans
        parts = 0 if whole else rows * 16 * spans * (dim + 2) * 4
        loops = {"HMMA": 24 * steps}
        first = Launch(kernel, blocks, 32 * warps, dim * 16 + warps * 2 * (dim + 2) * 4, dram=size, l2=size + parts,
                       per_warp=loops, in_flight=warps * 8192, waits=(1 + steps, 1))  # fmt: skip
        join = Launch("decode_attention_join_kernel<bf16>", rows * 16, 128, l2=2 * parts,
                      per_warp={"LDG": spans}, waits=(0, 2 + spans / 4))  # fmt: skip
        return [first] if whole else [first, join]

    return launches


# ---- sample_tokens: guided, 32,768 tokens, and with top-k and top-p


def sample_tokens(rows: int, filtered: bool) -> Callable[[Card], list[Launch]]:
    def launches(card: Card) -> list[Launch]:
        vocab, tiles = 32768, 8
        most = min(card.sms // rows, tiles)  # at one block an SM
        parts = ceil(tiles / ceil(tiles / most)) if most > 1 else 1
        turns = tiles / parts
        logits = 2 * rows * vocab * 2
        # The row's last block is the one that all wait for. Shares of code are counted, not judged: which source lines
        # run at this size in the emulator (gcov), and which instructions of sm_90 are theirs (nvcc -lineinfo), without
        # the ways of a warp that diverges at a shuffle (BRA.DIV): no schedule lets one. What runs in few warps, as what
        # is done with a bin's few tokens, has the share of warps that hold one. Packed reads of logits and the first
        # tile's read outside of the loops leave 0.07 of scan's loop, 0.25 where it counts digits; each further
        # tile adds its read.
        more = turns - 1
        loops = {"LDG:1": 18 * ((0.25 if filtered else 0.07) * turns + 0.35 * more)}
        if filtered:
            # 2,048 and one bin of keys are 260 places of a tile on average: 4.6 of a thread's eight (0.57), and a mass
            # each for nine of sixteen warps. The list is fetched by the first of four walks. The end of top-k needs no
            # digit (BAR:2 and ATOMS to 4): 26 tokens are in its bin. Walks by places in the list do not run.
            loops |= {"BAR:1": 2 * (0.31 * turns + 0.27 * more), "DFMA:1": 7 * 0.56 * turns, "DFMA:2": 0.0}
            loops |= {"BAR:2": 0.0, "ATOMS:2": 0.0, "ATOMS:3": 0.0, "ATOMS:4": 0.0}
            loops |= {"BAR:3": 3 * 0.70, "ATOMS:6": 0.0, "ATOMS:7": 24 * 0.43, "STG:4": 0.64}
            # The tokens of both ends are put in order by the same code on sm_80.
            one = {"ATOMS:5": 8 * (0.35 + 0.29)}
            loops |= one if card.arch == "80" else {"ATOMS:5": 8 * 0.35, "ATOMS:8": 0.0, "ATOMS:9": 8 * 0.29}
        else:
            loops |= {"BAR:1": 0.0, "DFMA:1": 0.0, "DFMA:2": 56 * (0.56 * turns + 0.17 * more)}
            loops |= {"BAR:2": 0.0, "BAR:3": 0.0, "STG:4": 0.0} | {
                f"ATOMS:{i}": 0.0 for i in range(2, 8 if card.arch == "80" else 10)
            }
        # One after another: parts, counts, the keys of the list again, fence and count of arrivals (2), the list (2),
        # sums of chunks, of threads, the token, its id. Options are asked for together with logits.
        l2 = 11 if filtered else 6
        return [
            Launch("sample_tokens_kernel<bf16, 8>", rows * parts, 512, dram=logits, l2=2 * logits,
                   per_warp=loops, straight=0.555 if filtered else 0.385, alone=0.24 if filtered else 0.20,
                   others=0.4 if filtered else 0.05, waits=(1, l2 + turns - 1),
                   barriers=1 if parts > 1 else 0),
        ]  # fmt: skip

    return launches


ONE_LAUNCH = "a launch and its edges are 2.9 us, however few bits the weights have"
UNPACKING = (
    "1.51 of the bytes' 8.0 us: a launch and its first load alone make 1.25 of them; unpacking, which stops where the "
    "grid does, takes 9.1 us"
)

ENTRIES = (
    Entry("rms_norm 8192 x 2048", rms_norm),
    Entry("rms_norm 8192 x 2048, backward", rms_norm_backward, None,
          why="a block takes 16 rows one after another, and 8 blocks alone add up dweight, 128 round trips to L2"),
    Entry("add_rms_norm 8192 x 2048", add_rms_norm(8192)),
    Entry("add_rms_norm 2 rows", add_rms_norm(2), None, why="32 KB: a launch and two round trips"),
    Entry("rope 8192 tokens", rope),
    Entry("fold_tokens 8 pictures", fold_tokens),
    Entry("fold_tokens 8 pictures, backward", fold_tokens_backward, None,
          why="64-bit divisions for every row, and a sort of 32 tiles by 8 blocks, mostly waiting"),
    Entry("route_tokens 8192 tokens", route_tokens, None, why="128 KB: three launches, and one block scans the counts"),
    Entry("expert_ffn 2048 text + 6144 image", expert_ffn),
    Entry("expert_ffn decode 2 rows, bf16", expert_ffn_decode("bf16", 16), at_most_ideal=1.2),
    Entry("expert_ffn decode 2 rows, int8", expert_ffn_decode("signed char", 8), None, at_most_ideal=1.2,
          why=ONE_LAUNCH),
    Entry("expert_ffn decode 2 rows, int4", expert_ffn_decode("Nibbles", 4.25), None, why=UNPACKING),
    Entry("linear_cross_entropy 4096 rows", linear_cross_entropy, None,
          why="0.849: 4,096 tiles on 132 multiprocessors are 31.03 waves, counted as 32; 0.875 were they not whole"),
    Entry("linear_cross_entropy 4096 rows, backward", linear_cross_entropy_backward),
    Entry("unfold_head 16 steps, 2 rows, bf16, graph", unfold_head_graph, None, at_most_ideal=1.35,
          why="23 launches a step: 1.34 of the bytes' time, where one launch for all is 1.17"),
    Entry("unfold_head 16 steps, 2 rows, bf16, persistent", unfold_head_persistent, at_most_ideal=1.35),
    Entry("decode_attention 2 rows, 400 keys", decode_attention(400), None,
          why="3.3 MB, 1 us of bandwidth: a launch and five round trips to memory"),
    Entry("decode_attention 2 rows, 4096 keys", decode_attention(4096), None,
          why="34 MB, 10 us of bandwidth, beside two launches"),
    Entry("sample_tokens 16 rows", sample_tokens(16, False), None, at_most=10,
          why="2 MB, 0.6 us of bandwidth: round trips, a barrier of the grid and float64"),
    Entry("sample_tokens 16 rows, top-k, top-p", sample_tokens(16, True), None, at_most=10,
          why="2 MB, 0.6 us of bandwidth: round trips, barriers and selection in one block a row"),
)  # fmt: skip
