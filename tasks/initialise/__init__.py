"""The model that training starts from."""
