"""Talking to a model: `chat` is the conversation, `terminal` the terminal around it, `output` what that shows, and
`cli_pruning` and `cli` are the programs."""
