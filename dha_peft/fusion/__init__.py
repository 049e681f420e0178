"""The mathematics of decoupled heads: pure functions on tensors, free of peft and transformers."""
