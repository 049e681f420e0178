"""Converts a model and uploads it, with its code, its tokenizer and its card. HF_ENDPOINT and `hf auth login` say where to, and as whom.

python examples/push_to_hub.py --repo me/my-dha-model --private
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dha_peft import DHAConfig, convert
from dha_peft.texts import token_batches

DEMO = Path(__file__).parent / "demo_model"


def main() -> None:
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    batches = token_batches(tokenizer, [options.text], tokens=options.tokens)
    small = convert(base, DHAConfig(head_budget=options.budget), batches)
    # The card says what the model was made from; a README that the repository has already stays.
    print(small.push_to_hub(options.repo, private=options.private))
    tokenizer.push_to_hub(options.repo)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True, help="repository on the hub, as in me/my-dha-model")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--model", default=str(DEMO), help="local folder or hub id")
    parser.add_argument("--text", type=Path, default=DEMO / "text" / "calibration.jsonl.xz")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    return parser.parse_args()


if __name__ == "__main__":
    main()
