"""CLIP's byte-pair tokenizer and the files it reads."""
