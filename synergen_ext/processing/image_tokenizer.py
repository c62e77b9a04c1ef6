"""Pixels <-> image token ids: Emu3's VQ tokenizer on its exact one-frame path.

Emu3's tokenizer is a video model. transformers encodes a picture as ``temporal_downsample_factor`` (4) copies of
itself and decodes 4 frames to keep the first. Everything before the temporal layers works frame by frame, and the
temporal convolutions are causal, so one spatial pass gives the same ids and, up to the rounding of sums taken in
another order, the same first frame (``test_image_tokenizer.py``: 2e-13 in float64). It saves three quarters of nearly
all the work; ``benchmarks/bench_model.py`` times it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from ..weights import read_weights

CONFIG_FILE = "image_tokenizer.json"
WEIGHTS_FILE = "image_tokenizer.safetensors"
#: Largest picture side accepted, in pixels: 4096 x 4096 is 262,144 ids, 64 pictures of the paper's size.
MAX_SIDE = 4096


class ImageTokenizer(nn.Module):
    """Emu3's VQ tokenizer for single pictures.

    Args:
        config: transformers' ``Emu3VQVAEConfig``; the defaults are the published 270 M-parameter tokenizer.
        window: pixels ``(height, width)`` of the windows that are encoded each by itself, or None to encode whole
            pictures, as Emu3 does. Emu3's encoder norms and attends over all it is given, so the ids of a patch
            move with the rest of the picture; in windows they depend on their own window only. Decoding always sees
            the whole picture.
    """

    def __init__(self, config: Emu3VQVAEConfig | None = None, window: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.config = config or Emu3VQVAEConfig()
        self.vq = Emu3VQVAE(self.config)
        self.vq.eval()
        self.window = window
        if window is not None and not all(0 < side <= MAX_SIDE and side % self.stride == 0 for side in window):
            raise ValueError(
                f"image tokenizer: window must be two multiples of {self.stride} pixels up to {MAX_SIDE}, "
                f"got {list(window)}"
            )

    @property
    def codebook_size(self) -> int:
        return int(self.config.codebook_size)

    @property
    def codebook(self) -> Tensor:
        """The code vectors ``[V, c]``."""
        return self.vq.quantize.embedding.weight.detach()

    @property
    def stride(self) -> int:
        """Pixels a side of one token (paper: p = 8)."""
        return int(self.vq.spatial_scale_factor)

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` in [-1, 1] -> unquantised latents ``[B, c, H/p, W/p]``."""
        if self.window is None:
            return self._latents(pixels)
        return self._join(self._latents(self._windows(pixels)), *_grid(pixels, self.window))

    def _windows(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W]`` -> the windows in raster order, ``[B * R * C, 3, wh, ww]``."""
        assert self.window is not None
        (rows, columns), (wh, ww) = _grid(pixels, self.window), self.window
        b, c = pixels.shape[:2]
        return pixels.reshape(b, c, rows, wh, columns, ww).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, wh, ww)

    @staticmethod
    def _join(z: Tensor, rows: int, columns: int) -> Tensor:
        """What ``_windows`` cut, after encoding: ``[B * R * C, c, h, w]`` -> ``[B, c, R * h, C * w]``."""
        _, c, h, w = z.shape
        return z.view(-1, rows, columns, c, h, w).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, rows * h, columns * w)

    def _latents(self, pixels: Tensor) -> Tensor:
        encoder = self.vq.encoder
        h = encoder.conv_in(pixels)
        h = encoder.down_block(h)
        h = encoder.middle_block(h)
        h = encoder.norm_out(h)
        h = encoder.conv_out(h * torch.sigmoid(h))
        # [B, c, h, w] -> [B, c, T, h, w]: the frames of a still picture differ only from here on.
        h = h.unsqueeze(2).repeat(1, 1, self.config.temporal_downsample_factor, 1, 1)
        for conv in encoder.time_conv:
            h = conv(h)
            h = h * torch.sigmoid(h)
        for layer in encoder.time_res_stack:
            h = layer(h)
        return self.vq.quant_conv(h)[:, :, 0]

    def pixels(self, quantised: Tensor) -> Tensor:
        """Code vectors ``[B, c, h, w]`` -> pixels ``[B, 3, p*h, p*w]``, about [-1, 1] (not clamped)."""
        decoder = self.vq.decoder
        quant = quantised.unsqueeze(2)
        h = torch.cat((self.vq.post_quant_conv(quant), quant), dim=0)
        for layer in decoder.time_res_stack:
            h = layer(h)
        for layer in decoder.time_conv:
            # Frame 0 of the doubled sequence sees only itself and the causal padding.
            h = cast(nn.Module, layer.conv)(h)
            h = h * torch.sigmoid(h)
        h, quant = h[:, :, 0].chunk(2, dim=0)
        if h.dtype == torch.bfloat16 and h.device.type == "cpu":
            # Emu3's own, 512 x 512 pixels: 18 against 23 s (2 cores beside other work); float32 is no faster so.
            h, quant = (a.contiguous(memory_format=torch.channels_last) for a in (h, quant))
        h = decoder.conv_in(h)
        h = decoder.middle_block(h, quant)
        h = decoder.up_block(h, quant)
        h = decoder.norm_out(h, quant)
        return decoder.conv_out(h * torch.sigmoid(h))

    def nearest(self, latents: Tensor) -> Tensor:
        """Latents ``[B, c, h, w]`` -> ids ``[B, h, w]`` of the nearest codes (lowest id on a tie)."""
        return self.vq.quantize(latents.unsqueeze(1))[:, 0]

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids ``[B, h, w]`` -> code vectors ``[B, c, h, w]``."""
        return self.vq.quantize.embedding(ids).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` in [-1, 1] -> int64 ids ``[B, H/p, W/p]`` in raster order.

        Raises:
            ValueError: bytes in place of numbers, not three channels, or a side that is not a positive multiple of the
                stride (of the window, if there is one).
        """
        if not pixels.is_floating_point():
            raise ValueError(f"encode: pixels must be floating point in [-1, 1], got {pixels.dtype}; see to_pixels")
        p = self.stride
        b, c, h, w = _shape4(pixels)
        step_h, step_w = self.window or (p, p)
        if c != self.config.in_channels or h % step_h or w % step_w or not 0 < h <= MAX_SIDE or not 0 < w <= MAX_SIDE:
            raise ValueError(
                f"encode: pixels must be [B, {self.config.in_channels}, H, W] with H a multiple of {step_h} and W of "
                f"{step_w} up to {MAX_SIDE}, got {list(pixels.shape)}"
            )
        if b == 0:
            return torch.empty(0, h // p, w // p, dtype=torch.long, device=pixels.device)
        if self.window is None:
            return self.nearest(self.latents(pixels.to(self.vq.dtype)))
        # Ids of a window depend on its pixels alone, so equal windows (white, above all) are encoded once.
        windows = self._windows(pixels.to(self.vq.dtype))
        _, first, which = np.unique(_as_bytes(windows), return_index=True, return_inverse=True)
        ids = torch.cat(
            [self.nearest(self._latents(part)) for part in windows[torch.from_numpy(first)].split(_WINDOWS_AT_ONCE)]
        )
        return self._join(ids[torch.from_numpy(which), None], *_grid(pixels, self.window))[:, 0]

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids ``[B, h, w]`` -> pixels ``[B, 3, p*h, p*w]`` clamped to [-1, 1].

        Raises:
            ValueError: ids outside the codebook.
        """
        if ids.ndim != 3:
            raise ValueError(f"decode: ids must be [B, h, w], got {list(ids.shape)}")
        if ids.numel() == 0:
            b, h, w = ids.shape
            return torch.empty(b, 3, h * self.stride, w * self.stride, device=ids.device)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.codebook_size:
            bad = low if low < 0 else high
            raise ValueError(f"decode: ids must be in [0, {self.codebook_size}), got {bad}")
        return self.pixels(self.lookup(ids)).clamp(-1, 1)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the config and the weights (safetensors), the weights cast to ``dtype`` if given."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        state = {
            k: (v.to(dtype) if dtype and v.is_floating_point() else v).contiguous()
            for k, v in self.vq.state_dict().items()
        }
        save_file(state, str(folder / WEIGHTS_FILE))

    def save_config(self, folder: Path) -> None:
        """Write the config alone."""
        data = self.config.to_diff_dict()
        if self.window is not None:
            data["window"] = list(self.window)
        (folder / CONFIG_FILE).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")

    @classmethod
    def on_meta(cls, data: dict[str, Any], where: str) -> ImageTokenizer:
        """A tokenizer without memory for its weights, of a config's fields.

        Raises:
            ValueError: the fields are no tokenizer's, too large, or do not fit together.
        """
        config, window = _check_config(data, where)
        try:
            with torch.device("meta"):
                return cls(config, window)
        except (RuntimeError, ValueError, ZeroDivisionError) as e:  # widths that overflow, or do not divide
            raise ValueError(f"image tokenizer: {where} cannot be built: {e}") from e

    @classmethod
    def without_weights(cls, folder: str | Path) -> ImageTokenizer:
        """The tokenizer that ``save_pretrained`` wrote, on no memory: its sizes alone.

        Raises:
            FileNotFoundError: no config.
            ValueError: as of ``on_meta``.
        """
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"image tokenizer: no {CONFIG_FILE} in {folder}")
        return cls.on_meta(_read_config(path), str(path))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageTokenizer:
        """Load what ``save_pretrained`` wrote; weights come back in float32.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the config or the weights do not fit the class.
        """
        folder = Path(folder)
        if not (folder / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(f"image tokenizer: no {WEIGHTS_FILE} in {folder}")
        model = cls.without_weights(folder)
        state = read_weights(folder / WEIGHTS_FILE, model.vq.state_dict(), "image tokenizer")
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        model.vq.load_state_dict(state, assign=True)
        return model


#: The fields of ``Emu3VQVAEConfig`` that describe a tokenizer; a file's other fields are transformers' own.
CONFIG_FIELDS = (
    "codebook_size", "embed_dim", "latent_channels", "double_latent", "in_channels", "out_channels",
    "temporal_downsample_factor", "base_channels", "channel_multiplier", "num_res_blocks", "attn_resolutions",
    "hidden_size", "num_attention_heads", "attention_dropout",
)  # fmt: skip


#: Blocks take time to build even without memory, and the config may come from anywhere.
_MAX_BLOCKS = 64


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except ValueError as e:  # broken JSON or broken UTF-8
        raise ValueError(f"image tokenizer: {path} is not JSON: {e}") from e
    if not isinstance(data, dict):
        raise ValueError(f"image tokenizer: {path} must hold a JSON object, got {type(data).__name__}")
    return data


def _check_config(data: dict[str, Any], where: str) -> tuple[Emu3VQVAEConfig, tuple[int, int] | None]:
    try:
        config = Emu3VQVAEConfig(**{k: v for k, v in data.items() if k in CONFIG_FIELDS})
        blocks = max(config.num_res_blocks, len(config.channel_multiplier), config.temporal_downsample_factor)
    except Exception as e:  # transformers checks types with exceptions of its own
        raise ValueError(f"image tokenizer: {where} is not a tokenizer's config: {' '.join(str(e).split())}") from e
    if blocks > _MAX_BLOCKS:
        raise ValueError(f"image tokenizer: {where} must ask for at most {_MAX_BLOCKS} blocks a stage, got {blocks}")
    return config, read_window(data.get("window"), f"image tokenizer: {where}")


def read_window(value: Any, where: str) -> tuple[int, int] | None:
    """``[height, width]`` from a file, or None.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or any(type(v) is not int for v in value):
        raise ValueError(f"{where}: window must be [height, width] in pixels, got {value!r}")
    return value[0], value[1]


#: Windows encoded in one pass: bounds the memory, not the speed (72 windows of 16 x 8 pixels make one scene).
_WINDOWS_AT_ONCE = 2048


def _grid(pixels: Tensor, window: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of windows in ``[B, 3, H, W]``."""
    return pixels.shape[2] // window[0], pixels.shape[3] // window[1]


def _as_bytes(windows: Tensor) -> NDArray[np.void]:
    """Each row of ``[N, ...]`` as one value that sorts and compares by its bytes."""
    rows = windows.flatten(1).contiguous().cpu().numpy()
    return rows.view(f"V{rows.shape[1] * rows.itemsize}")[:, 0]


def _shape4(pixels: Tensor) -> tuple[int, int, int, int]:
    if pixels.ndim != 4:
        raise ValueError(f"encode: pixels must be [B, 3, H, W], got {list(pixels.shape)}")
    b, c, h, w = pixels.shape
    return b, c, h, w


def to_pixels(images: Any) -> Tensor:
    """uint8 pictures ``[B, H, W, 3]`` (numpy or tensor) -> float32 ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Float pixels ``[B, 3, H, W]`` in [-1, 1] -> uint8 ``[B, H, W, 3]``."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def box_psnr(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of uint8 pictures ``[B, H, W, 3]`` in ``mask`` ``[B, H, W]``, one each."""
    se = ((a.float() - b.float()) ** 2).mean(-1) * mask
    mse = se.sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)
    return 10 * torch.log10(255.0**2 / mse.clamp_min(1e-6))
