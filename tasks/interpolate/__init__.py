"""A model between the one that training began with and the one that it ended with."""
