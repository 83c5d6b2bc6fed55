"""What `scripts/train_tiny.py` drives: pictures, questions, tokenizer, training, evaluation, export."""
