"""LLaVA on Mistral: transformers' own decoder plus tower, projector and splice."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMistralConfig(MistralConfig):
    """A Mistral config with LLaVA's ``mm_*`` keys; ``vision_config`` (a dict) describes a tower kept inside."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):  # type: ignore[misc]
    """Weights are named as in original LLaVA checkpoints."""

    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig) -> None:
        # Past MistralForCausalLM.__init__, which would build a second decoder only for it to be thrown away.
        super(MistralForCausalLM, self).__init__(config)
        self.model = LlavaMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
