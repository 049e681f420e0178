"""The study's own logic: the jobs of its tables, its restartable files, the head that stands for a group, and its page."""

from __future__ import annotations

import pytest
import torch
from adapter.tiny import HEADS, LAYERS, VOCAB, make_base, make_batches
from fusion.planted import DIM, LAYOUTS, planted_heads, random_psd

from benchmarks.study import render
from benchmarks.study.members import best_members
from benchmarks.study.methods import METHODS, TABLES, Job, Sizes, jobs
from benchmarks.study.pool import Pace, Table
from benchmarks.study.prepare import GROUPINGS
from benchmarks.study.recovery import FIELDS, KEYS, SCORE_FIELDS, Study, kept_heads, run
from benchmarks.study.rows import tokens_to_reach
from dha_peft.attention import find_attention
from dha_peft.fusion.moments import head_gram
from dha_peft.search import collect_statistics, search_groups


def test_every_job_is_listed_once_and_the_longest_come_first():
    listed = jobs(TABLES, Sizes())
    assert len(listed) == len(set(listed))
    assert [job.fraction for job in listed] == sorted((job.fraction for job in listed), reverse=True)
    assert set(METHODS) == {job.method for job in listed}
    assert Job("aligned", 0.25, 0.0025, 0.0, 1) in listed
    assert not [job for job in listed if job.method == "linear" and not job.fraction], "its groups need training"


def test_a_table_knows_the_jobs_that_it_holds(tmp_path):
    job = Job("aligned", 0.125, 0.0025, 0.25, 1)
    values = {name: getattr(job, name) for name in KEYS}
    Table(tmp_path / "losses.csv", FIELDS).add([values | {"loss": 3.5}])
    again = Table(tmp_path / "losses.csv", FIELDS)
    assert again.keys() == {job.key}


def test_the_pace_of_longer_jobs_bounds_that_of_shorter_ones():
    pace, long, short = Pace(), Job("gqa", 0.5, 0.05, 0.0, 0), Job("gqa", 0.5, 0.01, 0.0, 0)
    assert pace.expected(long) == 0
    pace.learn(long, 500.0)
    assert pace.expected(short) == 100.0
    pace.learn(long, 600.0)
    assert (pace.expected(short), pace.expected(Job("gqa", 0.5, 0.0001, 0.0, 0))) == (120.0, 60.0)
    pace.learn(short, 12.0)
    assert (pace.expected(short), pace.expected(long)) == (12.0, 600.0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_member_stands_for_a_group_of_one_head_in_many_frames(layout):
    groups = ((0, 2, 3), (1,), (4, 5))
    heads, moment, metric = planted_heads(groups, layout, 12), random_psd(12, 12), random_psd(6, DIM, DIM)
    kept, maps = best_members(head_gram(heads, moment), metric, layout, groups)
    assert kept[1] == 1 and kept[0] == kept[2] == kept[3] and kept[0] in groups[0]
    torch.testing.assert_close(maps.apply(heads[kept], layout), heads, atol=1e-8, rtol=1e-6)


def test_the_kept_member_has_the_least_error_of_all():
    layout, heads, moment = LAYOUTS["full"], torch.randn(3, DIM, 12, dtype=torch.float64), random_psd(12, 12)
    heads[1] = heads[0] + 0.1 * heads[1]  # head 2 is like none, so it must not be the one that is kept
    heads[2] *= 0.1
    kept, _ = best_members(head_gram(heads, moment), random_psd(3, DIM, DIM), layout, ((0, 1, 2),))
    assert kept[0] in (0, 1)


def test_tokens_to_reach_a_loss_lie_between_two_cells():
    rows = [
        {"method": "gqa", "budget": 0.25, "fraction": f, "loss": loss}
        for f, loss in ((0.001, 5.0), (0.01, 4.0), (0.1, 3.8))
    ]
    assert tokens_to_reach(rows, "gqa", 0.25, 4.5) == pytest.approx(0.001 * 10**0.5)
    assert tokens_to_reach(rows, "gqa", 0.25, 5.5) == 0.001
    assert tokens_to_reach(rows, "gqa", 0.25, 3.7) is None


def test_the_page_holds_the_numbers_of_the_files_and_says_what_was_not_run(tmp_path):
    cells = [("base", 1.0, 0.0, 0, 3.0), ("aligned", 0.25, 0.0025, 0, 3.25), ("aligned", 0.25, 0.0025, 1, 3.35)]
    cells += [("gqa", 0.25, fraction, 0, loss) for fraction, loss in ((0.0025, 4.0), (0.05, 3.5))]
    rows = [
        dict(zip(("method", "budget", "fraction", "seed", "loss"), cell, strict=True)) | {"share": 0.0}
        for cell in cells
    ]
    Table(tmp_path / "losses.csv", FIELDS).add(rows)
    key = {"method": "aligned", "budget": 0.25, "fraction": 0.0025, "share": 0.0, "seed": 0, "metric": "acc"}
    scores = [key | {"task": "local_cloze", "value": 0.2, "stderr": 0.01}]
    scores += [scores[0] | {"method": "base", "budget": 1.0, "fraction": 0.0, "value": 0.25}]
    Table(tmp_path / "scores.csv", SCORE_FIELDS).add(scores)
    page = render.page(tmp_path)
    assert "3.300 ± 0.050" in page and "Base: 3.000" in page
    assert "more than 20 times as many" in page
    assert "20.0 ± 1.0" in page and "80.0 %" in page
    assert "not run yet" in page and "{" not in page


@pytest.fixture(scope="module")
def study():
    base = make_base().requires_grad_(False)
    sites = find_attention(base)
    statistics = collect_statistics(base, sites, make_batches())
    analyses = {grouping: search_groups(sites, statistics, grouping) for grouping in GROUPINGS}
    ids = torch.randint(2, VOCAB, (8 * 24 + 1,), generator=torch.Generator().manual_seed(0))
    return Study(base, None, analyses, ids[:-1].view(8, 24), ids, pretraining_tokens=6 * 24)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_model_of_the_budget_with_and_without_training(study, method):
    for fraction in (1.0,) if METHODS[method].trains_groups else (0.0, 1.0):
        row, scores = run(study, Job(method, 0.5, fraction, METHODS[method].share, 0))
        assert row["kept_heads"] == 2 * HEADS * LAYERS // (1 if method == "base" else 2)
        assert row["tokens"] == fraction * 6 * 24 and 0 < row["loss"] < 20 and not scores
        assert row["before_collapse"] is None or METHODS[method].frozen or METHODS[method].share


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_heads_of_a_base_are_counted_in_any_family(family):
    assert kept_heads(make_base(family)) == 2 * HEADS * LAYERS
