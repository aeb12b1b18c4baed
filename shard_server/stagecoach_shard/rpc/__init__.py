"""The shard's gRPC service: who may call it, and the Session and Forward streams."""
