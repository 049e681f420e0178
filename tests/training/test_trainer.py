"""The schedule in transformers' Trainer: it ties groups, survives a kill, and counts once per optimizer step."""

from __future__ import annotations

import pytest
import torch
from adapter.tiny import VOCAB, logits, make_base, make_batches, make_ids, state
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from dha_peft import DHACallback, DHAConfig, FusionSchedule, ScheduleOptions, get_dha_model


def make_data(rows=64, length=12):
    ids = torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(11))
    return [{"input_ids": row, "labels": row} for row in ids]


def make_model(**fields):
    set_seed(0)
    config = DHAConfig(**{"head_budget": 0.5, "task_type": "CAUSAL_LM", **fields})
    return get_dha_model(make_base(), config, make_batches())


class StopAt(TrainerCallback):
    """Kills the run after a step, like a lost machine: after its checkpoint, before its end."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Recorder(TrainerCallback):
    """A tracker that comes after the schedule."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.logs.append(dict(logs))


def make_trainer(folder, model, steps, callbacks=(), data=None, schedule=None, **options):
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        **{
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            **options,
        },
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    schedule = schedule or DHACallback()
    return Trainer(model, args, train_dataset=data or make_data(), callbacks=[schedule, *callbacks])


def schedule_logs(trainer):
    return [log for log in trainer.state.log_history if "dha/fusion_loss" in log and "loss" not in log]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fusion": "linear"},
        {"fusion": "linear", "grouping": "learned"},
        {"grouping": "learned"},
        {"task_type": None},
    ],
    ids=str,
)
def test_multipliers_alone_tie_the_groups(tmp_path, fields):
    """As in the paper, with default rates and any learning rate; what is left at the collapse does not matter."""
    model = make_model(**fields)
    base = {n: t for n, t in state(model).items() if "dha_" not in n}
    seen = Recorder()
    rate = 3e-2 if fields else 1e-3
    trainer = make_trainer(tmp_path, model, 60, [seen], schedule=DHACallback(project=False), learning_rate=rate)
    trainer.train()
    logs = schedule_logs(trainer)
    assert [log["step"] for log in logs] == list(range(1, 61))
    names = {"phase", "step", "fusion_loss", "target", "lambda1", "lambda2", "realised_heads"}
    assert {f"dha/{name}" for name in names} | {"step"} == logs[0].keys()
    fusion = [log for log in logs if log["dha/phase"] == "fusion"]
    assert len(fusion) == (48 if fields.get("grouping") == "learned" else 60)
    assert fusion[0]["dha/fusion_loss"] > 0.1 and fusion[-1]["dha/fusion_loss"] < 1e-3
    assert model.base_model.fusion_loss() < 1e-3
    targets = [log["dha/target"] for log in fusion]
    assert targets == sorted(targets, reverse=True) and targets[-1] == 0
    assert model.base_model.plan().heads_after == 24
    assert fusion[-1]["dha/realised_heads"] < fusion[0]["dha/realised_heads"]
    assert fusion[-1]["dha/lambda1"] > 0 and fusion[-1]["dha/lambda2"] > 0
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    before = logits(model)
    after = logits(model.merge_and_unload())
    assert (after - before).norm() < 0.01 * before.norm()
    assert len(seen.logs) == 60 and [log["dha/lambda1"] for log in seen.logs] == [log["dha/lambda1"] for log in logs]


@pytest.mark.parametrize(
    ("fields", "stop"),
    [
        ({}, 8),
        ({"fusion": "linear", "grouping": "learned"}, 2),
        ({"fusion": "linear", "grouping": "learned"}, 4),
        ({"fusion": "linear", "grouping": "learned"}, 8),
        ({"grouping": "learned"}, 10),
        ({"task_type": None}, 6),
    ],
    ids=str,
)
def test_a_killed_and_resumed_run_equals_the_whole_run(tmp_path, fields, stop):
    saving = {"save_strategy": "steps", "save_steps": 2}

    def trainer(name, *callbacks):
        schedule = DHACallback(project=fields.get("fusion") != "linear")
        return make_trainer(tmp_path / name, make_model(**fields), 20, callbacks, schedule=schedule, **saving)

    whole = trainer("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("cut", StopAt(stop + 1)).train()
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    left, right = (t.model.state_dict() for t in (whole, resumed))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert schedule_logs(resumed) == schedule_logs(whole)
    assert whole.model.base_model.plan() == resumed.model.base_model.plan()


def test_the_penalty_counts_once_per_optimizer_step(tmp_path):
    """With constant data the gradient of the language loss is the same for 1 and 2 accumulated batches."""
    row, results = make_data(1)[0], []
    for accumulate in (1, 2):
        model = make_model()
        trainer = make_trainer(tmp_path, model, 6, data=[row] * 64, gradient_accumulation_steps=accumulate)
        trainer.train()
        results.append((schedule_logs(trainer), [p.detach() for p in model.parameters() if p.requires_grad]))
    (one, ours), (two, theirs) = results
    assert len(one) == len(two) == 6
    for left, right in zip(one, two, strict=True):
        assert left["dha/step"] == right["dha/step"] and left["dha/target"] == pytest.approx(right["dha/target"])
        for name in ("dha/fusion_loss", "dha/lambda1", "dha/lambda2"):
            assert left[name] == pytest.approx(right[name], rel=1e-3)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-2)


