"""Talking to a model: `chat` is the conversation, `cli_pruning` and `cli` are the terminal around it."""
