"""Attention over paged K/V, and the rows of a micro-batch that it attends for."""
