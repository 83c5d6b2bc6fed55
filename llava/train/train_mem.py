"""LLaVA's other name for :mod:`llava.train.train`, where it turned flash attention on by rewriting the model.

Here attention is a setting (``--attn_implementation flash_attention_2``); ``sdpa``, the
default, needs as little memory.
"""

from llava.train.train import main
from llava.utils import run_main

if __name__ == "__main__":
    run_main(main)
