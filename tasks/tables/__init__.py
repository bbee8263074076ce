"""Tables of text that people made: CSV, TSV and JSON Lines, a row at a time."""
