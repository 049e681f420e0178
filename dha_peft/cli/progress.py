"""The bar of a training stage: loss, and how far the fusion is from its target. Nothing is shown off a terminal."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = {
    "loss": "loss",
    "dha/fusion_loss": "F",
    "dha/target": "target",
    "dha/lambda1": "lambda1",
    "learning_rate": "rate",
}


class BarCallback(TrainerCallback):
    """Stands in for the Trainer's own bar, which knows nothing of fusion and prints its logs line by line."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        hidden = None if state.is_world_process_zero else True  # None: hidden off a terminal
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", disable=hidden)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        if self.bar is not None:
            self.bar.set_postfix({short: _short(logs[name]) for name, short in SHOWN.items() if name in (logs or {})})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
