"""Features of images and texts by the models under evaluation, over processes."""
