"""The graph of a recipe's steps: addresses, inputs, running them."""
