"""A metric for `evaluate.load`: the share of tokens that the model finds most likely. From a file, so it works offline."""

import datasets
import evaluate


class TokenAccuracy(evaluate.Metric):
    """References of -100 (padding, the loss's sign for "ignore") do not count."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {name: datasets.Sequence(datasets.Value("int32")) for name in ("predictions", "references")}
        )
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        pairs = [pair for rows in zip(predictions, references, strict=True) for pair in zip(*rows, strict=True)]
        counted = [guess == truth for guess, truth in pairs if truth != -100]
        return {"token_accuracy": sum(counted) / len(counted)}
