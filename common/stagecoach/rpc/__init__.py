"""What travels between processes and how: channels, framing, the Forward stream, health, signs of life."""
