"""The families of models, one file each, and the decoder layers that they are made of."""
