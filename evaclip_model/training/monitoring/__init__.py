"""Reports of a training, and the guards that stop it."""
