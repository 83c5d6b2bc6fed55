"""Training as LLaVA users know it, on transformers' Trainer and PEFT: ``python -m llava.train.train``."""
