"""The augmented Lagrangian that drives the heads of every group together (reconstruction of the paper's stages).

    objective   L_LM + lambda1 (F - t) + lambda2 (F - t)^2
    target      t falls linearly from F_0 to 0 over the ramp, then stays 0
    multipliers start at 0 and ascend on their own gradient, once per optimizer step
    projection  after the optimizer's step, F > t is brought down to t exactly (ours, optional)

Everything that a resumed run needs is in `HeadFusion.schedule` on the layers and is saved with the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..adapter.config import DHAConfig
from ..adapter.fusion_state import SCHEDULE
from ..adapter.layer import DHALayer
from ..adapter.model import TIED
from ..attention import KINDS, find_attention
from .learned_search import learned_plan

SEARCH, FUSION = 0.0, 1.0


@dataclass(frozen=True)
class ScheduleOptions:
    """`ramp_steps`: optimizer steps over which the target falls to 0. `search_steps`: steps of the learned search before it
    (only with `grouping="learned"`). `lambda1_rate`, `lambda2_rate`: ascent per step. `search_target`: share of `F_0` that the search falls to.
    """

    ramp_steps: int
    search_steps: int = 0
    lambda1_rate: float = 1.0
    lambda2_rate: float = 100.0
    search_target: float = 0.5


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
        loss.backward(); schedule.step(); optimizer.step(); schedule.project()

    `project` is optional (ours): with it the groups are tied, and the collapse exact, from the end of the ramp on. `step` adds the penalty's gradient to the adapter's, so it counts once per optimizer step whatever the accumulation and the
    number of processes.

    Raises:
        ValueError: the model has no active DHA adapter.
    """

    def __init__(self, model: nn.Module, options: ScheduleOptions) -> None:
        self.model, self.options = model, options
        self.layers = [m for m in model.modules() if isinstance(m, DHALayer) and m.active_fusion() is not None]
        if not self.layers:
            raise ValueError("the model has no active DHA adapter; create it with `get_dha_model` before training.")

    def step(self, gradient_scale: float = 1.0) -> ScheduleState:
        """Add the penalty's gradient (times `gradient_scale`, for a loss scaler) and advance the multipliers."""
        memory = self._read()
        if self._searching(memory) and memory["step"] >= self.options.search_steps:
            self._end_search()
            memory = dict.fromkeys(SCHEDULE, 0.0) | {"phase": FUSION}
        loss = self.fusion_loss()
        value = float(loss.detach())
        if memory["step"] == 0:
            memory["start"] = value
        target = self._target(memory)
        gap = loss - target
        penalty = memory["lambda1"] * gap + memory["lambda2"] * gap**2
        if penalty.requires_grad:
            (penalty * gradient_scale).backward()
        memory["lambda1"] += self.options.lambda1_rate * (value - target)
        memory["lambda2"] += self.options.lambda2_rate * (value - target) ** 2
        memory["step"] += 1
        self._write(memory)
        return self._state(memory, value, target)

    @torch.no_grad()
    def project(self) -> None:
        """Bring a fusion loss above the next step's target down to it, by pulling the rows of every group together (ours).

        Multipliers alone end wherever the language loss pushes back as hard; the collapse then costs what is left."""
        memory = self._read()
        if self._searching(memory):
            return
        loss, target = float(self.fusion_loss()), self._target(memory)
        if loss > target:
            for layer in self.layers:
                layer.active_fusion().pull((target / loss) ** 0.5)

    def fusion_loss(self) -> Tensor:
        """Mean fusion loss over layers and kinds, with gradient."""
        return torch.stack([layer.fusion_loss() for layer in self.layers]).mean()

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
        sites = find_attention(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
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

    @torch.no_grad()
    def _state(self, memory: dict[str, float], value: float, target: float) -> ScheduleState:
        phase = "search" if self._searching(memory) else "fusion"
        heads = sum(_realised(layer) for layer in self.layers)
        numbers = (memory["lambda1"], memory["lambda2"])
        return ScheduleState(phase, int(memory["step"]), value, target, *numbers, heads)


def _realised(layer: DHALayer) -> int:
    """Distinct heads of one projection: a group whose members differ by less than `TIED` counts once."""
    fusion, heads = layer.active_fusion(), layer.base_heads()
    fused = fusion.fuse(heads)
    apart = (fused.heads - fused.collapsed).pow(2).sum((1, 2)) / heads.pow(2).sum((1, 2)).clamp_min(1e-30)
    return sum(1 if max(apart[list(g)].tolist()) < TIED else len(g) for g in fusion.groups)
