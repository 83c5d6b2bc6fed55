"""Projectors from vision features to language rows."""
