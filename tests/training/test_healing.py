"""Healing: the objective is exact, counts what it should, and moves what it should."""

from __future__ import annotations

import copy
import os
import time

import pytest
import torch
import torch.nn.functional as F
from adapter.tiny import VOCAB, make_base, make_batches, make_ids
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from dha_peft import DHAConfig, convert, get_dha_model
from dha_peft.training import DHATrainer, Objective, heal, healing_loss
from dha_peft.training.objective import cached_loss
from dha_peft.training.teacher_cache import CachedRows, write_teacher_cache

KL_ONLY = Objective(hidden=0)


def make_rows(rows=32, length=12):
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def make_pair(model_type="llama"):
    """A base and what it is at half of its heads."""
    base = make_base(model_type)
    return base, convert(base, DHAConfig(head_budget=0.5), make_batches())


def test_the_loss_is_that_of_whole_logits_whatever_the_chunk():
    base, small = make_pair()
    ids, scale = make_ids(), 10.0
    ours, theirs = (m(input_ids=ids, output_hidden_states=True) for m in (small, base))
    kl = F.kl_div(ours.logits.log_softmax(-1), theirs.logits.log_softmax(-1), reduction="sum", log_target=True)
    errors = [
        (a - b).pow(2).mean() / b.flatten(0, 1).var(0, correction=0).mean()
        for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    expected = kl / ids.numel() + scale * torch.stack(errors).mean()
    for chunk in (1, 5, 1000):
        loss = healing_loss(small, ids, teacher=base, objective=Objective(hidden=scale, chunk=chunk))
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert healing_loss(copy.deepcopy(base), ids, teacher=base).item() == pytest.approx(0, abs=1e-5)


def test_padding_does_not_count():
    base, small = make_pair()
    ids = make_ids()[:1]
    padded, mask = F.pad(ids, (0, 4), value=1), F.pad(torch.ones_like(ids), (0, 4))
    for objective in (Objective(), Objective(next_token=0.5, hidden=0)):
        alone = healing_loss(small, ids, teacher=base, objective=objective)
        torch.testing.assert_close(healing_loss(small, padded, mask, base, objective), alone, rtol=1e-4, atol=1e-5)


def test_an_adapters_teacher_is_its_own_base():
    base = make_base()
    adapted = get_dha_model(make_base(), DHAConfig(head_budget=0.5, task_type="CAUSAL_LM"), make_batches())
    adapted.base_model.tie_groups()
    ids = make_ids()
    own = healing_loss(adapted, ids)
    torch.testing.assert_close(own, healing_loss(adapted, ids, teacher=base))
    assert float(own) > 0.1


@pytest.mark.parametrize("trained", ["saved", "lora"])
def test_the_teacher_keeps_its_own_output_head(trained):
    base = make_base(tie_word_embeddings=False)
    lora = LoraConfig(target_modules=["o_proj"], modules_to_save=["lm_head"])
    if trained == "lora":
        lora = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    student = get_peft_model(copy.deepcopy(base), lora)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lm_head" in name and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    own = healing_loss(student, make_ids(), objective=KL_ONLY)
    assert own > 0.01
    torch.testing.assert_close(own, healing_loss(student, make_ids(), teacher=base, objective=KL_ONLY))


def test_a_compiled_adapter_has_the_same_loss():
    adapted = get_dha_model(make_base(), DHAConfig(head_budget=0.5, task_type="CAUSAL_LM"), make_batches())
    adapted.base_model.tie_groups()
    compiled = torch.compile(adapted, backend="eager")
    torch.testing.assert_close(healing_loss(compiled, make_ids()), healing_loss(adapted, make_ids()))


def test_evaluating_the_teacher_leaves_modules_in_their_modes():
    adapted = get_dha_model(make_base(), DHAConfig(head_budget=0.5, task_type="CAUSAL_LM"), make_batches()).train()
    frozen = adapted.get_base_model().model.layers[0].mlp.eval()
    healing_loss(adapted, make_ids())
    assert adapted.training and not frozen.training


def test_heal_moves_each_part_at_its_rate_and_brings_the_model_closer():
    base, small = make_pair()
    ids, before = make_rows(), {name: p.detach().clone() for name, p in small.named_parameters()}
    start = float(healing_loss(small, ids, teacher=base, objective=KL_ONLY))
    trainer = heal(small, ids.repeat(8, 1), base, batch_tokens=48, learning_rate=1e-3, disable_tqdm=True)
    assert trainer.state.global_step == 64 and not small.training
    assert float(healing_loss(small, ids, teacher=base, objective=KL_ONLY)) < 0.9 * start
    moved = {name: float((p - before[name]).abs().max()) for name, p in small.named_parameters()}
    assert all(p.requires_grad for p in small.parameters())
    assert not any(change for name, change in moved.items() if "embed" in name or "lm_head" in name)
    attention = max(change for name, change in moved.items() if "self_attn" in name)
    rest = max(change for name, change in moved.items() if "mlp" in name)
    assert 0 < rest < attention


@pytest.mark.parametrize("progressive", [False, True])
def test_heal_trains_an_adapter_and_ends_tied(progressive):
    adapted = get_dha_model(make_base(), DHAConfig(head_budget=0.5, task_type="CAUSAL_LM"), make_batches())
    base = {name: p.clone() for name, p in adapted.named_parameters() if "dha_" not in name}
    trainer = heal(adapted, make_rows(), batch_tokens=24, progressive=progressive, disable_tqdm=True)
    fused = [log["dha/fusion_loss"] for log in trainer.state.log_history if "dha/fusion_loss" in log]
    assert fused[0] > 0.1 if progressive else not fused
    assert adapted.base_model.fusion_loss() < 1e-9
    assert all(m.tied().all() for name, m in adapted.named_modules() if name.endswith("dha_fusion.default"))
    assert all(torch.equal(p, base[name]) for name, p in adapted.named_parameters() if name in base)
    ids = make_ids()
    before = adapted(input_ids=ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_killed_and_resumed_run_equals_the_whole_run(tmp_path):
    base, small = make_pair()
    results = []
    for cut in (False, True):
        student, options = copy.deepcopy(small), {"batch_tokens": 48, "disable_tqdm": True, "save_steps": 2}
        options |= {"output_dir": str(tmp_path / str(cut)), "save_strategy": "steps"}
        if cut:
            with pytest.raises(KeyboardInterrupt):
                heal(copy.deepcopy(small), make_rows(), base, callbacks=[StopAt()], **options)
        heal(student, make_rows(), base, **options)
        results.append(student.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_cached_teacher_heals_like_the_teacher_itself(tmp_path):
    base, small = make_pair()
    ids, mask = make_rows(8), torch.ones(8, 12, dtype=torch.long)
    mask[3, 7:] = 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(3), mask.split(3), strict=True)]
    cache = write_teacher_cache(base, batches, tmp_path / "cache", k=VOCAB, dtype=torch.float32)
    rows = CachedRows(cache)
    batch = torch.utils.data.default_collate([rows[place] for place in range(len(rows))])
    objective = Objective(hidden=0, next_token=0.2, chunk=5)
    expected = healing_loss(small, ids, mask, base, objective)
    torch.testing.assert_close(cached_loss(small, batch, objective), expected, rtol=1e-4, atol=1e-5)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=40, learning_rate=3e-3, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    DHATrainer(small, arguments, teacher=cache).train()
    assert healing_loss(small, ids, mask, base, objective).item() < 0.9 * expected.item()


def test_logits_that_are_changed_after_the_head_are_refused():
    base = make_base()
    student = copy.deepcopy(base)
    forward = student.forward

    def capped_forward(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    student.forward = capped_forward
    with pytest.raises(ValueError, match="changes its logits after its head"):
        heal(student, make_rows(), base, disable_tqdm=True)


def test_a_teacher_has_no_dropout_and_the_student_keeps_its_mode():
    adapted = get_dha_model(make_base("gpt2"), DHAConfig(head_budget=0.5, task_type="CAUSAL_LM"), make_batches())
    adapted.base_model.tie_groups()
    ids, modes = make_ids(), []
    handle = adapted.get_base_model().base_model.register_forward_hook(lambda module, *_: modes.append(module.training))
    adapted.train()
    healing_loss(adapted, ids)
    handle.remove()
    assert modes == [False, True] and adapted.training


def test_a_teacher_that_shares_weights_with_the_student_is_refused():
    base = make_base()
    adapted = get_dha_model(base, DHAConfig(head_budget=0.5, task_type="CAUSAL_LM"), make_batches())
    adapted.base_model.tie_groups()
    merged = adapted.merge_and_unload()
    with pytest.raises(ValueError, match="`teacher` shares weights"):
        heal(merged, make_rows(4), base, disable_tqdm=True)
    heal(merged, make_rows(4), make_base(), disable_tqdm=True)


def test_groups_that_are_to_be_learned_are_not_tied_before():
    config = DHAConfig(head_budget=0.5, grouping="learned", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="no groups before its search"):
        heal(get_dha_model(make_base(), config), make_rows(), disable_tqdm=True)


def test_bad_input():
    base, small = make_pair()
    with pytest.raises(ValueError, match="`teacher` is missing"):
        heal(small, make_rows(), disable_tqdm=True)
    with pytest.raises(ValueError, match="`data` has no row"):
        heal(small, make_rows(0), base)
    with pytest.warns(UserWarning, match="lost to rounding"):
        heal(small.bfloat16(), make_rows(4), base, disable_tqdm=True)
    with pytest.raises(ValueError, match="`next_token` is 2"):
        Objective(next_token=2)


def _gradients(model: nn.Module, ids: torch.Tensor, base: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    healing_loss(model, ids, teacher=base).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _worker(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name may resolve to an interface that leads nowhere
    torch.distributed.init_process_group("gloo", f"file://{folder}/sync", rank=rank, world_size=2)
    base, small = make_pair()
    base.requires_grad_(False)
    rows = make_rows(4)
    whole = _gradients(small, rows, base)
    wrapped = nn.parallel.DistributedDataParallel(small)
    shared = _gradients(wrapped, rows[2 * rank : 2 * rank + 2], base)
    # The relative error's denominator is the batch's own, so halves agree only nearly; other gradients differ by far more.
    close = [torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(whole, shared)]
    torch.save((len(whole) == len(shared), min(map(float, close))), f"{folder}/{rank}")
    torch.distributed.barrier()
    os._exit(0)  # at an ordinary end, the threads of gloo and of the reducer sometimes wait for each other for ever


def test_data_parallel_processes_share_their_gradients(tmp_path):
    context, end = torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2, join=False), time.monotonic() + 120
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail("two processes did not end within 120 s")
    for rank in range(2):
        same, close = torch.load(tmp_path / str(rank))
        assert same and close > 0.99
