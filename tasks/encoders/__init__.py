"""Models of several libraries behind one interface, and what they make of images and texts."""
