"""Small models and batches that several test files share."""

import dataclasses

import torch
from torch import Tensor
from transformers import Emu3VQVAEConfig

from synergen_ext.model import SynerGenConfig, SynerGenVL
from synergen_ext.processing.image_tokenizer import ImageTokenizer


def scaled_down(preset: str, **changes) -> SynerGenConfig:
    """A preset with its widths cut: same heads, window, head depth, biases, ties, constants."""
    config = SynerGenConfig.preset(preset)
    m, n = config.fold
    small = dict(
        vocab_size=90,
        hidden_size=24,
        intermediate_size=20,
        num_layers=2,
        head_dim=6,
        max_positions=256,
        codebook_size=37,
        image_grid=(2 * m, 2 * n),
        token_embed_size=5,
    )
    return dataclasses.replace(config, **{**small, **changes})


def random_model(
    config: SynerGenConfig | str = "tiny", dtype: torch.dtype = torch.float64, seed: int = 0
) -> SynerGenVL:
    """A model whose every weight matters: norms and biases are not their start values, and
    matrices are large enough for attention, experts and head to bend the result.

    A name gives the preset `tiny` as it is, and every other preset scaled down.
    """
    if isinstance(config, str):
        config = SynerGenConfig.preset("tiny") if config == "tiny" else scaled_down(config)
    torch.manual_seed(seed)
    model = SynerGenVL(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(0.3 * torch.randn_like(p) + (0 if name.endswith("bias") else 1))
            elif "embedding" in name or name.endswith(("positions", "tokens.weight")):
                p.normal_()
            else:
                p.normal_(std=1.5 * p.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def image_batch(config: SynerGenConfig, pictures: int, seed: int = 0) -> Tensor:
    """Random image token ids of full pictures, int64 [N, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.codebook_size, (pictures, *config.image_grid), generator=generator)


def text_ids(config: SynerGenConfig, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (length,), generator=generator).tolist()


def picture_ids(config: SynerGenConfig, folded: int | None = None) -> list[int]:
    """<boi>, the folded tokens, <eoi>."""
    return [config.boi_id, *[config.image_id] * (folded or config.image_tokens), config.eoi_id]


def mixed_batch(config: SynerGenConfig, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two rows of one length, three pictures: text, picture, text, picture, text and picture, text.

    Returns:
        input_ids int64 [2, T] and image_ids int64 [3, h, w].
    """
    picture = picture_ids(config)
    first = [*text_ids(config, 5, seed), *picture, *text_ids(config, 3, seed + 1), *picture]
    first += text_ids(config, 4, seed + 2)
    second = [*text_ids(config, 2, seed + 3), config.uncond_id, *picture]
    second += text_ids(config, len(first) - len(second), seed + 4)
    return torch.tensor([first, second]), image_batch(config, 3, seed)


#: The smallest tokenizer of Emu3's class that trains in seconds: stride 8, widths of 32.
SMALL_TOKENIZER = dict(
    codebook_size=32, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1, 1, 1],
    num_res_blocks=1, attn_resolutions=[], hidden_size=32, temporal_downsample_factor=1,
)  # fmt: skip


def random_image_tokenizer(temporal: int = 4, stride: int = 8, **changes) -> ImageTokenizer:
    """A small Emu3 tokenizer whose batch norms, spatial norms and codes are not their start values."""
    torch.manual_seed(1)
    halvings = stride.bit_length() - 1
    config = dict(
        codebook_size=48,
        embed_dim=4,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1] * halvings + [2],
        num_res_blocks=1,
        attn_resolutions=[halvings],  # a stage's index; its width must be hidden_size
        hidden_size=64,
        temporal_downsample_factor=temporal,
    )
    tokenizer = ImageTokenizer(Emu3VQVAEConfig(**{**config, **changes}))
    with torch.no_grad():
        for module in tokenizer.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 3)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
        # Codes where the latents of noise lie, so that many are in use.
        z = tokenizer.latents(torch.rand(8, 3, 4 * stride, 4 * stride) * 2 - 1)
        z = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        codes = tokenizer.vq.quantize.embedding.weight
        codes.copy_(z[torch.randperm(len(z))[: len(codes)]])
    return tokenizer.eval()
