"""LLaVA on LLaMA: transformers' own decoder plus tower, projector and splice."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaConfig(LlamaConfig):
    """A LLaMA config with LLaVA's ``mm_*`` keys; ``vision_config`` (a dict) describes a tower kept inside."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, LlamaForCausalLM):  # type: ignore[misc]
    """Weights are named as in original LLaVA checkpoints."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        # Past LlamaForCausalLM.__init__, which would build a second decoder only for it to be thrown away.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