def test_the_plan_that_was_learned_is_saved(tmp_path):
    from peft import PeftConfig, PeftModel

    model = make_model(grouping="learned", fusion="linear")
    trainer = make_trainer(tmp_path, model, 15)
    trainer.train()
    trainer.save_model(tmp_path / "done")
    assert PeftConfig.from_pretrained(tmp_path / "done").plan == model.base_model.plan().to_dict()
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "done")
    assert torch.equal(logits(loaded), logits(model))


def test_a_loop_written_by_hand():
    model = make_model(fusion="linear")
    schedule = FusionSchedule(model, ScheduleOptions(ramp_steps=30))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0)
    ids, first = make_ids(), None
    for _ in range(50):
        model(input_ids=ids, labels=ids).loss.backward()
        state = schedule.step()
        first = first or state
        optimizer.step()
        schedule.pull()
        optimizer.zero_grad()
    assert first.step == 1 and first.target == first.fusion_loss and state.step == 50 == schedule.position["step"]
    assert state.target == 0 and model.base_model.fusion_loss() < 1e-3
    assert state.lambda1 > 0 and state.lambda2 > 0


def test_multipliers_ascend_and_pull_as_the_lagrangian_says():
    model = make_model()
    schedule = FusionSchedule(model, ScheduleOptions(ramp_steps=10, lambda1_rate=1.0, lambda2_rate=100.0))
    loss = schedule.fusion_loss()
    for _ in range(3):
        schedule.step()
    memory = schedule.position
    assert memory["lambda1"] == pytest.approx(sum(loss * k / 10 for k in range(3)), rel=1e-5)
    assert memory["lambda2"] == pytest.approx(100 * sum((loss * k / 10) ** 2 for k in range(3)), rel=1e-5)
    schedule.pull()
    slope = memory["lambda1"] + 2 * memory["lambda2"] * loss * 3 / 10
    share = (schedule.fusion_loss() / loss) ** 0.5

    def cost(s):
        return slope * s**2 + (1 - s) ** 2

    assert cost(share) < cost(share + 1e-3) and cost(share) < cost(share - 1e-3)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_below_its_target_is_left_alone():
    model = make_model()
    schedule = FusionSchedule(model, ScheduleOptions(ramp_steps=1000))
    schedule.step()
    model.base_model.tie_groups()
    for _ in range(3):
        assert schedule.step().lambda1 == 0
    before = state(model)
    schedule.project()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("grouping", ["aligned", "learned"])
def test_the_language_loss_reaches_every_trainable_parameter(grouping):
    """Distributed training waits for the gradient of each."""
    for model_type in ("llama", "qwen2"):
        model = get_dha_model(make_base(model_type), DHAConfig(grouping=grouping), make_batches())
        model(input_ids=make_ids(), labels=make_ids()).loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_model_without_the_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no active DHA adapter"):
        FusionSchedule(make_base(), ScheduleOptions(1))
    with pytest.raises(ValueError, match="no active DHA adapter"):
        make_trainer(tmp_path, make_base(), 2).train()
    with pytest.raises(ValueError, match="`search_steps` is 9, but the run has 4 steps"):
        make_trainer(tmp_path, make_model(grouping="learned"), 4, schedule=DHACallback(search_steps=9)).train()
    with pytest.raises(ValueError, match="`ramp` is 0"):
        DHACallback(ramp=0)


@pytest.mark.parametrize("fusion", ["aligned", "linear"])
def test_projection_holds_the_target_and_ends_tied(tmp_path, fusion):
    model = make_model(fusion=fusion)
    trainer = make_trainer(tmp_path, model, 12, schedule=DHACallback(ramp=0.5), learning_rate=1e-2)
    trainer.train()
    logs = schedule_logs(trainer)
    assert all(log["dha/fusion_loss"] <= log["dha/target"] * 1.001 + 1e-9 for log in logs)
    assert logs[3]["dha/fusion_loss"] > 0.1 * logs[0]["dha/fusion_loss"]
    assert float(model.base_model.fusion_loss()) < 1e-9 and logs[-1]["dha/realised_heads"] == 24
    ids = make_ids()
    before = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)
