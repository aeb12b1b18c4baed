"""Attention over paged K/V."""
