"""From logits to the next token, exactly and reproducibly."""
