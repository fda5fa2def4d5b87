"""Text and conversations: tokenizer, chat template, corpora and packed shards."""
