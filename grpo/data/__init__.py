"""Where prompts come from: rows of a source, checked and tokenised once, then an exactly-once stream."""
