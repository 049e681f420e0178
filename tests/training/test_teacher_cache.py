"""The teacher's top-k answers on disk: exact at k = V, a lower bound below, and never taken for whole when they are not."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from dha_peft.training.teacher_cache import INDEX, TeacherCache, topk_kl, write_teacher_cache

VOCABULARY = 50


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).eval()


def ragged_batches() -> list[dict[str, torch.Tensor]]:
    """Rows of different lengths per batch, one padded."""
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, VOCABULARY, shape)} for shape in ((2, 7), (3, 5), (1, 11))]
    batches[1]["attention_mask"] = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5])
    return batches


@torch.no_grad()
def logits_of(model, batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("with_rest", [True, False])
def test_all_tokens_kept_is_the_exact_kl_also_in_its_gradient(tmp_path, with_rest):
    teacher, student = tiny_model(1), tiny_model(2)
    batches = ragged_batches()
    cache = write_teacher_cache(teacher, batches, tmp_path, k=VOCABULARY, dtype=torch.float32, shard_tokens=20, chunk=7)
    assert len(cache) == len(batches) and len(cache.shards) == 2
    for batch, read in zip(batches, cache, strict=True):
        assert torch.equal(batch["input_ids"], read["input_ids"])
        logits = logits_of(student, read).requires_grad_()
        wanted = log_softmax(logits_of(teacher, read), -1)
        exact = kl_div(log_softmax(logits, -1), wanted, reduction="none", log_target=True).sum(-1)
        rest = read["rest"] if with_rest else None
        found = topk_kl(logits, read["indices"], read["log_probs"], rest)
        keep = read["attention_mask"].bool()
        torch.testing.assert_close(found[keep], exact[keep], atol=1e-5, rtol=1e-5)
        gradients = [torch.autograd.grad(loss[keep].sum(), logits, retain_graph=True)[0] for loss in (found, exact)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_fewer_tokens_bound_the_kl_from_below_and_rise_to_it(tmp_path):
    teacher, student = tiny_model(1), tiny_model(2)
    losses = []
    for k in (1, 4, 16, VOCABULARY - 1):
        cache = write_teacher_cache(teacher, ragged_batches(), tmp_path / str(k), k=k)
        read = next(iter(cache))
        losses.append(topk_kl(logits_of(student, read), read["indices"], read["log_probs"], read["rest"]))
        same = topk_kl(logits_of(teacher, read), read["indices"], read["log_probs"], read["rest"])
        assert same.abs().max() < 2e-3  # half precision on disk; the KL of the teacher itself is 0
    wanted, given = (log_softmax(logits_of(m, read), -1) for m in (teacher, student))
    exact = kl_div(given, wanted, reduction="none", log_target=True).sum(-1)
    assert all((low <= high + 2e-3).all() for low, high in zip(losses, [*losses[1:], exact], strict=True))
    assert (losses[0] < exact - 0.01).any()
    torch.testing.assert_close(losses[-1], exact, atol=2e-3, rtol=2e-3)


def test_a_write_that_did_not_end_is_no_cache(tmp_path):
    teacher = tiny_model(1)

    def breaking_off():
        yield from ragged_batches()[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_teacher_cache(teacher, breaking_off(), tmp_path, k=4, shard_tokens=1)
    assert list(tmp_path.glob("shard-*")), "the broken run left shards behind"
    with pytest.raises(ValueError, match="no whole teacher cache"):
        TeacherCache(tmp_path)
    one = ragged_batches()[2:]
    cache = write_teacher_cache(teacher, one, tmp_path, k=4, shard_tokens=1)
    assert len(list(tmp_path.glob("shard-*"))) == 1, "shards of the broken run are gone"
    assert torch.equal(next(iter(cache))["input_ids"], one[0]["input_ids"])


def test_a_whole_cache_is_not_overwritten_and_a_cut_one_is_refused(tmp_path):
    teacher = tiny_model(1)
    write_teacher_cache(teacher, ragged_batches(), tmp_path, k=4)
    with pytest.raises(ValueError, match="another folder"):
        write_teacher_cache(teacher, ragged_batches(), tmp_path, k=4)
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut short"):
        TeacherCache(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match="written last"):
        TeacherCache(tmp_path)
