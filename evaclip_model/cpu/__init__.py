"""What makes a CPU fast: products by oneDNN, kept memory, gloo without copies."""
