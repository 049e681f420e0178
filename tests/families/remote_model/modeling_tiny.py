"""A decoder with its own attention and learned positions, as a repository of remote code has it; see test_register.py."""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_tiny import TinyConfig


class TinyAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.num_heads = layer_idx, config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, x, mask, past_key_values=None):
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (project(x).view(shape).transpose(1, 2) for project in (self.wq, self.wk, self.wv))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        scores = q @ k.transpose(2, 3) / self.head_dim**0.5 + mask
        return self.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class TinyBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(config.hidden_size), TinyAttention(config, layer_idx)

    def forward(self, x, mask, past_key_values=None):
        return x + self.attn(self.norm(x), mask, past_key_values=past_key_values)


class TinyPreTrainedModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "transformer"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.3)


class TinyModel(TinyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed, self.place = (
            nn.Embedding(config.vocab_size, config.hidden_size),
            nn.Embedding(64, config.hidden_size),
        )
        self.blocks = nn.ModuleList(TinyBlock(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=True, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.place(places)
        mask = torch.arange(seen + input_ids.shape[1], device=input_ids.device) > places[:, None]
        mask = torch.zeros(mask.shape, device=x.device, dtype=x.dtype).masked_fill(mask, torch.finfo(x.dtype).min)
        for block in self.blocks:
            x = block(x, mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)


class TinyForCausalLM(TinyPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer, self.lm_head = TinyModel(config), nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, labels=None, **kwargs):
        out = self.transformer(input_ids, attention_mask, past_key_values, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values)
