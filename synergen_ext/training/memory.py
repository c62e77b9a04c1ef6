"""Memory of a training step, found by running the model's own layers on tensors without memory.

A step's memory is that of its pieces in their order: embeddings, every layer, the loss, the unfolding head. Each piece
is run forward and backward once under `FakeTensorMode`, which computes shapes and no values, and every storage that
appears and goes is counted. So what is kept for the backward pass follows the code, copies that autocast and the
experts' stacking make of weights included, at any size and in a moment. What a kernel allocates inside itself is not
seen.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import ops
from ..model import SynerGenConfig
from ..model.folding import FoldedEmbedding
from ..model.layers import Attention, Block, HeadBlock, RMSNorm
from .stages import part_of


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, until they are freed."""

    def __init__(self, known: list[Any]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held = {storage._cdata for storage in known}  # these do not count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return
        self._held.add(key)
        weakref.finalize(storage, self._drop, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Piece:
    """One part of the model in a step, in bytes.

    Attributes:
        copies: of weights, made in the forward pass and kept for the backward pass.
        kept: activations, its output among them, kept for the backward pass.
        forward: what the forward pass has besides, at its peak.
        backward: what the backward pass has besides, at its peak; its gradients among them.
        gradients: of its trained weights.
        output: its output alone: what stays of a piece that is run again in the backward pass.
    """

    name: str
    copies: int
    kept: int
    forward: int
    backward: int
    gradients: int
    output: int

    def again(self) -> Piece:
        """The same piece with gradient checkpointing: its input stays (the output of the piece before), the rest is
        made again where the backward pass needs it."""
        inner = self.copies + self.kept
        return Piece(
            self.name, 0, self.output, self.forward + inner - self.output, self.backward + inner - self.output,
            self.gradients, self.output,
        )  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one process has in one forward and backward pass of a task.

    Attributes:
        rows, length: of ``input_ids``.
        pictures, grid: pictures in them, and image tokens of each (rows, columns).
        painted: whether they carry the image loss.
        targets: text positions with a loss.
        packed: several samples share a row, so attention has a mask.
    """

    rows: int
    length: int
    pictures: int
    grid: tuple[int, int]
    painted: bool
    targets: int
    packed: bool = False


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment of a step when there are most, by part."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    passing: int  # of the piece that is being worked on: gradients on their way, what it makes again
    at: str  # where in the step

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.passing


class _Tables(nn.Module):
    """Word and special embeddings, the last norm and the text classifier: what of the backbone is no layer."""

    def __init__(self, config: SynerGenConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.tok_embeddings, self.special_embeddings = (
            nn.Embedding(config.vocab_size, d),
            nn.Embedding(config.num_special, d),
        )
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.output, self.special_output = (
            nn.Linear(d, config.vocab_size, bias=False),
            nn.Linear(d, config.num_special, bias=False),
        )


class _Ends(nn.Module):
    """Token and position tables, norm and classifier of the unfolding head."""

    def __init__(self, config: SynerGenConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.tokens = nn.Embedding(config.codebook_size, d)
        self.positions = nn.Parameter(torch.empty(config.window, d))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.classifier = nn.Linear(d, config.codebook_size, bias=False)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as a GPU has it, at every length."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def _call(m: Any, x: Tensor) -> Tensor:
    return cast(Tensor, m(x))


def _head_embed(m: Any, states: Tensor) -> Tensor:
    ids = torch.zeros(len(states), len(m.positions) - 1, dtype=torch.long)
    return torch.cat((states[:, None], m.tokens(ids)), dim=1) + cast(Tensor, m.positions)


def _head_layer(m: Any, x: Tensor) -> Tensor:
    return cast(Tensor, m(x, torch.arange(x.shape[1]).expand(len(x), -1)))


def _head_loss(m: Any, x: Tensor) -> Tensor:
    hidden = m.norm(x).flatten(0, 1)
    return ops.linear_cross_entropy(hidden, m.classifier.weight, torch.zeros(len(hidden), dtype=torch.long))


class Tracer:
    """Finds the pieces of a step.

    Args:
        config: the model's sizes.
        train: the parts that are trained, as of ``StageRecipe.train``.
        bfloat16: autocast; weights are float32.
        gpu: attention as on a GPU; without, as on a CPU, where short sequences are multiplied out.
    """

    def __init__(self, config: SynerGenConfig, train: list[str], bfloat16: bool = True, gpu: bool = True) -> None:
        self.config, self.train, self.bfloat16, self.gpu = config, train, bfloat16, gpu

    def pieces(self, work: Work) -> list[Piece]:
        """In the order of the forward pass."""
        c = self.config
        b, t, d = work.rows, work.length, c.hidden_size
        patches = c.folded_length(*work.grid) * work.pictures if work.pictures else 0
        ids, states = torch.long, torch.float32
        found: list[Piece] = []
        if patches:
            shape = (work.pictures, *work.grid)
            found.append(self._piece("image embedding", "image_embedding.", FoldedEmbedding, _call, shape, ids, False))
        found.append(self._piece("embeddings", "", _Tables, self._embed(patches), (b, t), ids, False))
        if work.packed:
            found.append(Piece("mask", 0, b * t * (t + 8), 3 * b * t * t, 0, 0, 0))
        # Special tokens stand among the embeddings, so what trains vision has gradients from the first layer on.
        flows = "vision" in self.train or "language_model" in self.train
        layer, shape = self._layer(work.packed), (b, t, d)
        found.append(self._piece("layer", "layers.0.", Block, layer, shape, states, flows))
        if c.num_layers > 1:
            found += [self._piece("layer", "layers.0.", Block, layer, shape, states, True)] * (c.num_layers - 1)
        found.append(self._piece("text loss", "", _Tables, self._loss(work.targets), shape, states, True))
        if work.painted and patches:
            shape, head = (patches, c.window, d), "unfolding_head."
            found.append(self._piece("head embedding", head, _Ends, _head_embed, (patches, d), states, True))
            found += [
                self._piece("head layer", "unfolding_head.", HeadBlock, _head_layer, shape, states, True)
            ] * c.head_layers
            found.append(self._piece("image loss", head, _Ends, _head_loss, shape, states, True))
        return found

    # ---- what each piece runs ---------------------------------------------------------------------------------

    def _embed(self, patches: int) -> Callable[[Any, Tensor], Tensor]:
        """As `SynerGenVL.embed`; what it looks up in values is left out."""

        def run(m: Any, ids: Tensor) -> Tensor:
            c = self.config
            special = (ids >= c.vocab_size) & (ids < c.image_id)
            visual = ids == c.image_id
            x = m.tok_embeddings(torch.where(special | visual, 0, ids))
            specials = m.special_embeddings(torch.where(special, ids - c.vocab_size, 0))
            x = torch.where(special[..., None], specials, x)
            if patches:
                folded = torch.zeros(patches if len(ids) else 0, x.shape[-1], requires_grad="vision" in self.train)
                x = x.masked_scatter(visual[..., None], folded)
            return x

        return run

    @staticmethod
    def _layer(packed: bool) -> Callable[[Any, Tensor], Tensor]:
        def run(m: Any, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            positions = torch.zeros(b, t, dtype=torch.long)
            mask = torch.ones(b, 1, t, t, dtype=torch.bool) if packed else None
            return cast(Tensor, m(x, positions, positions, mask))

        return run

    @staticmethod
    def _loss(targets: int) -> Callable[[Any, Tensor], Tensor]:
        """As `SynerGenVL.losses`."""

        def run(m: Any, x: Tensor) -> Tensor:
            h = m.norm(x)
            weight = torch.cat((m.output.weight, m.special_output.weight))
            chosen = torch.zeros(targets if len(x) else 0, dtype=torch.long)
            return h.sum() * 0 + ops.linear_cross_entropy(h.reshape(-1, h.shape[-1])[chosen], weight, chosen)

        return run

    # ---- running it -------------------------------------------------------------------------------------------

    def _piece(
        self, name: str, prefix: str, kind: type[nn.Module], run: Callable[[Any, Tensor], Tensor],
        shape: tuple[int, ...], dtype: torch.dtype, flows: bool,
    ) -> Piece:  # fmt: skip
        whole = self._trace(prefix, kind, run, shape, dtype, flows)
        copies = self._trace(prefix, kind, run, (0, *shape[1:]), dtype, flows)[0]  # without a token: of weights alone
        inside, forward, backward, gradients, output = whole
        return Piece(name, copies, inside - copies, forward - inside, backward - inside, gradients, output)

    def _trace(
        self, prefix: str, kind: type[nn.Module], run: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...],
        dtype: torch.dtype, flows: bool,
    ) -> tuple[int, int, int, int, int]:  # fmt: skip
        """Bytes after the forward pass, at its peak, at the backward pass's peak, of gradients, of the output."""
        with warnings.catch_warnings(), FakeTensorMode(), ops.backend("native"):
            # Frozen experts are laid side by side by address, and these have none.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            module = kind(self.config)
            for name, p in module.named_parameters():
                p.requires_grad_(part_of(prefix + name) in self.train)
            if self.gpu:
                for part in module.modules():
                    if isinstance(part, Attention):
                        part.attend = _fused
            x = torch.zeros(shape, dtype=dtype, requires_grad=flows)
            live = _Live([p.untyped_storage() for p in (*module.parameters(), x)])
            with live:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bfloat16):
                    y = run(module, x)
                inside, forward, live.peak = live.now, live.peak, live.now
                output = y.untyped_storage().nbytes() if y.ndim else 0
                if y.requires_grad:
                    y.backward(torch.zeros_like(y))
            # Gradients may be parts of one storage, which then stays whole.
            gradients = {
                g.untyped_storage()._cdata: g.untyped_storage().nbytes()
                for g in (p.grad for p in module.parameters())
                if g is not None
            }
            return inside, forward, live.peak, sum(gradients.values()), output


def peak(
    weights: float, optimizer: float, tasks: list[list[Piece]], ranks: int = 1, gathered: float = 0.0,
    checkpoint: bool = False,
) -> Peak:  # fmt: skip
    """The moment of a step with the most memory, in one process.

    Args:
        weights, optimizer: bytes of all processes together.
        tasks: pieces of each task, which run forward and backward one after another and add up their gradients.
        ranks: processes that share weights, gradients and optimizer states.
        gathered: bytes of weights that a process has of others while it works on a layer.
        checkpoint: layers are run again in the backward pass.
    """
    best: Peak | None = None
    gradients: dict[tuple[str, int], float] = {}

    def moment(at: str, kept: list[Piece], passing: float) -> None:
        nonlocal best
        found = Peak(
            round(weights / ranks + gathered), round(sum(gradients.values())), round(optimizer / ranks),
            sum(p.copies for p in kept), sum(p.kept for p in kept), round(passing), at,
        )  # fmt: skip
        if best is None or found.total > best.total:
            best = found

    for pieces in tasks:
        pieces = [p.again() if checkpoint and p.name.endswith("layer") else p for p in pieces]
        for i, piece in enumerate(pieces):
            moment(f"forward, {piece.name}", pieces[: i + 1], piece.forward)
        for i in reversed(range(len(pieces))):
            moment(f"backward, {pieces[i].name}", pieces[: i + 1], pieces[i].backward)
            number = sum(p.name == pieces[i].name for p in pieces[:i])
            gradients[pieces[i].name, number] = pieces[i].gradients / ranks
    assert best is not None
    return best
