"""`DHACallback`: the schedule as a Trainer callback."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter.layer import DHALayer
from .schedule import FusionSchedule, ScheduleOptions, ScheduleState


class DHACallback(TrainerCallback):
    """Runs search and fusion in any Trainer (also TRL's), for any task type.

    Args:
        search_steps: optimizer steps of the learned search; None takes a fifth of the run with `grouping="learned"`, else none.
        ramp: share of the remaining steps over which the fusion target falls to 0; the rest holds it there.
        lambda1_rate: ascent of the first multiplier per step.
        lambda2_rate: ascent of the second.
        project: hold the fusion loss to the target after every step (ours), so that groups end exactly tied; False leaves it
            to the multipliers, as in the paper.

    Multipliers and position are saved with the adapter, so a resumed run goes on where it stopped. Each step's figures are in
    `trainer.state.log_history` under `dha/...`.
    """

    def __init__(
        self,
        search_steps: int | None = None,
        ramp: float = 0.7,
        lambda1_rate: float = 2.0,
        lambda2_rate: float = 10.0,
        project: bool = True,
    ) -> None:
        if not 0 < ramp <= 1:
            raise ValueError(f"`ramp` is {ramp}, but it is a share of the training steps; choose a number in (0, 1].")
        self.search_steps, self.ramp, self.project = search_steps, ramp, project
        self.rates = {"lambda1_rate": lambda1_rate, "lambda2_rate": lambda2_rate}
        self.schedule: FusionSchedule | None = None
        self.last: ScheduleState | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        probe = FusionSchedule(model, ScheduleOptions(1))
        learned = probe.needs_search
        search = self.search_steps if self.search_steps is not None else state.max_steps // 5
        search = search if learned else 0
        if learned and not 0 <= search < state.max_steps:
            raise ValueError(
                f"`search_steps` is {search}, but the run has {state.max_steps} steps, of which some must be left for the fusion; "
                "choose fewer, or train longer."
            )
        ramp = max(int((state.max_steps - search) * self.ramp), 1)
        self.schedule = FusionSchedule(model, ScheduleOptions(ramp, search, **self.rates))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.last = self.schedule.step()
        state.log_history.append({"step": state.global_step + 1, **self.last.logs()})

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.schedule.project() if self.project else self.schedule.pull()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.last is not None and logs is not None and "loss" in logs:
            # Trackers draw numbers; the phase is in the history.
            logs.update({name: value for name, value in self.last.logs().items() if not isinstance(value, str)})


class TiedGroups(TrainerCallback):
    """Keeps groups tied that are tied from the start, as the optimizer would move the rows of a fusion matrix apart."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        for layer in (module for module in model.modules() if isinstance(module, DHALayer)):
            fusion = layer.active_fusion()
            if fusion is not None and fusion.omega.requires_grad:
                fusion.pull(0)
