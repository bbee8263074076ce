"""Converters: other forms of evaluation sets into the published webdataset layout."""
