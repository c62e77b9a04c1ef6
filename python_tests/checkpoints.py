"""Small random-weight checkpoints in the layout of a real one, for tests of what stands around the model."""

from pathlib import Path

import torch

from synergen_ext.model import SynerGenConfig, SynerGenVL
from synergen_ext.processing.text import TextTokenizer
from synergen_ext.training.tokenizer import TokenizerRecipe, build

#: A VQ tokenizer of 0.4 M parameters, stride 16: a picture of 96 x 96 pixels is 36 tokens, quick to paint.
TOKENIZER = {
    "codebook_size": 64,
    "embed_dim": 4,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
    "temporal_downsample_factor": 1,
}


def write_tiny_checkpoint(folder: Path) -> Path:
    """The `tiny` preset at the scenes' size (96 x 96 pixels, 6 x 6 tokens) with tokenizers to match."""
    words = ["Generate an image of: a red cat", "user\n", "assistant\n", "Here is a random image :"]
    text = TextTokenizer.train(words, 300)
    text.save(folder)
    torch.manual_seed(0)
    config = SynerGenConfig.preset(
        "tiny", vocab_size=text.vocab_size, codebook_size=TOKENIZER["codebook_size"], image_grid=(6, 6), fold=(2, 3)
    )
    SynerGenVL(config).save_pretrained(folder)
    build(TokenizerRecipe(model=TOKENIZER)).save_pretrained(folder, torch.float16)
    return folder
