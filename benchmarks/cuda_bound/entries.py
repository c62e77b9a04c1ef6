"""The kernels at their main sizes: launches, bytes and operations, as their launchers in csrc/cuda/ make them.

To add one: a function of the card that lists its launches, and an Entry below. Names of kernels are those of
tools/cuda_budgets.json; run tools/cuda_compiled.py --update afterwards.
"""

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
        Launch("rms_norm_kernel<bf16, bf16, 8>", rows, 64, dram=2 * rows * row, l2=3 * rows * row, in_flight=row,
               others=NO_TURNS),
    ]  # fmt: skip


def rms_norm_backward(card: Card) -> list[Launch]:
    rows, row, pieces = 8192, 2048 * 2, 512
    parts = pieces * 2048 * 4
    return [
        Launch("rms_norm_backward_kernel<bf16, bf16, 8>", pieces, 256, dram=3 * rows * row + parts,
               l2=4 * rows * row + parts, in_flight=2 * row, per_warp={"BAR": 4 * rows / pieces * 0.4}, others=NO_TURNS,
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
        Launch("scan_counts_kernel", 1, 1024, l2=3 * 256 * tiles * 4, per_warp={"LDG": 8}, waits=(0, 16),
               times=passes),
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


ENTRIES = (
    Entry("rms_norm 8192 x 2048", rms_norm),
    Entry("rms_norm 8192 x 2048, backward", rms_norm_backward, None,
          why="a block takes 16 rows one after another, and 8 blocks alone add up dweight, 128 round trips to L2"),
    Entry("rope 8192 tokens", rope),
    Entry("fold_tokens 8 pictures", fold_tokens),
    Entry("fold_tokens 8 pictures, backward", fold_tokens_backward, None,
          why="64-bit divisions for every row, and a sort of 32 tiles by 8 blocks, mostly waiting"),
)  # fmt: skip
