"""Who a peer is and what it may do: TLS identities, and the file of API keys."""
