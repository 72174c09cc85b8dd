"""How a dataset becomes batches of uint8 images."""
