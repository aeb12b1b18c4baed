"""One request on its way: what was asked, how far it is, and the stream of what its caller gets."""
