"""Talking to a model: `chat` is the conversation, `terminal` is the terminal around it,
and `cli_pruning` and `cli` are the programs."""
