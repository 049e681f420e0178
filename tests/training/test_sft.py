"""The schedule inside TRL's SFTTrainer, which computes its own loss."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from dha_peft import DHACallback, DHAConfig, get_dha_model

trl = pytest.importorskip("trl", reason="TRL is not installed")
DEMO = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sft_trainer_ties_the_groups(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    model = get_dha_model(base, DHAConfig(head_budget=0.5, task_type="CAUSAL_LM"))
    args = trl.SFTConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, max_length=32, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no", logging_steps=1, learning_rate=1e-3, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"text": "The old man looked at the sea, and said nothing at all."}] * 8)
    trainer = trl.SFTTrainer(
        model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[DHACallback(ramp=0.5)]
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "dha/step" in log and "loss" not in log]
    assert [log["dha/step"] for log in logs] == [1, 2, 3, 4]
    assert logs[0]["dha/fusion_loss"] > 0.1 and model.base_model.fusion_loss() < 1e-9
    ids = torch.arange(5, 25)[None]
    expected = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
