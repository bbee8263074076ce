"""Plans: steps and cost of a run, and the fitness of this machine for it."""
