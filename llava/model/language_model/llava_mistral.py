"""LLaVA on Mistral, where LLaVA's scripts import it from."""

from llava.model.llava_arch import LlavaMistralConfig, LlavaMistralForCausalLM

__all__ = ["LlavaMistralConfig", "LlavaMistralForCausalLM"]
