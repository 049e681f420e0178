"""The augmented Lagrangian that drives the heads of every group together (reconstruction of the paper's stages).

    objective   min_omega max_lambda  L_LM + lambda1 (F - t) + lambda2 (F - t)^2
    target      t falls linearly from F_0 to 0 over the ramp, then stays 0
    multipliers start at 0 and ascend on their own gradient, once per optimizer step; while t = 0 and F > 1e-5, lambda1 also grows by
                a tenth each step, as weights of penalties do: a constraint whose gradient vanishes has no finite multiplier
    pull        after the optimizer's step, the penalty's own proximal step on the fusion matrices
    projection  in place of the pull: F > t is brought down to t exactly (ours, the default of `DHACallback`)

The penalty is kept apart from the optimizer, as AdamW keeps weight decay: Adam divides a gradient by its size, and so would take away from
the multipliers what they gained, and could not move faster than its learning rate allows. Near the end `dF/domega` vanishes like `sqrt(F)`,
so that a penalty inside of the loss stalls where the language loss pushes back as hard (measured: `F` 3e-3 after 300 steps).

Everything that a resumed run needs is in `HeadFusion.schedule` on the layers and is saved with the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter.config import DHAConfig
from ..adapter.fusion_state import SCHEDULE
from ..adapter.layer import DHALayer
from ..adapter.model import TIED
from ..attention import KINDS, find_attention
from ..fusion.operator import fusion_loss
from .learned_search import learned_plan
from .objective import plain_model

SEARCH, FUSION = 0.0, 1.0
TOLERANCE = 1e-5
"""Fusion loss from which on nothing more is asked: the weights of heads are within 0.3 % of their collapse."""


@dataclass(frozen=True)
class ScheduleOptions:
    """`ramp_steps`: optimizer steps over which the target falls to 0. `search_steps`: steps of the learned search before it
    (only with `grouping="learned"`). `lambda1_rate`, `lambda2_rate`: ascent per step; `F` is relative
    to the heads' energy, so the rates suit any model. `search_target`: share of `F_0` that the search falls to. `growth`: factor on `lambda1` per step
    after the ramp.
    """

    ramp_steps: int
    search_steps: int = 0
    lambda1_rate: float = 2.0
    lambda2_rate: float = 10.0
    search_target: float = 0.5
    growth: float = 1.1


@dataclass(frozen=True)
class ScheduleState:
    """What one step did; `realised_heads` counts heads that are distinct, a tied group being one."""

    phase: str
    step: int
    fusion_loss: float
    target: float
    lambda1: float
    lambda2: float
    realised_heads: int

    def logs(self) -> dict[str, float | int | str]:
        """The figures under the names that the trainer logs."""
        return {f"dha/{name}": value for name, value in vars(self).items()}


class FusionSchedule:
    """Drives the active DHA adapter of `model`. Usable from any training loop:

        schedule = FusionSchedule(model, ScheduleOptions(ramp_steps=300))
        loss.backward(); schedule.step(); optimizer.step(); schedule.pull()

    `project()` in place of `pull()` holds the target exactly (ours): groups are then tied, and the collapse exact, from the end of the ramp on.
    None of them touches gradients, so the penalty counts once per optimizer step whatever the accumulation and the number of processes.

    Raises:
        ValueError: the model has no active DHA adapter.
    """

    def __init__(self, model: nn.Module, options: ScheduleOptions) -> None:
        self.model, self.options = model, options
        self.layers = [m for m in model.modules() if isinstance(m, DHALayer) and m.active_fusion() is not None]
        if not self.layers:
            raise ValueError("the model has no active DHA adapter; create it with `get_dha_model` before training.")

    @torch.no_grad()
    def step(self) -> ScheduleState:
        """Advance target and multipliers; once per optimizer step."""
        memory = self._read()
        if self._searching(memory) and memory["step"] >= self.options.search_steps:
            self._end_search()
            memory = dict.fromkeys(SCHEDULE, 0.0) | {"phase": FUSION}
        found = [layer.distances() for layer in self.layers]
        value = _mean_loss(found)
        if memory["step"] == 0:
            memory["start"] = value
        target = self._target(memory)
        # F below its target is no violation: multipliers fall, but never push heads apart.
        memory["lambda1"] = max(memory["lambda1"] + self.options.lambda1_rate * (value - target), 0.0)
        memory["lambda2"] += self.options.lambda2_rate * (value - target) ** 2
        if target == 0 and value > TOLERANCE:
            memory["lambda1"] *= self.options.growth
        memory["step"] += 1
        self._write(memory)
        heads = sum(_realised(layer, *both) for layer, both in zip(self.layers, found, strict=True))
        return self._state(memory, value, target, heads)

    @torch.no_grad()
    def pull(self) -> None:
        """The penalty's proximal step: all rows keep the share `s` of their distance from their group's mean that minimises
        `slope s^2 F + (1 - s)^2 F`, with the slope `lambda1 + 2 lambda2 (F - t)` of the penalty at `F`."""
        memory = self._read()
        gap = self.fusion_loss() - self._target(memory)
        slope = memory["lambda1"] + 2 * memory["lambda2"] * max(gap, 0.0)
        self._keep(1 / (1 + slope))

    @torch.no_grad()
    def project(self) -> None:
        """Bring a fusion loss above the next step's target down to it (ours). In the search phase this is `pull`."""
        memory = self._read()
        if self._searching(memory):
            return self.pull()
        loss, target = self.fusion_loss(), self._target(memory)
        if loss > target:
            self._keep((target / loss) ** 0.5)

    def _keep(self, share: float) -> None:
        for layer in self.layers:
            layer.active_fusion().pull(share)

    @torch.no_grad()
    def fusion_loss(self) -> float:
        """Mean fusion loss over layers and kinds."""
        return _mean_loss([layer.distances() for layer in self.layers])

    @property
    def position(self) -> dict[str, float]:
        """Step, multipliers, starting loss and phase, as saved with the adapter."""
        return self._read()

    @property
    def needs_search(self) -> bool:
        """Whether groups are to be learned, in this run or in the one that it resumes."""
        return self._config().grouping == "learned"

    def _config(self) -> DHAConfig:
        configs = self.model.peft_config
        return configs[next(n for n in self.layers[0].active_adapters if n in self.layers[0].dha_fusion)]

    def _searching(self, memory: dict[str, float]) -> bool:
        return self.needs_search and memory["phase"] == SEARCH

    def _target(self, memory: dict[str, float]) -> float:
        if self._searching(memory):
            reached = min(memory["step"] / max(self.options.search_steps, 1), 1.0)
            return memory["start"] * (1 - reached * (1 - self.options.search_target))
        return memory["start"] * max(1 - memory["step"] / max(self.options.ramp_steps, 1), 0.0)

    def _end_search(self) -> None:
        config = self._config()
        sites = find_attention(plain_model(self.model))
        plan = learned_plan(sites, config.search_options())
        config.plan = plan.to_dict()
        for site, layer in zip(sites, plan.layers, strict=True):
            for kind, groups in zip(KINDS, (layer.key_groups, layer.value_groups), strict=True):
                site.outer(kind).active_fusion().set_groups(groups)

    def _read(self) -> dict[str, float]:
        return dict(zip(SCHEDULE, self.layers[0].active_fusion().schedule.tolist(), strict=True))

    def _write(self, memory: dict[str, float]) -> None:
        values = torch.tensor([memory[name] for name in SCHEDULE], dtype=torch.float64)
        for layer in self.layers:
            layer.active_fusion().schedule.copy_(values)

    def _state(self, memory: dict[str, float], value: float, target: float, heads: int) -> ScheduleState:
        phase = "search" if self._searching(memory) else "fusion"
        return ScheduleState(phase, int(memory["step"]), value, target, memory["lambda1"], memory["lambda2"], heads)


def _mean_loss(found: list[tuple[Tensor, Tensor]]) -> float:
    """Mean fusion loss of several layers, from their distances."""
    losses = torch.stack([fusion_loss(*pair).to(found[0][0].device) for pair in found])
    return float(losses.mean())


def _realised(layer: DHALayer, apart: Tensor, energy: Tensor) -> int:
    """Distinct heads of one projection: a group whose members differ by less than `TIED` counts once."""
    relative = (apart / energy.clamp_min(torch.finfo(energy.dtype).tiny)).tolist()
    groups = layer.active_fusion().groups
    return sum(1 if max(relative[head] for head in group) < TIED else len(group) for group in groups)
