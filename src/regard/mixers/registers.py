"""Registers: learned tokens before the sequence, which mix with it and are cut off what comes out.

Darcet, Oquab, Mairal, Bojanowski 2023, "Vision Transformers Need Registers", https://arxiv.org/abs/2309.16588
(recalled; starting values are those of DINOv2's code). There they run through all layers, so what is wrapped is a
model's stack of blocks; around a single layer they are keys and values that its own projections make of parameters.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.checks import called, number, refuse, tokens, whole
from regard.masks import Mask, padding
from regard.masks.tensors import unpacked
from regard.pipeline.tokens import key_padding


class Registers(nn.Module):
    """Any module (B, T, M) -> (B, T, M) with R learned tokens in front; `registers` (R, M) is the parameter.

    To a causal module they are a prefix that every token sees, and that sees no token. A window leaves them behind:
    `window(n) | masks.global_tokens(R)` doesn't. For schemes of position they take the first R places.

    Args:
        mixer: the module; it needs to know `mask`, `positions`, `init_state` and `step` only where they are used.
        dim: M.
        num_registers: R; 4 is the paper's.
        std: of the normal distribution that they start from; DINOv2's.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(self, mixer: nn.Module, dim: int, *, num_registers: int = 4, std: float = 1e-6) -> None:
        super().__init__()
        whole("Registers", dim=dim, num_registers=num_registers)
        number("Registers", least=0, std=std)
        if not isinstance(mixer, nn.Module):
            refuse("Registers", "mixer", "has the wrong type", type(mixer).__name__, "a module", error=TypeError)
        if getattr(mixer, "dim", dim) != dim:
            refuse("Registers", "dim", "is not the mixer's", dim, str(mixer.dim))
        self.mixer, self.dim, self.std = mixer, dim, std
        self.registers = nn.Parameter(torch.empty(num_registers, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.registers, std=self.std)

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "*b T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """What the module gives for the tokens of x, with the registers before them.

        Args:
            mask: which tokens are real, as `masks.padding` or (B, T).
            positions: where they stand, counted from behind the registers.
        """
        tokens(self, "x", x, self.dim)
        R, given = len(self.registers), dict[str, Any]()
        if mask is not None:
            if isinstance(mask, Mask) and unpacked(mask)[0] is not None:
                refuse(self, "mask", "packs documents, each of which would need registers", "masks.packed", "padding")
            keep = key_padding(self, mask, x)
            assert keep is not None
            given["mask"] = padding(torch.cat([keep.new_ones(len(keep), R), keep], 1))
        if positions is not None:
            first = torch.arange(R, device=x.device).to(positions.dtype).expand(*positions.shape[:-1], R)
            given["positions"] = torch.cat([first, positions + R], -1)
        return self.mixer(torch.cat([self._of(len(x)).to(x.dtype), x], 1), **given)[:, R:]

    def init_state(self, batch_size: int, capacity: int, **options: Any) -> Any:
        """The module's state, with the registers in it.

        Args:
            capacity: most tokens it will hold besides them.
            options: as the module's own takes.
        """
        self._streams()
        whole("init_state", capacity=capacity)
        state = self.mixer.init_state(batch_size, capacity + len(self.registers), **options)  # type: ignore[operator]
        return self.mixer.step(self._of(batch_size), state)[1]  # type: ignore[operator]

    def step(
        self, x: Float[Tensor, "B t M"], state: Any, *, positions: Int[Tensor, "*b t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], Any]:
        """The next t tokens: what `forward` would give at these places, and the state with them in it."""
        self._streams()
        given = {} if positions is None else {"positions": positions + len(self.registers)}
        return self.mixer.step(x, state, **given)  # type: ignore[operator]

    def extra_repr(self) -> str:
        return f"{self.dim}, num_registers={len(self.registers)}"

    def _of(self, batch_size: int) -> Float[Tensor, "B R M"]:
        return self.registers.expand(batch_size, -1, -1)

    def _streams(self) -> None:
        if not hasattr(self.mixer, "init_state"):
            raise ValueError(f"{called(self)}: {type(self.mixer).__name__} has no streaming form (got no init_state)")
