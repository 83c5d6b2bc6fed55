"""Question files → answers → scores: GQA, MME, TextVQA and POPE, in the formats LLaVA users have."""
