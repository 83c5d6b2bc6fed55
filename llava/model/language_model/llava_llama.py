"""LLaVA on LLaMA, where LLaVA's scripts import it from."""

from llava.model.llava_arch import LlavaConfig, LlavaLlamaForCausalLM

__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM"]
