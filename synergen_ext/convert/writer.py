"""A safetensors file written one tensor at a time, so that a model never has to be in memory whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

#: The format's names of the dtypes that we write.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip


def write_safetensors(
    path: Path, plan: dict[str, tuple[tuple[int, ...], torch.dtype]], tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str] | None = None, align: int = 8,
) -> None:  # fmt: skip
    """Write ``tensors`` in the order of ``plan``, which says every shape and dtype beforehand.

    ``safetensors.torch.save_file`` wants all tensors at once. The format is a length, a JSON header with every offset,
    and the bytes; the header depends on shapes only, so it can be written first.

    Args:
        metadata: texts for the header; default: that the tensors are PyTorch's.
        align: the first tensor begins at a multiple of so many bytes, itself a multiple of 8.

    Raises:
        ValueError: a tensor comes that the plan does not have next, or one of the plan is missing.
    """
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in plan.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % align)  # readers want the data aligned
    wanted = iter(plan.items())
    with open(path, "xb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            due, (shape, dtype) = next(wanted, (None, ((), torch.float32)))
            if (name, tuple(tensor.shape), tensor.dtype) != (due, shape, dtype):
                raise ValueError(
                    f"write: {due} must be {list(shape)} {dtype}, got {name} {list(tensor.shape)} {tensor.dtype}"
                )
            f.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if (left := next(wanted, None)) is not None:
            raise ValueError(f"write: {left[0]} was planned, got nothing")
        f.flush()
        os.fsync(f.fileno())
