"""The EVA-CLIP architecture: towers, layers, attention, and the configuration that names them."""
