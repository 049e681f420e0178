"""The trainable state of one kind of heads in one projection: fusion matrix, frames, groups, and the schedule's memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..fusion.heads import FrameLayout, HeadMaps
from ..fusion.operator import FusedHeads, fuse, own_share
from ..plan import Groups
from ..search.analysis import Frames

SCHEDULE = ("step", "lambda1", "lambda2", "start", "phase")
"""What the schedule remembers, in `HeadFusion.schedule`; it lives here because peft saves it with the adapter."""

NEAR = 0.03
"""Relative difference of the rows of `omega` from which on a group counts as tied; its fusion loss is then about `TIED`."""


class HeadFusion(nn.Module):
    """Fusion of `H` heads of size `d`.

    `omega` `[H, H]` is the fusion matrix; `into_*` and `out_*` are the frames' maps (absent with linear fusion); the buffer `owner`
    `[H]` holds each head's group. Before a learned search has found groups, all heads are in group 0.
    """

    def __init__(self, num_heads: int, layout: FrameLayout, aligned: bool, train_frames: bool = True) -> None:
        super().__init__()
        self.layout, self.aligned, self.train_frames = layout, aligned, train_frames
        self.omega = nn.Parameter(torch.eye(num_heads))
        self.register_buffer("owner", torch.zeros(num_heads, dtype=torch.long))
        self.register_buffer("schedule", torch.zeros(len(SCHEDULE), dtype=torch.float64))
        if aligned:
            identity = HeadMaps.identity(num_heads, layout)
            for name in ("into_pair", "out_pair"):
                self.register_parameter(name, nn.Parameter(identity.pair.clone()))
            for name in ("into_full", "out_full"):
                self.register_parameter(name, nn.Parameter(identity.full.clone()))

    @property
    def groups(self) -> Groups:
        owner = self.owner.tolist()
        return tuple(sorted(tuple(h for h, o in enumerate(owner) if o == group) for group in set(owner)))

    @torch.no_grad()
    def set_groups(self, groups: Groups, frames: Frames | None = None) -> None:
        """Take groups and, with aligned fusion, their frames; the fusion matrix becomes the identity."""
        for index, group in enumerate(groups):
            self.owner[list(group)] = index
        self.omega.copy_(torch.eye(len(self.omega)))
        if self.aligned and frames is not None:
            # Rows of a tied omega are 1 / n, so heads enter the frame n times as large.
            size = torch.tensor([len(g) for g in self.groups for _ in g], dtype=torch.float32)
            order = torch.tensor([h for g in self.groups for h in g])
            weight = torch.empty_like(size).index_put_((order,), size)[:, None, None].to(frames.into.pair.device)
            self.into_pair.copy_(frames.into.pair * weight)
            self.into_full.copy_(frames.into.full * weight)
            self.out_pair.copy_(frames.out.pair)
            self.out_full.copy_(frames.out.full)

    def freeze_unused(self) -> None:
        """Freeze frames that are not trained, and empty parts of them: distributed training waits for every gradient. Also the fusion
        matrix of tied groups, whose frames can do all that it could: an optimizer would only move its rows apart."""
        phases = self.layout.phases
        fixed = set() if phases is None else {"out_full"} if phases.any() else {"out_full", "out_pair"}
        for name, parameter in self.named_parameters():
            if name in fixed or (name != "omega" and (not self.train_frames or parameter.numel() == 0)):
                parameter.requires_grad_(False)
        if self.aligned and self.train_frames and not self.omega.is_meta and self.tied().all():
            self.omega.requires_grad_(False)

    @torch.no_grad()
    def randomize(self) -> None:
        """A random state whose groups are tied."""
        rows = torch.rand(len(self.omega), device=self.omega.device) + 0.1
        self.omega.copy_(rows * self._together())

    @torch.no_grad()
    def pull(self, share: float) -> None:
        """Move every row of a group towards the group's mean row, until `share` of its distance is left: the fusion loss, a
        square in that distance, falls by `share ** 2`. 0 ties the groups (rows of 1 / n from the identity)."""
        rows, mean = self._rows()
        self.omega.copy_(mean + share * (rows - mean) if share else mean)

    def fuse(self, heads: Tensor) -> FusedHeads:
        """Heads `[H, d, E]` as the adapter makes them, and as they will be after the collapse."""
        layout = self.layout.to(heads.device)
        into, out = self.maps()
        return fuse(heads, self.omega, self._together(), into, out, layout)

    def maps(self) -> tuple[HeadMaps | None, HeadMaps | None]:
        """Maps into and out of the frames; None with linear fusion. A head alone in its group needs no frame: its maps are the
        identity, so that the collapse keeps it whatever the training did to its maps, which its forward never sees."""
        if not self.aligned:
            return None, None
        alone = (self._together().sum(1) == 1)[:, None, None]
        identity = HeadMaps.identity(len(self.omega), self.layout, device=self.omega.device)
        pairs, fulls = (self.into_pair, self.out_pair), (self.into_full, self.out_full)
        into, out = (
            HeadMaps(torch.where(alone, identity.pair, pair), torch.where(alone, identity.full, full))
            for pair, full in zip(pairs, fulls, strict=True)
        )
        return into, out.restricted(self.layout.to(self.omega.device))

    def tied(self) -> Tensor:
        """Which heads are nearly what the collapse will make of them, as the rows of their group are nearly equal, `[H]` bool.

        Where slow pairs are mixed, the forward jumps here: read-outs act on the keys of untied heads, so that the adapter can start as the base,
        and on the queries of tied ones, as in the merged model. Both agree as far as the read-outs commute with the rotation.
        """
        rows, mean = self._rows()
        return (rows - mean).abs().amax(1) <= NEAR * mean.abs().amax(1)

    @property
    def jumps(self) -> bool:
        """Whether the forward changes when heads become `tied`."""
        return self.aligned and self.layout.slow > 0

    def in_frame(self, fused: FusedHeads) -> Tensor:
        """`fused.heads` with the free rows of tied heads left in the common frame, for queries turned by `query_turns`."""
        rest = self.layout.to(fused.heads.device).rest
        rows = torch.where(self.tied()[:, None, None], fused.mixed[:, rest], fused.heads[:, rest])
        return fused.heads.index_copy(1, rest, rows)

    def query_turns(self) -> Tensor:
        """What multiplies the free part of a query, a row, from the right, `[H, R, R]`: the read-out of a tied head, else nothing."""
        out = self.maps()[1].full
        return torch.where(self.tied()[:, None, None], out, torch.eye(out.shape[-1], device=out.device))

    def own_share(self) -> Tensor:
        """How much every head still is its own, `[H]`: 1 at the start, 0 once its group is tied."""
        together = self._together().to(self.omega.dtype)
        alone = together.sum(1) == 1
        return torch.where(alone, torch.ones_like(self.omega[0]), own_share(self.omega * together, together))

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The rows of the fusion matrix within their groups, and the mean row of each one's group, `[H, H]` each."""
        together = self._together().to(self.omega.dtype)
        rows = self.omega.detach() * together
        return rows, (together / together.sum(1, keepdim=True)) @ rows

    def _together(self) -> Tensor:
        return self.owner[:, None] == self.owner[None, :]
