"""Between text and tokens: the tokenizer, chat templates, incremental decoding, stop strings."""
